# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import Tensor

from disca_kernels.testing.gradients import central_difference, check_backward, check_jvp


def reference(x: Tensor, y: Tensor) -> Tensor:
    return torch.sin(x) * y


class Wrong(torch.autograd.Function):
    """The reference's value with a slightly wrong gradient."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return reference(x, y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d):
        x, y = ctx.saved_tensors
        return d * torch.cos(x) * y * 1.001, d * torch.sin(x)


def right_jvp(primals, tangents):
    (x, y), (x_dot, y_dot) = primals, tangents
    tangent = torch.zeros_like(x)
    if x_dot is not None:
        tangent = tangent + torch.cos(x) * y * x_dot
    if y_dot is not None:
        tangent = tangent + torch.sin(x) * y_dot
    return reference(x, y), tangent


@pytest.fixture
def primals() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 5, generator=generator), torch.randn(7, 5, generator=generator)


def test_check_backward(primals):
    cotangent = torch.linspace(-1, 1, 35).reshape(7, 5)
    budgets = check_backward(lambda x, y: y * x.sin(), reference, primals, cotangent, name="f")
    assert [b.max_error <= b.max_allowed for b in budgets] == [True, True]
    with pytest.raises(AssertionError, match="f d0: error above its budget"):
        check_backward(Wrong.apply, reference, primals, cotangent, name="f")


def test_check_backward_does_not_trust_the_reference(primals):
    with pytest.raises(AssertionError, match="f d0: differs from central differences"):
        check_backward(Wrong.apply, Wrong.apply, primals, torch.ones(7, 5), name="f")


@pytest.mark.parametrize("absent", [(), (0,), (1,), (0, 1)])
def test_check_jvp(primals, absent):
    tangents = [None if i in absent else torch.full((7, 5), 0.3) for i in range(2)]
    value, tangent = check_jvp(right_jvp, reference, primals, tangents, name="f")
    assert value.max_error <= value.max_allowed
    assert tangent.max_error <= tangent.max_allowed


def test_check_jvp_fails_on_a_wrong_tangent(primals):
    def wrong(primals, tangents):
        value, tangent = right_jvp(primals, tangents)
        return value, 1.001 * tangent

    with pytest.raises(AssertionError, match="f tangent: error above its budget"):
        check_jvp(wrong, reference, primals, [torch.ones(7, 5)] * 2, name="f")


def test_central_difference(primals):
    x, y = (t.double() for t in primals)
    estimate = central_difference(reference, (x, y), (torch.ones_like(x), None))
    assert (estimate - torch.cos(x) * y).abs().max() < 1e-9
    with pytest.raises(ValueError, match=r"primal 1 must be float64, got torch\.float32"):
        central_difference(reference, (x, y.float()), (None, None))
