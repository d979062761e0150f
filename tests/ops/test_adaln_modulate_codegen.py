# SPDX-License-Identifier: Apache-2.0
"""What the adaln_modulate kernels compile to for 8.0, 9.0 and 10.0, without a GPU."""

import pytest

pytest.importorskip("triton")

from disca_kernels.ops.adaln_modulate.triton import tile
from disca_kernels.testing.codegen import ARCHITECTURES, KernelSpec, compile_kernels

LIVE_ROWS = {"fwd": 3, "bwd": 6, "jvp": 5}
OPERANDS = {
    "fwd": {"x": "xb xn", "shift": "hb hn", "scale": "sb sn", "y": ""},
    "bwd": {"dy": "yb yn", "x": "xb xn", "scale": "sb sn", "dx": "", "dshift": "", "dscale": ""},
    "jvp": {
        **{"x": "xb xn", "shift": "hb hn", "scale": "sb sn"},
        **{
            "x_dot": "xdb xdn",
            "shift_dot": "hdb hdn",
            "scale_dot": "sdb sdn",
            "y": "",
            "y_dot": "",
        },
    },
}
# A HunyuanVideo block, and the widest row that is supported in the widest dtype.
SHAPES = [
    ("bf16", "bf16", 3072, False),
    ("fp32", "fp32", 8192, False),
    ("bf16", "fp32", 8192, True),
]


def spec(mode: str, dtype: str, modulation_dtype: str, n_channels: int, per_token: bool):
    def dtype_of(name: str) -> str:
        if mode == "bwd" and name in ("dshift", "dscale") and not per_token:
            return "fp32"
        return modulation_dtype if name.removeprefix("d").startswith(("sh", "sc")) else dtype

    pointers = {f"p_{name}": f"*{dtype_of(name)}" for name in OPERANDS[mode]}
    strides = {
        f"stride_{s}": "i32" for suffixes in OPERANDS[mode].values() for s in suffixes.split()
    }
    sizes = {"N": "i32", "C": "i32", "eps": "fp32"}
    if mode == "bwd":
        sizes |= {"n_splits": "i32", "rows_per_split": "i32"}
    block_n, block_c, num_warps = tile(n_channels, LIVE_ROWS[mode])
    return KernelSpec(
        kernel=f"disca_kernels.ops.adaln_modulate.triton:_adaln_modulate_{mode}_kernel",
        signature={**pointers, **strides, **sizes},
        constexprs={"PER_TOKEN": per_token, "BLOCK_N": block_n, "BLOCK_C": block_c},
        divisible=(*pointers, *strides, "C"),
        num_warps=num_warps,
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_spill_nothing_and_move_16_bytes_at_a_time(arch):
    reports = compile_kernels([spec(mode, *s) for mode in OPERANDS for s in SHAPES], [arch])
    for report in reports:
        assert report.spills == report.stack_bytes == report.local_bytes == 0, report
        for kind in ("LDG", "STG"):
            assert report.count(rf"{kind}\.(.*\.)?128") == report.count(kind) > 0, report
