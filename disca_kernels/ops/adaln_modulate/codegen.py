# SPDX-License-Identifier: Apache-2.0
"""The specialisations of the adaln_modulate kernels whose machine code is checked without a GPU."""

from typing import NamedTuple

from disca_kernels.testing.codegen import KernelSpec

# The operands of each kernel and the suffixes of their strides.
_PRIMALS = {"x": "xb xn", "shift": "hb hn", "scale": "sb sn", "weight": "", "bias": ""}
_SUMS = ("sum", "sum_x_hat")
_OPERANDS = {
    "fwd": {**_PRIMALS, "y": ""},
    "bwd": {
        **{"dy": "yb yn", "x": "xb xn", "scale": "sb sn", "weight": "", "bias": ""},
        **dict.fromkeys(("dx", "dshift", "dscale", *_SUMS), ""),
    },
    "jvp": {
        **_PRIMALS,
        **{"x_dot": "xdb xdn", "shift_dot": "hdb hdn", "scale_dot": "sdb sdn"},
        **dict.fromkeys(("weight_dot", "bias_dot", "y", "y_dot"), ""),
    },
}


class _Shape(NamedTuple):
    dtype: str
    modulation_dtype: str
    n_channels: int
    per_token: bool = False
    affine: bool = False
    rms: bool = False

    def __str__(self) -> str:
        kind = "per token" if self.per_token else "per sample"
        variant = ", affine" * self.affine + ", rms" * self.rms
        return f"x {self.dtype}, modulation {self.modulation_dtype} {kind}, C={self.n_channels}" + (
            variant
        )


# A HunyuanVideo block, and the widest row that is supported in the widest dtype.
_SHAPES = [
    _Shape("bf16", "bf16", 3072),
    _Shape("bf16", "fp32", 3072, affine=True),
    _Shape("bf16", "bf16", 3072, affine=True, rms=True),
    _Shape("fp32", "fp32", 8192),
    _Shape("bf16", "fp32", 8192, per_token=True),
]


def _absent(mode: str, shape: _Shape) -> set[str]:
    """Name the pointers that are None."""
    absent = {"bias", "bias_dot"} if shape.rms or not shape.affine else set()
    if not shape.affine:
        absent |= {"weight", "weight_dot"}
    if mode == "bwd":
        absent |= {*_SUMS} if shape.per_token and not shape.affine else set()
        absent |= set() if shape.per_token else {"dshift", "dscale"}
    return absent


def _spec(mode: str, shape: _Shape) -> KernelSpec:
    """Return one kernel as its launcher calls it."""
    from disca_kernels.ops.adaln_modulate.triton import LIVE_ROWS
    from disca_kernels.triton_common.rows import tile

    def dtype_of(name: str) -> str:
        if name in _SUMS:
            return "fp32"
        tokens = name.removeprefix("d").startswith(("x", "y"))
        return shape.dtype if tokens else shape.modulation_dtype

    operands, absent = _OPERANDS[mode], _absent(mode, shape)
    pointers = {f"p_{n}": f"*{dtype_of(n)}" for n in operands if n not in absent}
    strides = {f"stride_{s}": "i32" for suffixes in operands.values() for s in suffixes.split()}
    sizes = {"N": "i32", "C": "i32", "eps": "fp32"}
    if mode == "bwd":
        sizes |= {"n_splits": "i32", "rows_per_split": "i32"}
    block_n, block_c, num_warps = tile(shape.n_channels, LIVE_ROWS[mode])
    blocks = {"BLOCK_N": block_n, "BLOCK_C": block_c}
    return KernelSpec(
        kernel=f"disca_kernels.ops.adaln_modulate.triton:_adaln_modulate_{mode}_kernel",
        signature={**pointers, **strides, **sizes},
        constexprs={
            **{f"p_{name}": None for name in operands if name in absent},
            **{"PER_TOKEN": shape.per_token, "RMS": shape.rms, **blocks},
        },
        divisible=(*pointers, *strides, "C"),
        num_warps=num_warps,
        label=str(shape),
    )


def specs(arch: int) -> list[KernelSpec]:
    """Return what is checked for one compute capability (times ten)."""
    return [_spec(mode, shape) for mode in _OPERANDS for shape in _SHAPES]
