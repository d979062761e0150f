# SPDX-License-Identifier: Apache-2.0
"""The specialisations of the attention kernels whose machine code is checked without a GPU."""

from disca_kernels.ops.attention.tiles import Tile, has_descriptors, padded_dim, tiles_for
from disca_kernels.testing.codegen import KernelSpec

_ROOM = "disca_kernels.ops.attention"
_PRIMALS, _TANGENTS = ("q", "k", "v"), ("q_dot", "k_dot", "v_dot")
# Kernel, operands, other tensors of the operands' dtype, of float32, further compile-time values.
_KERNELS = {
    "fwd": ("triton_forward:_attention_fwd_kernel", _PRIMALS, "o rest", "lse", "NEGATIVE"),
    "jvp": (
        "triton_jvp:_attention_jvp_kernel",
        _PRIMALS + _TANGENTS,
        "o o_dot",
        "lse lse_dot",
        "NEGATIVE",
    ),
    "tangent": (
        "triton_tangent:_attention_tangent_kernel",
        (*_PRIMALS, *_TANGENTS, "o", "rest"),
        "o_dot",
        "lse lse_dot",
        "EXACT_O",
    ),
    "dq": (
        "triton_backward:_attention_bwd_kernel_dq",
        (*_PRIMALS, "do"),
        "o dq",
        "lse dlse delta",
        "",
    ),
    "dkdv": (
        "triton_backward:_attention_bwd_kernel_dkdv",
        (*_PRIMALS, "do"),
        "dk dv",
        "lse delta",
        "",
    ),
}


def spec(
    kernel: str,
    arch: int,
    head_dim: int,
    dtype: str = "bf16",
    *,
    causal: bool = True,
    tma: bool | None = None,
    tile: Tile | None = None,
) -> KernelSpec:
    """Return one kernel as the launchers call it, every optional operand present.

    Args:
        kernel: "fwd", "jvp", "tangent", "dq" or "dkdv".
        arch: compute capability times ten.
        head_dim: D.
        dtype: Triton's name of the operands' dtype.
        causal: whether there is a block-causal rule.
        tma: whether operands are tensor descriptors; by default if the device has them.
        tile: another tile than the one in the table.
    """
    path, operands, alike, floats, flags = _KERNELS[kernel]
    tile = tile or getattr(tiles_for(arch, head_dim, 4 if dtype == "fp32" else 2), kernel)
    tma = has_descriptors(arch) if tma is None else tma
    block_d = padded_dim(head_dim)
    pointers = {f"p_{name}": f"*{dtype}" for name in alike.split()}
    pointers |= {f"p_{name}": "*fp32" for name in floats.split()} | {"p_lengths": "*i64"}
    signature = dict(pointers)
    for name in operands:
        rows = tile.block_n if name[0] in "kv" else tile.block_m
        form = f"tensordesc<{dtype}[1, 1, {rows}, {block_d}]>" if tma else f"*{dtype}"
        signature[name] = form
    letters = "qkvd" if "do" in operands else "qkv"
    strides = {f"stride_{x}{y}": "i32" for x in letters for y in "bhn"}
    sizes = dict.fromkeys(("H", "GROUP", "NQ", "NK", "block"), "i32")
    constants = {
        "D": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "CAUSAL": causal,
        "TMA": tma,
        **{flag: flag == "EXACT_O" for flag in flags.split()},
    }
    label = f"{dtype} D={head_dim}{' causal' * causal}{'' if tma else ' pointers'}"
    return KernelSpec(
        kernel=f"{_ROOM}.{path}",
        signature={**signature, **strides, **sizes, "scale": "fp32"},
        constexprs=constants,
        divisible=(*pointers, *strides, *(() if tma else operands)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.maxnreg,
        label=f"{label}, {tile.block_m}x{tile.block_n}, {tile.num_stages} stages",
        matrix=dtype != "fp32",
    )


def specs(arch: int) -> list[KernelSpec]:
    """Return what is checked for one compute capability (times ten)."""
    common = [
        spec(kernel, arch, head_dim, dtype)
        for head_dim in (64, 128)
        for dtype in ("bf16", "fp16")
        for kernel in _KERNELS
    ]
    # A width that is padded, and the widest one.
    return common + [spec(kernel, arch, head_dim) for head_dim in (72, 256) for kernel in _KERNELS]
