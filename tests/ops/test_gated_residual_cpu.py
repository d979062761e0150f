# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of gated_residual: each instruction set, and what they refuse to read."""

import pytest
import torch

from disca_kernels import _ext, gated_residual_jvp
from disca_kernels.ops.gated_residual.cases import (
    GatedResidualCase,
    gated_residual_in_dtype,
)
from disca_kernels.ops.gated_residual.reference import gated_residual_reference
from tests.ops import instruction_sets

pytestmark = pytest.mark.skipif(_ext.why_not() is not None, reason="disca_kernels._C was not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("isa", instruction_sets.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_channels", [3, 16, 37, 96])
@pytest.mark.parametrize("per_token", [False, True])
def test_every_instruction_set(monkeypatch, per_token, n_channels, dtype, isa):
    instruction_sets.use(monkeypatch, isa)
    case = GatedResidualCase(24, 5, n_channels, dtype=dtype, per_token=per_token)
    instruction_sets.check(
        gated_residual_jvp, gated_residual_reference, gated_residual_in_dtype, case
    )


ROWS = (64, 8, 8)
FORWARD = {
    **{"shape": (1, 2, 8), "dtypes": ("float32",) * 2, "threads": 1},
    **{"operands": (ROWS, ROWS, ROWS), "out": 64},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operands": ((0, 8, 8), ROWS, ROWS)}, "x has address 0 for 2 rows"),
        ({"operands": (ROWS, None, ROWS)}, "y must be .*got None"),
        ({"operands": (ROWS, ROWS, None)}, "gate must be .*got None"),
        ({"out": 0}, "out has address 0 for 2 rows"),
        ({"shape": (1, 2, 0)}, r"C > 0\], got \[1, 2, 0\]"),
        ({"dtypes": ("bfloat16", "float16")}, "gate must be float32 .*bfloat16, got float16"),
    ],
)
def test_native_code_checks_what_it_would_read(change, message):
    with pytest.raises(ValueError, match=message):
        _ext.load().gated_residual_fwd_cpu(**(FORWARD | change))
