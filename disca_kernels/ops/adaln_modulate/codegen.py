# SPDX-License-Identifier: Apache-2.0
"""The specialisations of the adaln_modulate kernels whose machine code is checked without a GPU."""

from disca_kernels.testing.codegen import KernelSpec

# Rows that a kernel keeps in registers, and the strides of its operands by their suffixes.
_LIVE_ROWS = {"fwd": 3, "bwd": 6, "jvp": 5}
_PRIMALS = {"x": "xb xn", "shift": "hb hn", "scale": "sb sn"}
_OPERANDS = {
    "fwd": {**_PRIMALS, "y": ""},
    "bwd": {"dy": "yb yn", "x": "xb xn", "scale": "sb sn", "dx": "", "dshift": "", "dscale": ""},
    "jvp": {
        **_PRIMALS,
        **{"x_dot": "xdb xdn", "shift_dot": "hdb hdn", "scale_dot": "sdb sdn"},
        **{"y": "", "y_dot": ""},
    },
}
# A HunyuanVideo block, and the widest row that is supported in the widest dtype.
_SHAPES = [
    ("bf16", "bf16", 3072, False),
    ("fp32", "fp32", 8192, False),
    ("bf16", "fp32", 8192, True),
]


def _spec(
    mode: str, dtype: str, modulation_dtype: str, n_channels: int, per_token: bool
) -> KernelSpec:
    """Return one kernel as its launcher calls it."""
    from disca_kernels.ops.adaln_modulate.triton import tile

    def dtype_of(name: str) -> str:
        if mode == "bwd" and name in ("dshift", "dscale") and not per_token:
            return "fp32"
        return modulation_dtype if name.removeprefix("d").startswith(("sh", "sc")) else dtype

    operands = _OPERANDS[mode]
    pointers = {f"p_{name}": f"*{dtype_of(name)}" for name in operands}
    strides = {f"stride_{s}": "i32" for suffixes in operands.values() for s in suffixes.split()}
    sizes = {"N": "i32", "C": "i32", "eps": "fp32"}
    if mode == "bwd":
        sizes |= {"n_splits": "i32", "rows_per_split": "i32"}
    block_n, block_c, num_warps = tile(n_channels, _LIVE_ROWS[mode])
    kind = "per token" if per_token else "per sample"
    return KernelSpec(
        kernel=f"disca_kernels.ops.adaln_modulate.triton:_adaln_modulate_{mode}_kernel",
        signature={**pointers, **strides, **sizes},
        constexprs={"PER_TOKEN": per_token, "BLOCK_N": block_n, "BLOCK_C": block_c},
        divisible=(*pointers, *strides, "C"),
        num_warps=num_warps,
        label=f"x {dtype}, modulation {modulation_dtype} {kind}, C={n_channels}",
    )


def specs(arch: int) -> list[KernelSpec]:
    """Return what is checked for one compute capability (times ten)."""
    return [_spec(mode, *shape) for mode in _OPERANDS for shape in _SHAPES]
