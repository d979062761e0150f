# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of adaln_modulate: each instruction set, and what they refuse to read."""

import pytest
import torch

from disca_kernels import _ext, adaln_modulate, adaln_modulate_jvp
from disca_kernels.ops.adaln_modulate.cases import AdalnModulateCase, adaln_modulate_in_dtype
from disca_kernels.ops.adaln_modulate.reference import adaln_modulate_reference
from tests.ops import instruction_sets

pytestmark = pytest.mark.skipif(_ext.why_not() is not None, reason="disca_kernels._C was not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("isa", instruction_sets.ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_channels", [3, 16, 37, 96])
@pytest.mark.parametrize("per_token", [False, True])
def test_every_instruction_set(monkeypatch, per_token, n_channels, dtype, isa):
    instruction_sets.use(monkeypatch, isa)
    case = AdalnModulateCase(24, 5, n_channels, dtype=dtype, affine=True, per_token=per_token)
    instruction_sets.check(
        adaln_modulate_jvp, adaln_modulate_reference, adaln_modulate_in_dtype, case
    )


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("DISCA_CPU_ISA", "mmx")
    primals = AdalnModulateCase(1, 2, 8).operands().primals[:3]
    with pytest.raises(ValueError, match=r"DISCA_CPU_ISA must be one of .*baseline here, got mmx"):
        adaln_modulate(*primals, backend="cpu")


@pytest.mark.parametrize("isa", instruction_sets.ISAS)
def test_bfloat16_is_rounded_as_torch_rounds(monkeypatch, isa):
    """Ties, the largest number, infinity, subnormals and NaN, in whole vectors and the rest."""
    instruction_sets.use(monkeypatch, isa)
    special = [1.00390625, 1.01171875, 3.4e38, 1e-40, float("inf"), -float("inf"), float("nan")]
    shift = torch.tensor(special * 3)[None]
    zeros = torch.zeros(1, 1, shift.shape[1], dtype=torch.bfloat16)
    y = adaln_modulate(zeros, shift, torch.zeros_like(shift), backend="cpu")
    assert torch.equal(y[0, 0].isnan(), shift[0].isnan())
    assert torch.equal(y[0, 0].nan_to_num(7), shift[0].bfloat16().nan_to_num(7))


ROWS = (64, 8, 8)
FORWARD = {
    **{"shape": (1, 2, 8), "norm": (1e-6, False), "dtypes": ("float32",) * 3, "threads": 1},
    **{"operands": (ROWS, ROWS, ROWS, None, None), "y": 64},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operands": ((0, 8, 8), ROWS, ROWS, None, None)}, "x has address 0 for 2 rows"),
        ({"operands": (ROWS, ROWS, (0, 8, 8), None, None)}, "scale has address 0 for 2 rows"),
        ({"operands": (ROWS, None, ROWS, None, None)}, "shift must be .*got None"),
        ({"y": 0}, "y has address 0 for 2 rows"),
        ({"shape": (1, -2, 8)}, r"shape must be .*got \[1, -2, 8\]"),
        ({"shape": (1, 2, 0)}, r"C > 0\], got \[1, 2, 0\]"),
        ({"dtypes": ("int8",) * 3}, "got int8"),
        (
            {"dtypes": ("bfloat16", "float16", "bfloat16")},
            "shift must be float32 or have the dtype of the tokens, bfloat16, got float16",
        ),
    ],
)
def test_native_code_checks_what_it_would_read(change, message):
    with pytest.raises(ValueError, match=message):
        _ext.load().adaln_modulate_fwd_cpu(**(FORWARD | change))
