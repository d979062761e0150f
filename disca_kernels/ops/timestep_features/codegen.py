# SPDX-License-Identifier: Apache-2.0
"""The specialisations of the timestep_features kernels that are compiled without a GPU."""

from disca_kernels.testing.codegen import KernelSpec

_COMMON = {"p_t": "*fp32", "p_freqs": "*fp32", "stride_t": "i32", "HALF": "i32", "scale": "fp32"}
_MORE = {
    "fwd": {"p_features": "*fp32", "DIM": "i32"},
    "jvp": {
        **dict.fromkeys(("p_t_dot", "p_width", "p_features", "p_features_dot"), "*fp32"),
        **dict.fromkeys(("stride_t_dot", "stride_width", "DIM"), "i32"),
        "width": "fp32",
    },
    "bwd": {"p_dfeatures": "*fp32", "p_dt": "*fp32", "stride_db": "i32", "stride_df": "i32"},
}


def specs(arch: int) -> list[KernelSpec]:
    """Return what is checked for one compute capability (times ten)."""
    return [
        KernelSpec(
            kernel=f"disca_kernels.ops.timestep_features.triton:_timestep_features_{mode}_kernel",
            signature={**_COMMON, **more},
            constexprs={"BLOCK": 128},
            num_warps=1,
            label="fp32, 256 features",
        )
        for mode, more in _MORE.items()
    ]
