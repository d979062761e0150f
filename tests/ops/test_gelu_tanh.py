# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
import torch.nn.functional as F

from disca_kernels import gelu_tanh, gelu_tanh_jvp
from disca_kernels.ops.gelu_tanh.cases import GeluTanhCase, gelu_tanh_in_dtype
from disca_kernels.ops.gelu_tanh.reference import gelu_tanh_jvp_reference, gelu_tanh_reference
from disca_kernels.testing import assert_within_budget
from tests.ops.battery import DEVICE, Battery, Subject, backends

OP = "gelu_tanh"
BACKENDS, KERNELS = backends(OP), backends(OP, kernels_only=True)
BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64


class TestGeluTanh(Battery):
    # Widths on both sides of a vector and of a tile, heads that are no multiple of either.
    subject = Subject(
        OP,
        gelu_tanh,
        gelu_tanh_jvp,
        gelu_tanh_reference,
        [
            GeluTanhCase(2, 5, 24, heads=3, head_dim=7),
            GeluTanhCase(2, 5, 48),
            GeluTanhCase(3, 9, 515, biased=False),
            GeluTanhCase(2, 6, 33, heads=2, head_dim=16, biased=False),
            GeluTanhCase(1, 3, 20, heads=1, head_dim=530),
            GeluTanhCase(2, 4, 18, heads=3, head_dim=8, joined=True),
            GeluTanhCase(1, 1, 1),
            GeluTanhCase(2, 7, 64, BF16, heads=2, head_dim=40),
            GeluTanhCase(2, 19, 96, BF16, wide=True),
            GeluTanhCase(2, 7, 33, FP16),
            GeluTanhCase(2, 9, 40, FP16, heads=1, head_dim=6, wide=True),
            GeluTanhCase(2, 200, 70, heads=2, head_dim=10),
        ],
    )


def test_reference_is_what_blocks_write():
    primals = GeluTanhCase(2, 5, 24, FP64, heads=3, head_dim=7).operands().primals
    assert torch.equal(gelu_tanh_reference(*primals), gelu_tanh_in_dtype(*primals))
    x, bias, prefix = primals
    z = x + bias
    y = z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    expected = torch.cat((prefix.transpose(1, 2).flatten(2), y), -1)
    torch.testing.assert_close(gelu_tanh_reference(*primals), expected)


def test_closed_formula_of_the_reference():
    primals, tangents, _ = GeluTanhCase(2, 5, 24, FP64, heads=3, head_dim=7).operands()
    expected = torch.func.jvp(gelu_tanh_reference, primals, tangents)
    torch.testing.assert_close(gelu_tanh_jvp_reference(primals, tangents), expected)


def test_gradcheck_of_the_reference():
    primals = GeluTanhCase(1, 2, 3, FP64, heads=2, head_dim=1).operands().primals
    leaves = [t.detach().clone().requires_grad_() for t in primals]
    assert torch.autograd.gradcheck(gelu_tanh_reference, leaves, check_forward_ad=True)


