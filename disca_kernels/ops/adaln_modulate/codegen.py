# SPDX-License-Identifier: Apache-2.0
"""The specialisations of the adaln_modulate kernels whose machine code is checked without a GPU."""

from disca_kernels.testing.codegen import KernelSpec
from disca_kernels.testing.modulated import ModulatedShape

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


# A HunyuanVideo block, the width of Wan, and the widest row that is supported.
_SHAPES = [
    ModulatedShape("bf16", "bf16", 3072),
    ModulatedShape("bf16", "fp32", 3072, affine=True),
    ModulatedShape("bf16", "bf16", 3072, affine=True, rms=True),
    ModulatedShape("bf16", "bf16", 5120),
    ModulatedShape("fp32", "fp32", 8192),
    ModulatedShape("bf16", "fp32", 8192, per_token=True),
]


def _spec(mode: str, shape: ModulatedShape) -> KernelSpec:
    """Return one kernel as its launcher calls it."""
    from disca_kernels.ops.adaln_modulate.triton import LIVE_ROWS
    from disca_kernels.triton_common.rows import tile

    def dtype_of(name: str) -> str:
        if name in _SUMS:
            return "fp32"
        tokens = name.removeprefix("d").startswith(("x", "y"))
        return shape.dtype if tokens else shape.modulation_dtype

    operands, absent = _OPERANDS[mode], shape.absent(mode)
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
