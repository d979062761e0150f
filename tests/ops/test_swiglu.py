# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from disca_kernels import swiglu, swiglu_jvp
from disca_kernels.ops.swiglu.cases import SwigluCase, swiglu_in_dtype
from disca_kernels.ops.swiglu.reference import swiglu_jvp_reference, swiglu_reference
from disca_kernels.testing import assert_within_budget
from tests.ops.battery import DEVICE, Battery, Subject, backends

OP = "swiglu"
BACKENDS, KERNELS = backends(OP), backends(OP, kernels_only=True)
BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64


class TestSwiglu(Battery):
    # Widths on both sides of a vector and of a tile.
    subject = Subject(
        OP,
        swiglu,
        swiglu_jvp,
        swiglu_reference,
        [
            SwigluCase(2, 5, 24),
            SwigluCase(2, 5, 33, gate_first=False),
            SwigluCase(3, 9, 515, biased=False),
            SwigluCase(1, 1, 1),
            SwigluCase(2, 7, 64, BF16),
            SwigluCase(2, 19, 50, BF16, wide=True, gate_first=False),
            SwigluCase(2, 7, 33, FP16, biased=False),
            SwigluCase(2, 9, 40, FP16, wide=True),
            SwigluCase(2, 200, 70),
        ],
    )


