# SPDX-License-Identifier: Apache-2.0
"""The specialisations of the attention kernels whose machine code is checked without a GPU."""

from collections.abc import Mapping
from typing import NamedTuple

from disca_kernels.ops.attention.tiles import Tile, padded_dim, tiles_for
from disca_kernels.testing.codegen import KernelSpec
from disca_kernels.triton_common.descriptors import has_descriptors

_ROOM = "disca_kernels.ops.attention"
_PRIMALS, _TANGENTS = ("q", "k", "v"), ("q_dot", "k_dot", "v_dot")


class _Kernel(NamedTuple):
    """What a kernel takes beside the sizes and strides that all of them take."""

    path: str
    operands: tuple[str, ...]
    """Pointers with strides, or tensor descriptors."""
    alike: tuple[str, ...]
    """Plain pointers of the operands' dtype."""
    floats: tuple[str, ...]
    """Plain pointers to float32."""
    numbers: Mapping[str, str] = {}
    constants: Mapping[str, bool] = {}


KERNELS = {
    "fwd": _Kernel(
        "triton_forward:_attention_fwd_kernel",
        _PRIMALS,
        ("p_o", "p_rest"),
        ("p_lse",),
        constants={"NEGATIVE": False},
    ),
    "jvp": _Kernel(
        "triton_jvp:_attention_jvp_kernel",
        _PRIMALS + _TANGENTS,
        ("p_o", "p_o_dot"),
        ("p_lse", "p_lse_dot"),
        constants={"NEGATIVE": False},
    ),
    "tangent": _Kernel(
        "triton_tangent:_attention_tangent_kernel",
        (*_PRIMALS, *_TANGENTS, "o", "rest"),
        ("p_o_dot",),
        ("p_lse", "p_lse_dot"),
        constants={"EXACT_O": True},
    ),
    "dq": _Kernel(
        "triton_backward:_attention_bwd_kernel_dq",
        (*_PRIMALS, "do"),
        ("p_o", "p_dq"),
        ("p_lse", "p_dlse", "p_rows"),
    ),
    "dkdv": _Kernel(
        "triton_backward:_attention_bwd_kernel_dkdv",
        (*_PRIMALS, "do"),
        ("p_dk", "p_dv"),
        ("rows",),
        numbers={"padded": "i32", "delta_offset": "i64"},
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
    found = KERNELS[kernel]
    itemsize = 4 if dtype == "fp32" else 2
    tma = has_descriptors(arch, itemsize) if tma is None else tma
    tile = tile or getattr(tiles_for(arch, head_dim, itemsize, tma), kernel)
    block_d = padded_dim(head_dim)
    pointers = dict.fromkeys(found.alike, f"*{dtype}") | dict.fromkeys(found.floats, "*fp32")
    pointers["p_lengths"] = "*i64"
    if tma and "rows" in pointers:
        pointers["rows"] = f"tensordesc<fp32[1, 1, {tile.block_m}]>"
    operands = {}
    for name in found.operands:
        rows = tile.block_n if name[0] in "kv" else tile.block_m
        described = f"tensordesc<{dtype}[1, 1, {rows}, {block_d}]>"
        operands[name] = described if tma else f"*{dtype}"
    arrays = operands | pointers
    letters = "qkvd" if "do" in operands else "qkv"
    strides = {f"stride_{x}{y}": "i32" for x in letters for y in "bhn"}
    numbers = dict.fromkeys(("H", "GROUP", "NQ", "NK", "block"), "i32") | {"scale": "fp32"}
    constants = {
        "D": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "CAUSAL": causal,
        "TMA": tma,
    }
    label = f"{dtype} D={head_dim}{' causal' * causal}{'' if tma else ' pointers'}"
    return KernelSpec(
        kernel=f"{_ROOM}.{found.path}",
        signature={**arrays, **strides, **numbers, **found.numbers},
        constexprs={**constants, **found.constants},
        divisible=(*strides, *found.numbers, *(n for n, t in arrays.items() if t[0] == "*")),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        label=f"{label}, {tile.block_m}x{tile.block_n}, {tile.num_stages} stages",
        matrix=dtype != "fp32",
    )


def specs(arch: int) -> list[KernelSpec]:
    """Return what is checked for one compute capability (times ten)."""
    pairs = [(64, "bf16"), (128, "bf16"), (128, "fp16"), (256, "bf16")]
    common = [spec(kernel, arch, *pair) for pair in pairs for kernel in KERNELS]
    # A width that is padded, and rows that no descriptor reaches.
    padded = [spec("tangent", arch, 72)]
    return common + padded + [spec("jvp", arch, 128, tma=False)] * has_descriptors(arch, 2)
