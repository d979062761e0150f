# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of adaln_modulate: each instruction set, and what they refuse to read."""

import pytest
import torch

from disca_kernels import _ext, adaln_modulate, adaln_modulate_jvp
from disca_kernels.ops.adaln_modulate.cases import AdalnModulateCase, adaln_modulate_in_dtype
from disca_kernels.ops.adaln_modulate.reference import (
    adaln_modulate_jvp_reference,
    adaln_modulate_reference,
)
from disca_kernels.testing import assert_within_budget

pytestmark = pytest.mark.skipif(_ext.why_not() is not None, reason="disca_kernels._C was not built")

ISAS = ("baseline", "avx2", "avx512")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def use_isa(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setenv("DISCA_CPU_ISA", isa)
    try:
        adaln_modulate(torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1), backend="cpu")
    except ValueError:
        pytest.skip(f"this processor or this build has no {isa}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_channels", [3, 16, 37, 96])
def test_every_instruction_set(monkeypatch, n_channels, dtype, isa):
    use_isa(monkeypatch, isa)
    case = AdalnModulateCase(2, 5, n_channels, dtype=dtype, affine=True)
    primals, tangents, (cotangent,) = case.operands()
    leaves = [t.detach().requires_grad_() for t in primals]
    y, y_dot = adaln_modulate_jvp(tuple(leaves), tangents, backend="cpu")
    gradients = torch.autograd.grad(y, leaves, cotangent)
    wide = [t.double().requires_grad_() for t in primals]
    wide_y, wide_dot = adaln_modulate_jvp_reference(wide, [t.double() for t in tangents])
    same = [t.detach().requires_grad_() for t in primals]
    eager, eager_dot = torch.func.jvp(adaln_modulate_in_dtype, tuple(same), tangents)
    assert_within_budget(y, wide_y, eager, name="y")
    assert_within_budget(y_dot, wide_dot, eager_dot, name="y_dot")
    wide_gradients = torch.autograd.grad(adaln_modulate_reference(*wide), wide, cotangent.double())
    eager_gradients = torch.autograd.grad(adaln_modulate_in_dtype(*same), same, cotangent)
    names = ("x", "shift", "scale", "weight", "bias")
    for name, ours, exact, theirs in zip(
        names, gradients, wide_gradients, eager_gradients, strict=True
    ):
        assert_within_budget(ours, exact, theirs, name=f"d{name}")


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("DISCA_CPU_ISA", "mmx")
    primals = AdalnModulateCase(1, 2, 8).operands().primals[:3]
    with pytest.raises(ValueError, match=r"DISCA_CPU_ISA must be one of .*baseline here, got mmx"):
        adaln_modulate(*primals, backend="cpu")


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_is_rounded_as_torch_rounds(monkeypatch, isa):
    """Ties, the largest number, infinity, subnormals and NaN, in whole vectors and the rest."""
    use_isa(monkeypatch, isa)
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