def _pair(z, backend):
    """Value, gradient and tangent of a row, each for a direction of ones."""
    leaf = z[None, None].clone().requires_grad_()
    y, y_dot = gelu_tanh_jvp((leaf,), (torch.ones_like(leaf),), backend=backend)
    (dz,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return y.detach()[0, 0], dz[0, 0], y_dot[0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_whole_range(dtype, backend):
    z = torch.linspace(-30, 30, 6001, device=DEVICE).to(dtype)
    exact = z.double().requires_grad_()
    expected = F.gelu(exact, approximate="tanh")
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    leaf = z.clone().requires_grad_()
    eager = F.gelu(leaf, approximate="tanh")
    (eager_slope,) = torch.autograd.grad(eager.sum(), leaf)
    y, dz, y_dot = _pair(z, backend)
    assert_within_budget(y, expected, eager.detach(), name="value")
    assert_within_budget(dz, slope, eager_slope, name="gradient")
    assert_within_budget(y_dot, slope, eager_slope.clone(), name="tangent")


@pytest.mark.parametrize("kernel", KERNELS)
def test_left_tail_keeps_its_digits(kernel):
    """1 + tanh would have none left here."""
    z = torch.linspace(-9, -5, 101, device=DEVICE)
    wide = z.double().requires_grad_()
    inner = math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3)
    expected = wide * torch.sigmoid(inner)
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    for actual, exact in zip(_pair(z, kernel), (expected, slope, slope), strict=True):
        torch.testing.assert_close(actual.double(), exact.detach(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_overflows(kernel):
    z = torch.tensor([25.0, 1e4, 1e13, 2e19, 3e38, math.inf], device=DEVICE)
    ones = torch.ones_like(z)
    y, dz, y_dot = _pair(z, kernel)
    assert torch.equal(y, z)
    assert torch.equal(dz, ones)
    assert torch.equal(y_dot, ones)
    for result in _pair(-z, kernel):
        assert torch.equal(result, 0 * ones)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_alone(backend):
    z = torch.linspace(-2, 2, 40, device=DEVICE)
    expected = _pair(z, backend)
    z[7] = math.nan
    for actual, clean in zip(_pair(z, backend), expected, strict=True):
        assert actual[7].isnan()
        actual[7] = clean[7]
        assert torch.equal(actual, clean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_empty(shape, backend):
    primals, tangents, cotangents = GeluTanhCase(*shape, heads=2, head_dim=3).operands(
        device=DEVICE
    )
    leaves = [t.detach().requires_grad_() for t in primals]
    y, y_dot = gelu_tanh_jvp(leaves, tangents, backend=backend)
    assert y.shape == y_dot.shape == (*shape[:2], 14)
    gradients = torch.autograd.grad(y, leaves, cotangents)
    assert [g.shape for g in gradients] == [t.shape for t in primals]
    assert torch.equal(gradients[1], torch.zeros_like(gradients[1]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_of_the_prefix_is_a_view(kernel):
    primals, _, (cotangent,) = GeluTanhCase(2, 5, 24, heads=3, head_dim=7).operands(device=DEVICE)
    leaves = [t.detach().requires_grad_() for t in primals]
    seen = []
    leaves[2].register_hook(seen.append)
    gelu_tanh(*leaves, backend=kernel).backward(cotangent)
    assert seen[0].untyped_storage().data_ptr() == cotangent.untyped_storage().data_ptr()


@pytest.mark.parametrize("kernel", KERNELS)
def test_elements_beyond_the_reach_of_32_bits(kernel):
    """Two samples 2^31 elements apart; only the pages that are touched exist."""
    apart = 2**31
    storage = torch.empty(apart + 64, dtype=BF16, device=DEVICE)
    x = storage.as_strided((2, 2, 32), (apart, 32, 1))
    plain = GeluTanhCase(2, 2, 32, BF16).operands(device=DEVICE).primals[0]
    x.copy_(plain)
    assert torch.equal(gelu_tanh(x, backend=kernel), gelu_tanh(plain, backend=kernel))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 8),), r"x must be \[B, N, M\] with at least one channel, got \[2, 8\]"),
        (((2, 3, 0),), r"at least one channel, got \[2, 3, 0\]"),
        (((2, 3, 8), (1, 8)), r"bias must be \[M\] = \[8\] for x \[2, 3, 8\], got \[1, 8\]"),
        (((2, 3, 8), (1,)), r"got \[1\]"),
        (
            ((2, 3, 8), (8,), (2, 4, 5)),
            r"prefix must be \[B, H, N, D\] = \[2, H, 3, D\] or .*got \[2, 4, 5\]",
        ),
        (((2, 3, 8), (8,), (1, 4, 3, 5)), r"got \[1, 4, 3, 5\]"),
        (((2, 3, 8), (8,), (2, 3, 0)), r"got \[2, 3, 0\]"),
        (((2, 3, 8), (8,), (2, 0, 3, 4)), r"got \[2, 0, 3, 4\]"),
        (((2, 3, 8), (8,), (2, 3)), r"got \[2, 3\]"),
    ],
)
def test_rejects_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        gelu_tanh(*(torch.zeros(s) for s in shapes))


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ((torch.int32,), r"x must be one of .*, got torch\.int32"),
        ((torch.float32, BF16), r"bias must have the dtype of x \(torch\.float32\) or .*bfloat16"),
        ((BF16, BF16, torch.float32), r"prefix must have the dtype of x, torch\.bfloat16, got"),
    ],
)
def test_rejects_dtypes(dtypes, message):
    shapes = ((2, 3, 8), (8,), (2, 3, 4))
    with pytest.raises(TypeError, match=message):
        gelu_tanh(*(torch.zeros(s, dtype=d) for s, d in zip(shapes, dtypes, strict=False)))


def test_rejects_devices_and_what_is_no_tensor():
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match="bias is on meta, x is on cpu"):
        gelu_tanh(x, torch.zeros(8, device="meta"))
    with pytest.raises(ValueError, match="prefix is on meta, x is on cpu"):
        gelu_tanh(x, None, torch.zeros(2, 3, 8, device="meta"))
    with pytest.raises(TypeError, match="x must be a tensor, got float"):
        gelu_tanh(1.0)
    with pytest.raises(TypeError, match="bias must be a tensor or None, got float"):
        gelu_tanh(x, 1.0)
    with pytest.raises(TypeError, match="prefix must be a tensor or None, got list"):
        gelu_tanh(x, None, [x])


def test_rejects_tangents():
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match="bias_dot was given without bias"):
        gelu_tanh_jvp((x,), (x, torch.zeros(8)))
    with pytest.raises(ValueError, match=r"x_dot must match x \[2, 3, 8\].*got \[2, 3, 7\]"):
        gelu_tanh_jvp((x,), (x[..., 1:],))
    with pytest.raises(TypeError, match="x_dot must have the dtype of x"):
        gelu_tanh_jvp((x,), (x.double(),))
    with pytest.raises(ValueError, match="1 to 3 primals are needed, got 4"):
        gelu_tanh_jvp((x,) * 4, (x,))
