# SPDX-License-Identifier: Apache-2.0
"""The specialisations of the mean_velocity_step kernels that are compiled without a GPU."""

from disca_kernels.testing.codegen import KernelSpec

_POINTERS = {
    "fwd": "x u t r y",
    "bwd": "dy u t r du sum",
    "jvp": "x u t r x_dot u_dot t_dot r_dot y y_dot",
}
_STRIDES = {"fwd": "x u t r", "bwd": "y u t r", "jvp": "x u t r xd ud td rd"}
# A latent in float32 beside a network in bfloat16, and all of it in bfloat16.
_SHAPES = [("fp32", "bf16", "fp32"), ("bf16", "bf16", "fp64")]


def _spec(mode: str, dtype: str, u_dtype: str, time_dtype: str) -> KernelSpec:
    """Return one kernel as its launcher calls it."""
    from disca_kernels.ops.mean_velocity_step.triton import BLOCK, NUM_WARPS

    def dtype_of(name: str) -> str:
        if name == "sum":
            return "fp64"
        if name[0] in "tr":
            return time_dtype
        return u_dtype if name in ("u", "u_dot", "du") else dtype

    pointers = {f"p_{n}": f"*{dtype_of(n)}" for n in _POINTERS[mode].split()}
    strides = dict.fromkeys((f"stride_{s}" for s in _STRIDES[mode].split()), "i32")
    own = ("n_splits", "per_split") if mode == "bwd" else ()
    return KernelSpec(
        kernel=f"disca_kernels.ops.mean_velocity_step.triton:_mean_velocity_step_{mode}_kernel",
        signature={**pointers, **strides, **dict.fromkeys(("L", *own), "i32")},
        constexprs={"BLOCK": BLOCK},
        divisible=(*pointers, *strides, "L", *(("per_split",) if mode == "bwd" else ())),
        num_warps=NUM_WARPS[mode],
        label=f"x {dtype}, u {u_dtype}, times {time_dtype}",
    )


def specs(arch: int) -> list[KernelSpec]:
    """Return what is checked for one compute capability (times ten)."""
    return [_spec(mode, *shape) for mode in _POINTERS for shape in _SHAPES]
