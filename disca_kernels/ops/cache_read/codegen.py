# SPDX-License-Identifier: Apache-2.0
"""The specialisations of the cache_read kernels whose machine code is checked without a GPU."""

from disca_kernels.ops.cache_read.tiles import GROUP_M, Tile, tiles_for
from disca_kernels.testing.codegen import KernelSpec
from disca_kernels.triton_common.descriptors import has_descriptors

_PRIMALS = ("current", "cache", "weight")
_TANGENTS = ("current_dot", "cache_dot", "weight_dot")
_STRIDES = ("cb", "cn", "hb", "hn", "wh", "wn")
_STRIDES_OF_TANGENTS = ("cdb", "cdn", "hdb", "hdn", "wdh", "wdn")
# What moves in each kernel: in a predictor's training the current tokens alone.
_MOVING: dict[str, tuple[str, ...]] = {
    "fwd": (),
    "fwd_keep": (),
    "jvp": ("current_dot",),
    "jvp_weight": (*_TANGENTS, "p_bias_dot"),
}


def spec(
    kernel: str, arch: int, dtype: str, *, tma: bool | None = None, tile: Tile | None = None
) -> KernelSpec:
    """Return one kernel as its launcher calls it.

    Args:
        kernel: "fwd", "fwd_keep", "jvp" (a tangent of the current tokens) or "jvp_weight" (every
            tangent).
        arch: compute capability times ten.
        dtype: Triton's name of the operands' dtype.
        tma: whether operands are tensor descriptors; by default if the device has them.
        tile: another tile than the one in the table.
    """
    itemsize = 4 if dtype == "fp32" else 2
    tma = has_descriptors(arch, itemsize) if tma is None else tma
    tile = tile or getattr(tiles_for(arch, itemsize, tma), kernel)
    name, moving = kernel.partition("_")[0], _MOVING[kernel]
    results = ("y",) if kernel == "fwd" else ("y", "z", *["y_dot"] * (name == "jvp"))
    present = (*_PRIMALS, *moving, "p_bias", *results)
    absent = {"z"} if name == "fwd" else {*_TANGENTS, "p_bias_dot"}
    absent -= set(present)
    signature = {}
    for operand in present:
        rows = tile.block_n if operand.startswith("weight") else tile.block_m
        columns = tile.block_n if operand in ("y", "z", "y_dot") else tile.block_k
        described = tma and not operand.startswith("p_")
        block = f"tensordesc<{dtype}[1, {rows}, {columns}]>"
        signature[operand] = block if described else f"*{dtype}"
    suffixes = _STRIDES if name == "fwd" else (*_STRIDES, *_STRIDES_OF_TANGENTS)
    strides = {f"stride_{suffix}": "i32" for suffix in suffixes}
    pointers = [operand for operand, kind in signature.items() if kind[0] == "*"]
    return KernelSpec(
        kernel=f"disca_kernels.ops.cache_read.triton:_cache_read_{name}_kernel",
        signature={**signature, **dict.fromkeys(("n_batch", "N", "C", "n_out"), "i32"), **strides},
        constexprs={
            **dict.fromkeys(absent),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_M": GROUP_M,
            "TMA": tma,
        },
        divisible=(*pointers, *strides, "C", "n_out"),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        label=f"{dtype} {kernel}{'' if tma else ' pointers'}, {tile.block_m}x{tile.block_n}x"
        f"{tile.block_k}, {tile.num_stages} stages",
        matrix=dtype != "fp32",
    )


def specs(arch: int) -> list[KernelSpec]:
    """Return what is checked for one compute capability (times ten)."""
    found = [spec(kernel, arch, dtype) for dtype in ("bf16", "fp32") for kernel in _MOVING]
    return found + [spec("jvp", arch, "bf16", tma=False)] * has_descriptors(arch, 2)
