# SPDX-License-Identifier: Apache-2.0
"""The specialisations of the swiglu kernels whose machine code is checked without a GPU."""

from disca_kernels.testing.codegen import KernelSpec

_POINTERS = {
    "fwd": "gate up gate_bias up_bias y",
    "bwd": "dy gate up gate_bias up_bias dgate dup dgate_bias dup_bias",
    "jvp": "gate up gate_bias up_bias gate_dot up_dot gate_bias_dot up_bias_dot y y_dot",
}
_STRIDES = {"fwd": "xb xn", "bwd": "yb yn xb xn", "jvp": "xb xn xdb xdn"}
_SHAPES = [("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")]


def _spec(mode: str, dtype: str, bias_dtype: str) -> KernelSpec:
    """Return one kernel as its launcher calls it."""
    from disca_kernels.triton_common.activation import NUM_WARPS, TILE_COLUMNS, TILE_ROWS

    def dtype_of(name: str) -> str:
        if "bias" not in name:
            return dtype
        return "fp32" if name.startswith("d") else bias_dtype

    pointers = {f"p_{n}": f"*{dtype_of(n)}" for n in _POINTERS[mode].split()}
    strides = dict.fromkeys((f"stride_{s}" for s in _STRIDES[mode].split()), "i32")
    own = ("n_splits", "rows_per_split") if mode == "bwd" else ()
    sizes = dict.fromkeys(("N", "M", *own), "i32")
    return KernelSpec(
        kernel=f"disca_kernels.ops.swiglu.triton:_swiglu_{mode}_kernel",
        signature={**pointers, **strides, **sizes},
        constexprs={"BLOCK_N": TILE_ROWS, "BLOCK_M": TILE_COLUMNS},
        divisible=(*pointers, *strides, "M"),
        num_warps=NUM_WARPS,
        label=f"x {dtype}, bias {bias_dtype}",
    )


def specs(arch: int) -> list[KernelSpec]:
    """Return what is checked for one compute capability (times ten)."""
    return [_spec(mode, *shape) for mode in _POINTERS for shape in _SHAPES]
