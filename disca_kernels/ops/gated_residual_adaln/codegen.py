# SPDX-License-Identifier: Apache-2.0
"""The specialisations of the gated_residual_adaln kernels that are checked without a GPU."""

from disca_kernels.testing.codegen import KernelSpec
from disca_kernels.testing.modulated import ModulatedShape

# The operands of each kernel and the suffixes of their strides.
_PRIMALS = {
    **{"x": "xb xn", "y": "yb yn", "gate": "gb gn", "shift": "hb hn", "scale": "sb sn"},
    **{"weight": "", "bias": ""},
}
_SUMS = ("sum_gate", "sum", "sum_x_hat")
_OPERANDS = {
    "fwd": {**_PRIMALS, "x_new": "", "h": ""},
    "bwd": {
        **{"dx_new": "db dn", "dh": "hb hn", "x_new": "xb xn", "y": "yb yn", "gate": "gb gn"},
        **{"scale": "sb sn", "weight": "", "bias": ""},
        **dict.fromkeys(("dx", "dy", "dgate", "dshift", "dscale", *_SUMS), ""),
    },
    "jvp": {
        **_PRIMALS,
        **{"x_dot": "xdb xdn", "y_dot": "ydb ydn", "gate_dot": "gdb gdn"},
        **{"shift_dot": "hdb hdn", "scale_dot": "sdb sdn", "weight_dot": "", "bias_dot": ""},
        **dict.fromkeys(("x_new", "h", "x_new_dot", "h_dot"), ""),
    },
}


# A HunyuanVideo block, the width of Wan, float32, and the widest row that is supported.
_SHAPES = [
    ModulatedShape("bf16", "bf16", 3072),
    ModulatedShape("bf16", "fp32", 3072, affine=True),
    ModulatedShape("bf16", "bf16", 3072, affine=True, rms=True),
    ModulatedShape("bf16", "bf16", 5120),
    ModulatedShape("fp32", "fp32", 4096, affine=True),
    ModulatedShape("fp32", "fp32", 8192),
    ModulatedShape("bf16", "fp32", 8192, per_token=True),
]
# What the launches of a backward pass write where one is not enough.
_PARTS = {
    "modulation": frozenset({"dshift", "dscale", "sum", "sum_x_hat"}),
    "residual": frozenset({"dx", "dy", "dgate", "sum_gate"}),
}


def _spec(mode: str, shape: ModulatedShape, without: str = "") -> KernelSpec:
    """Return one kernel as its launcher calls it, `without` a part of the gradients."""
    from disca_kernels.ops.gated_residual_adaln.triton import LIVE_ROWS
    from disca_kernels.triton_common.rows import tile

    def dtype_of(name: str) -> str:
        if name in _SUMS:
            return "fp32"
        tokens = name.removeprefix("d").startswith(("x", "y", "h"))
        return shape.dtype if tokens else shape.modulation_dtype

    operands, absent = _OPERANDS[mode], shape.absent(mode) | _PARTS.get(without, frozenset())
    pointers = {f"p_{n}": f"*{dtype_of(n)}" for n in operands if n not in absent}
    strides = {f"stride_{s}": "i32" for suffixes in operands.values() for s in suffixes.split()}
    sizes = {"N": "i32", "C": "i32", "eps": "fp32"}
    if mode == "bwd":
        sizes |= {"n_splits": "i32", "rows_per_split": "i32"}
        block_n, block_c, num_warps, _ = _plan(shape)
    else:
        block_n, block_c, num_warps = tile(shape.n_channels, LIVE_ROWS[mode])
    room = "triton_backward" if mode == "bwd" else "triton"
    blocks = {"BLOCK_N": block_n, "BLOCK_C": block_c}
    return KernelSpec(
        kernel=f"disca_kernels.ops.gated_residual_adaln.{room}:_gated_residual_adaln_{mode}_kernel",
        signature={**pointers, **strides, **sizes},
        constexprs={
            **{f"p_{name}": None for name in operands if name in absent},
            **{"GATE_PER_TOKEN": shape.per_token, "PER_TOKEN": shape.per_token},
            **{"RMS": shape.rms, **blocks},
        },
        divisible=(*pointers, *strides, "C"),
        num_warps=num_warps,
        label=f"{shape}, without {without}" if without else str(shape),
    )


def _plan(shape: ModulatedShape) -> tuple[int, int, int, bool]:
    """Return how the backward pass is launched."""
    import torch

    from disca_kernels.ops.gated_residual_adaln.triton_backward import plan

    dtype = torch.float32 if shape.dtype == "fp32" else torch.bfloat16
    return plan(dtype, shape.n_channels)


def _backward(shape: ModulatedShape) -> list[KernelSpec]:
    """Return the launches of the backward pass."""
    if _plan(shape)[-1]:
        return [_spec("bwd", shape, part) for part in _PARTS]
    return [_spec("bwd", shape)]


def specs(arch: int) -> list[KernelSpec]:
    """Return what is checked for one compute capability (times ten)."""
    forward = [_spec(mode, shape) for mode in ("fwd", "jvp") for shape in _SHAPES]
    return forward + [spec for shape in _SHAPES for spec in _backward(shape)]
