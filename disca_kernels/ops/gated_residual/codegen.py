# SPDX-License-Identifier: Apache-2.0
"""The specialisations of the gated_residual kernels whose machine code is checked without a GPU."""

from disca_kernels.testing.codegen import KernelSpec

# The operands of each kernel and the suffixes of their strides.
_OPERANDS = {
    "fwd": {"x": "xb xn", "y": "yb yn", "gate": "gb gn", "out": ""},
    "bwd": {"dout": "ob on", "y": "yb yn", "gate": "gb gn", "dy": "", "dgate": "", "sum": ""},
    "jvp": {
        **{"x": "xb xn", "y": "yb yn", "gate": "gb gn"},
        **{"x_dot": "xdb xdn", "y_dot": "ydb ydn", "gate_dot": "gdb gdn"},
        **{"out": "", "out_dot": ""},
    },
}
# A HunyuanVideo block, alike in float32, and a gate for each token.
_SHAPES = [
    ("bf16", "bf16", 3072, False),
    ("bf16", "fp32", 3072, False),
    ("fp32", "fp32", 3072, False),
    ("bf16", "fp32", 1536, True),
]


def _spec(mode: str, dtype: str, gate_dtype: str, n_channels: int, per_token: bool) -> KernelSpec:
    """Return one kernel as its launcher calls it."""
    from disca_kernels.ops.gated_residual.triton import tile

    def dtype_of(name: str) -> str:
        if name == "sum":
            return "fp32"
        return gate_dtype if "gate" in name else dtype

    absent = {"sum" if per_token else "dgate"}
    operands = _OPERANDS[mode]
    pointers = {f"p_{name}": f"*{dtype_of(name)}" for name in operands if name not in absent}
    strides = {f"stride_{s}": "i32" for suffixes in operands.values() for s in suffixes.split()}
    sizes = {"N": "i32", "C": "i32"}
    if mode == "bwd":
        sizes |= {"n_splits": "i32", "rows_per_split": "i32"}
    block_n, block_c, num_warps = tile(n_channels)
    kind = "per token" if per_token else "per sample"
    return KernelSpec(
        kernel=f"disca_kernels.ops.gated_residual.triton:_gated_residual_{mode}_kernel",
        signature={**pointers, **strides, **sizes},
        constexprs={
            **{f"p_{name}": None for name in operands if name in absent},
            **{"PER_TOKEN": per_token, "BLOCK_N": block_n, "BLOCK_C": block_c},
        },
        divisible=(*pointers, *strides, "C"),
        num_warps=num_warps,
        label=f"x {dtype}, gate {gate_dtype} {kind}, C={n_channels}",
    )


def specs(arch: int) -> list[KernelSpec]:
    """Return what is checked for one compute capability (times ten)."""
    return [_spec(mode, *shape) for mode in _OPERANDS for shape in _SHAPES]
