# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import Tensor

from disca_kernels.testing import assert_within_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def results(dtype: torch.dtype, size: int = 4096) -> tuple[Tensor, Tensor, Tensor]:
    """Return a float64 result, the same rounded once, and the same computed in small errors."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(size // 64, 64, generator=generator, dtype=torch.float64)
    wobble = torch.randn(reference.shape, generator=generator, dtype=torch.float64)
    eager = (reference * (1 + torch.finfo(dtype).eps * wobble / 4)).to(dtype)
    return reference, reference.to(dtype), eager


@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_on_honest_rounding(dtype):
    reference, rounded, eager = results(dtype)
    budget = assert_within_budget(rounded, reference, eager, name="rounded")
    assert 0 < budget.max_error <= budget.max_allowed
    assert 0 < budget.rms_error < budget.rms_allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_on_one_rounding_where_eager_is_exact(dtype):
    reference = torch.linspace(1, 2, 1000, dtype=torch.float64).to(dtype).double()
    spacing = torch.finfo(dtype).eps / 2
    assert_within_budget(
        (reference * (1 - spacing / 2)).to(dtype), reference, reference.to(dtype), name="exact"
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_fails_on_one_wrong_element(dtype):
    reference, actual, eager = results(dtype)
    actual[17, 5] += 8 * torch.finfo(dtype).eps * reference.abs().max()
    with pytest.raises(AssertionError, match=r"y: error above its budget") as failure:
        assert_within_budget(actual, reference, eager, name="y")
    assert "1 of 4096 elements" in str(failure.value)
    assert f"at [17, 5]: got {actual[17, 5].item():.8g}" in str(failure.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fails_on_a_sign_flip(dtype):
    reference, actual, eager = results(dtype)
    actual[3, 3] = -actual[3, 3]
    with pytest.raises(AssertionError, match=r"1 of 4096 elements"):
        assert_within_budget(actual, reference, eager, name="y")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf"])
def test_fails_on_a_non_finite_element(dtype, kind):
    reference, actual, eager = results(dtype)
    actual[0, 1] = float(kind)
    with pytest.raises(AssertionError, match=r"infinity where eager has none.*\n.*1 of 4096"):
        assert_within_budget(actual, reference, eager, name="y")


@pytest.mark.parametrize("dtype", DTYPES)
def test_fails_on_a_finite_element_where_eager_has_a_nan(dtype):
    reference, actual, eager = results(dtype)
    reference[0, 1] = eager[0, 1] = float("nan")
    with pytest.raises(AssertionError, match="or the reverse"):
        assert_within_budget(actual, reference, eager, name="y")
    actual[0, 1] = float("inf")
    with pytest.raises(AssertionError, match="or the reverse"):
        assert_within_budget(actual, reference, eager, name="y")
    actual[0, 1] = float("nan")
    assert_within_budget(actual, reference, eager, name="y")


def test_fails_when_eager_hides_a_non_finite_reference():
    reference, actual, eager = results(torch.float32)
    reference[2, 2] = float("inf")
    with pytest.raises(AssertionError, match="eager is finite where the reference is not"):
        assert_within_budget(actual, reference, eager, name="y")


def test_passes_on_an_overflow_that_eager_has_too():
    reference, actual, eager = results(torch.float16)
    reference[2, 2], actual[2, 2], eager[2, 2] = 1e6, float("inf"), float("inf")
    assert_within_budget(actual, reference, eager, name="y")
    actual[2, 2] = float("-inf")
    with pytest.raises(AssertionError, match="NaN or infinity"):
        assert_within_budget(actual, reference, eager, name="y")


@pytest.mark.parametrize("dtype", DTYPES)
def test_fails_on_a_bias_too_small_for_the_maximum(dtype):
    reference, _, eager = results(dtype)
    bias = 0.5 * (eager.double() - reference).abs().max()
    with pytest.raises(AssertionError, match=r"rms error .* mean error \+"):
        assert_within_budget((reference + 2 * bias).to(dtype), reference, eager, name="y")


@pytest.mark.parametrize("dtype", DTYPES)
def test_fails_on_zeros(dtype):
    reference, actual, eager = results(dtype)
    with pytest.raises(AssertionError, match="error above its budget"):
        assert_within_budget(torch.zeros_like(actual), reference, eager, name="y")


def test_fails_on_a_wrong_dtype():
    reference, actual, eager = results(torch.float32)
    with pytest.raises(AssertionError, match=r"y: dtype torch.bfloat16, eager has torch.float32"):
        assert_within_budget(actual.bfloat16(), reference, eager, name="y")


def test_fails_on_a_wrong_shape():
    reference, actual, eager = results(torch.float32)
    with pytest.raises(AssertionError, match=r"y: shape \(64, 63\), the reference has \(64, 64\)"):
        assert_within_budget(actual[:, :-1], reference, eager, name="y")
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(actual.flatten(), reference, eager, name="y")


def test_refuses_a_comparison_that_cannot_fail():
    reference, actual, eager = results(torch.float32)
    with pytest.raises(ValueError, match=r"must be float64, got torch\.float32"):
        assert_within_budget(actual, reference.float(), eager, name="y")
    with pytest.raises(ValueError, match="one tensor"):
        assert_within_budget(eager, reference, eager, name="y")


def test_factor_scales_the_allowance():
    reference, _, eager = results(torch.float32)
    worse = (reference + 3 * (eager.double() - reference)).float()
    with pytest.raises(AssertionError, match="2 eager errors"):
        assert_within_budget(worse, reference, eager, name="y")
    assert_within_budget(worse, reference, eager, name="y", factor=4.0)


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_passes_on_nothing(shape):
    empty = torch.empty(shape)
    assert_within_budget(empty, empty.double(), empty.clone(), name="y")
