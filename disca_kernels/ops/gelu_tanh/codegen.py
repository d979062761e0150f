# SPDX-License-Identifier: Apache-2.0
"""The specialisations of the gelu_tanh kernels whose machine code is checked without a GPU."""

from disca_kernels.testing.codegen import KernelSpec

_POINTERS = {
    "fwd": "x bias prefix y",
    "bwd": "dy x bias dx dbias",
    "jvp": "x bias prefix x_dot bias_dot prefix_dot y y_dot",
}
_STRIDES = {
    "fwd": "xb xn pb ph pn yn",
    "bwd": "yb yn xb xn",
    "jvp": "xb xn pb ph pn xdb xdn pdb pdh pdn yn",
}
# HunyuanVideo's single-stream and double-stream blocks, and float32.
_SHAPES = [("bf16", "bf16", True), ("bf16", "fp32", False), ("fp32", "fp32", True)]


def _spec(mode: str, dtype: str, bias_dtype: str, prefixed: bool) -> KernelSpec:
    """Return one kernel as its launcher calls it."""
    from disca_kernels.triton_common.activation import NUM_WARPS, TILE_COLUMNS, TILE_ROWS

    def dtype_of(name: str) -> str:
        if name == "dbias":
            return "fp32"
        return bias_dtype if name.startswith("bias") else dtype

    names = _POINTERS[mode].split()
    absent = [n for n in names if n.startswith("prefix") and not prefixed]
    pointers = {f"p_{n}": f"*{dtype_of(n)}" for n in names if n not in absent}
    strides = dict.fromkeys((f"stride_{s}" for s in _STRIDES[mode].split()), "i32")
    own = ("n_splits", "rows_per_split") if mode == "bwd" else ("D", "P")
    sizes = dict.fromkeys(("N", "M", *own), "i32")
    aligned = ("M",) if mode == "bwd" else ("M", "D", "P")
    return KernelSpec(
        kernel=f"disca_kernels.ops.gelu_tanh.triton:_gelu_tanh_{mode}_kernel",
        signature={**pointers, **strides, **sizes},
        constexprs={
            **{f"p_{n}": None for n in absent},
            **{"BLOCK_N": TILE_ROWS, "BLOCK_M": TILE_COLUMNS},
        },
        divisible=(*pointers, *strides, *aligned),
        num_warps=NUM_WARPS,
        label=f"x {dtype}, bias {bias_dtype}" + ", prefix" * prefixed,
    )


def specs(arch: int) -> list[KernelSpec]:
    """Return what is checked for one compute capability (times ten)."""
    return [_spec(mode, *shape) for mode in _POINTERS for shape in _SHAPES]
