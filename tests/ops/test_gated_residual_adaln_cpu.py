# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of gated_residual_adaln: each instruction set, and what they refuse to read."""

import pytest
import torch

from disca_kernels import _ext, gated_residual_adaln_jvp
from disca_kernels.ops.gated_residual_adaln.cases import (
    GatedResidualAdalnCase,
    gated_residual_adaln_in_dtype,
)
from disca_kernels.ops.gated_residual_adaln.reference import gated_residual_adaln_reference
from tests.ops import instruction_sets

pytestmark = pytest.mark.skipif(_ext.why_not() is not None, reason="disca_kernels._C was not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("isa", instruction_sets.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_channels", [3, 16, 37, 96])
@pytest.mark.parametrize("per_token", [False, True])
def test_every_instruction_set(monkeypatch, per_token, n_channels, dtype, isa):
    instruction_sets.use(monkeypatch, isa)
    case = GatedResidualAdalnCase(
        24, 5, n_channels, dtype=dtype, affine=True, per_token=per_token, gate_per_token=per_token
    )
    instruction_sets.check(
        gated_residual_adaln_jvp,
        gated_residual_adaln_reference,
        gated_residual_adaln_in_dtype,
        case,
    )


ROWS = (64, 8, 8)
FORWARD = {
    **{"shape": (1, 2, 8), "norm": (1e-6, False), "dtypes": ("float32",) * 4, "threads": 1},
    **{"operands": (ROWS, ROWS, ROWS, ROWS, ROWS, None, None), "outputs": (64, 64)},
}
BACKWARD = {
    **{"shape": (1, 2, 8), "norm": (1e-6, False), "dtypes": ("float32",) * 4, "threads": 1},
    **{"per_token": (False, False), "cotangents": (ROWS, None)},
    **{"saved": (ROWS, ROWS, ROWS, ROWS, None, None), "gradients": (0, 0, 0, 64, 64, 0, 0)},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operands": (ROWS, ROWS, None, ROWS, ROWS, None, None)}, "gate must be .*got None"),
        ({"outputs": (64, 0)}, "h has address 0 for 2 rows"),
        ({"dtypes": ("bfloat16", "float32", "float16", "float32")}, "shift must .*got float16"),
    ],
)
def test_native_code_checks_what_it_would_read(change, message):
    with pytest.raises(ValueError, match=message):
        _ext.load().gated_residual_adaln_fwd_cpu(**(FORWARD | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "gradients of the modulation need dh, got None"),
        ({"cotangents": (None, None)}, "dx_new or dh must be given, got None for both"),
    ],
)
def test_native_gradients_need_a_cotangent(change, message):
    with pytest.raises(ValueError, match=message):
        _ext.load().gated_residual_adaln_bwd_cpu(**(BACKWARD | change))