@pytest.mark.parametrize("gate_first", [True, False])
def test_reference_is_what_layers_write(gate_first):
    case = SwigluCase(2, 5, 24, FP64, gate_first=gate_first)
    primals = case.operands().primals
    expected = swiglu_in_dtype(*primals, **case.options)
    assert torch.equal(swiglu_reference(*primals, **case.options), expected)
    first, second = sum(primals).chunk(2, -1)
    gate, up = (first, second) if gate_first else (second, first)
    torch.testing.assert_close(expected, gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize("gate_first", [True, False])
def test_closed_formula_of_the_reference(gate_first):
    case = SwigluCase(2, 5, 24, FP64, gate_first=gate_first)
    primals, tangents, _ = case.operands()

    def of(*operands):
        return swiglu_reference(*operands, gate_first)

    expected = torch.func.jvp(of, primals, tangents)
    torch.testing.assert_close(swiglu_jvp_reference(primals, tangents, gate_first), expected)


def test_gradcheck_of_the_reference():
    primals = SwigluCase(1, 2, 3, FP64).operands().primals
    leaves = [t.detach().clone().requires_grad_() for t in primals]
    assert torch.autograd.gradcheck(swiglu_reference, leaves, check_forward_ad=True)


def _pair(gate, backend):
    """Value, gradient and tangent of a gate beside an up of ones, for a direction of ones."""
    leaf = gate[None, None].clone().requires_grad_()
    x = torch.cat((leaf, torch.ones_like(leaf)), -1)
    direction = torch.cat((torch.ones_like(leaf), torch.zeros_like(leaf)), -1)
    y, y_dot = swiglu_jvp((x,), (direction.detach(),), backend=backend)
    (dgate,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return y.detach()[0, 0], dgate[0, 0], y_dot[0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_whole_range(dtype, backend):
    gate = torch.linspace(-140, 140, 6001, device=DEVICE).to(dtype)
    exact = gate.double().requires_grad_()
    expected = torch.nn.functional.silu(exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    leaf = gate.clone().requires_grad_()
    eager = torch.nn.functional.silu(leaf)
    (eager_slope,) = torch.autograd.grad(eager.sum(), leaf)
    y, dgate, y_dot = _pair(gate, backend)
    assert_within_budget(y, expected, eager.detach(), name="value")
    assert_within_budget(dgate, slope, eager_slope, name="gradient")
    assert_within_budget(y_dot, slope, eager_slope.clone(), name="tangent")


@pytest.mark.parametrize("kernel", KERNELS)
def test_left_tail_keeps_its_digits(kernel):
    gate = torch.linspace(-80, -5, 101, device=DEVICE)
    wide = gate.double().requires_grad_()
    expected = torch.nn.functional.silu(wide)
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    for actual, exact in zip(_pair(gate, kernel), (expected, slope, slope), strict=True):
        torch.testing.assert_close(actual.double(), exact.detach(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_overflows(kernel):
    gate = torch.tensor([130.0, 1e4, 1e13, 2e19, 3e38], device=DEVICE)
    ones = torch.ones_like(gate)
    y, dgate, y_dot = _pair(gate, kernel)
    assert torch.equal(y, gate)
    assert torch.equal(dgate, ones)
    assert torch.equal(y_dot, ones)
    for result in _pair(-gate, kernel):
        assert torch.equal(result, 0 * ones)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_alone(backend):
    gate = torch.linspace(-2, 2, 40, device=DEVICE)
    expected = _pair(gate, backend)
    gate[7] = math.nan
    for actual, clean in zip(_pair(gate, backend), expected, strict=True):
        assert actual[7].isnan()
        actual[7] = clean[7]
        assert torch.equal(actual, clean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_empty(shape, backend):
    primals, tangents, cotangents = SwigluCase(*shape).operands(device=DEVICE)
    leaves = [t.detach().requires_grad_() for t in primals]
    y, y_dot = swiglu_jvp(leaves, tangents, backend=backend)
    assert y.shape == y_dot.shape == shape
    gradients = torch.autograd.grad(y, leaves, cotangents)
    assert [g.shape for g in gradients] == [t.shape for t in primals]
    assert torch.equal(gradients[1], torch.zeros_like(gradients[1]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_elements_beyond_the_reach_of_32_bits(kernel):
    """Two samples 2^31 elements apart; only the pages that are touched exist."""
    apart = 2**31
    storage = torch.empty(apart + 64, dtype=BF16, device=DEVICE)
    x = storage.as_strided((2, 2, 32), (apart, 32, 1))
    plain = SwigluCase(2, 2, 16, BF16).operands(device=DEVICE).primals[0]
    x.copy_(plain)
    assert torch.equal(swiglu(x, backend=kernel), swiglu(plain, backend=kernel))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 8),), r"x must be \[B, N, 2M\] with at least one channel, got \[2, 8\]"),
        (((2, 3, 0),), r"at least one channel, got \[2, 3, 0\]"),
        (((2, 3, 7),), r"gate and up side by side, got \[2, 3, 7\] of odd width"),
        (((2, 3, 8), (4,)), r"bias must be \[2M\] = \[8\] for x \[2, 3, 8\], got \[4\]"),
    ],
)
def test_rejects_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        swiglu(*(torch.zeros(s) for s in shapes))


def test_rejects_dtypes_devices_and_what_is_no_tensor():
    x = torch.zeros(2, 3, 8)
    with pytest.raises(TypeError, match=r"x must be one of .*, got torch\.int32"):
        swiglu(x.int())
    with pytest.raises(TypeError, match=r"bias must have the dtype of x \(torch\.float32\) or"):
        swiglu(x, torch.zeros(8, dtype=BF16))
    with pytest.raises(ValueError, match="bias is on meta, x is on cpu"):
        swiglu(x, torch.zeros(8, device="meta"))
    with pytest.raises(TypeError, match="x must be a tensor, got float"):
        swiglu(1.0)
    with pytest.raises(TypeError, match="bias must be a tensor or None, got float"):
        swiglu(x, 1.0)
    with pytest.raises(TypeError, match="gate_first must be a bool, got int"):
        swiglu(x, gate_first=1)


def test_rejects_tangents():
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match="bias_dot was given without bias"):
        swiglu_jvp((x,), (x, torch.zeros(8)))
    with pytest.raises(ValueError, match=r"x_dot must match x \[2, 3, 8\].*got \[2, 3, 7\]"):
        swiglu_jvp((x,), (x[..., 1:],))
    with pytest.raises(ValueError, match="1 to 2 primals are needed, got 3"):
        swiglu_jvp((x,) * 3, (x,))
