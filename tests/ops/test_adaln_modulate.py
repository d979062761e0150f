# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from disca_kernels import adaln_modulate, adaln_modulate_jvp
from disca_kernels.ops.adaln_modulate.cases import AdalnModulateCase
from disca_kernels.ops.adaln_modulate.reference import (
    adaln_modulate_jvp_reference,
    adaln_modulate_reference,
)
from disca_kernels.testing import assert_within_budget
from disca_kernels.testing.gradients import check_backward
from tests.ops.battery import DEVICE, Battery, Subject, backends, runs

OP = "adaln_modulate"
BACKENDS, KERNELS = backends(OP), backends(OP, kernels_only=True)


class TestAdalnModulate(Battery):
    # Widths on both sides of a power of two, of a vector and of a tile; lengths that fill no tile.
    subject = Subject(
        OP,
        adaln_modulate,
        adaln_modulate_jvp,
        adaln_modulate_reference,
        [
            AdalnModulateCase(2, 3, 8),
            AdalnModulateCase(2, 5, 48),
            AdalnModulateCase(3, 37, 130),
            AdalnModulateCase(1, 1, 17),
            AdalnModulateCase(2, 3, 2050),
            AdalnModulateCase(2, 7, 64, torch.bfloat16),
            AdalnModulateCase(2, 19, 96, torch.bfloat16, torch.float32),
            AdalnModulateCase(2, 7, 33, torch.float16),
            AdalnModulateCase(2, 9, 40, torch.float16, torch.float32),
            AdalnModulateCase(2, 5, 48, per_token=True),
            AdalnModulateCase(2, 18, 129, torch.bfloat16, per_token=True),
            AdalnModulateCase(2, 5, 24, torch.bfloat16, torch.float32, per_token=True),
            AdalnModulateCase(2, 100, 32, offset=100.0),
            AdalnModulateCase(2, 300, 130),
        ],
    )


AFFINE = [
    AdalnModulateCase(2, 3, 8, affine=True),
    AdalnModulateCase(3, 21, 130, affine=True),
    AdalnModulateCase(2, 5, 24, affine=True, per_token=True),
    AdalnModulateCase(2, 9, 40, torch.bfloat16, torch.float32, affine=True),
    AdalnModulateCase(2, 18, 33, torch.bfloat16, affine=True, per_token=True),
    AdalnModulateCase(2, 7, 64, torch.float16, affine=True),
]
RMS = [
    AdalnModulateCase(2, 3, 8, norm="rms", affine=True),
    AdalnModulateCase(2, 5, 48, norm="rms"),
    AdalnModulateCase(3, 21, 130, norm="rms", affine=True),
    AdalnModulateCase(2, 5, 24, norm="rms", affine=True, per_token=True),
    AdalnModulateCase(2, 9, 40, torch.bfloat16, torch.float32, norm="rms", affine=True),
    AdalnModulateCase(2, 7, 33, torch.float16, norm="rms", per_token=True),
]


WITHOUT_VARIANTS = ("cuda",)


class OfVariant(Battery):
    """The CUDA C++ kernels have neither an affine part nor an RMS norm."""

    def bound(self, backend, case=None):
        if backend in WITHOUT_VARIANTS:
            pytest.skip("these kernels have no such variant")
        return super().bound(backend, case)


class TestAffine(OfVariant):
    subject = Subject(OP, adaln_modulate, adaln_modulate_jvp, adaln_modulate_reference, AFFINE)


class TestRms(OfVariant):
    subject = Subject(OP, adaln_modulate, adaln_modulate_jvp, adaln_modulate_reference, RMS)


def plain_operands(*shape, **options):
    """Return x, shift and scale alone."""
    return AdalnModulateCase(*shape, **options).operands(device=DEVICE).primals[:3]


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_reference_is_what_pytorch_calls_the_norm(norm):
    case = AdalnModulateCase(2, 6, 40, torch.float64, affine=True, norm=norm)
    x, shift, scale, weight, bias = case.operands().primals
    if norm == "rms":
        normal = torch.nn.functional.rms_norm(x, (40,), weight, eps=1e-6)
    else:
        normal = torch.nn.functional.layer_norm(x, (40,), weight, bias, eps=1e-6)
    expected = normal * (1 + scale[:, None]) + shift[:, None]
    actual = adaln_modulate_reference(x, shift, scale, weight, bias, norm=norm)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("per_token", [False, True])
def test_closed_formula_of_the_reference(per_token, norm):
    case = AdalnModulateCase(2, 6, 40, torch.float64, None, per_token, True, norm)
    primals, tangents, _ = case.operands()
    present = [i for i, t in enumerate(tangents) if t is not None]

    def function(*leaves):
        return adaln_modulate_reference(*leaves, norm=norm)

    expected = torch.func.jvp(
        function, tuple(primals[i] for i in present), tuple(tangents[i] for i in present)
    )
    torch.testing.assert_close(adaln_modulate_jvp_reference(primals, tangents, norm=norm), expected)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("backend", KERNELS)
def test_weights_of_a_dtype_of_their_own(backend, norm):
    if backend in WITHOUT_VARIANTS:
        pytest.skip("these kernels have no such variant")
    case = AdalnModulateCase(2, 6, 40, torch.bfloat16, affine=True, norm=norm)
    x, shift, scale, weight, bias = case.operands(device=DEVICE).primals
    vectors = [None if t is None else t.float().requires_grad_() for t in (weight, bias)]
    y = adaln_modulate(x, shift, scale, *vectors, norm=norm, backend=backend)
    wide = [None if t is None else t.detach().cpu().double() for t in (x, shift, scale, *vectors)]
    expected = adaln_modulate_reference(*wide, norm=norm)
    eager = adaln_modulate_reference(x, shift, scale, *vectors, norm=norm)
    assert_within_budget(y, expected, eager, name="value")
    y.float().square().sum().backward()
    assert [t.grad.dtype for t in vectors if t is not None] == [torch.float32] * (
        1 if norm == "rms" else 2
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_does_not_see_a_constant_added_to_a_row(backend):
    x, shift, scale = plain_operands(2, 6, 64, offset=0.0)
    # Multiples of 1/64 stay exact beside 512, so that only the mean may differ.
    x = (64 * x).round() / 64
    y = adaln_modulate(x, shift, scale, backend=backend)
    moved = adaln_modulate(x + 512, shift, scale, backend=backend)
    torch.testing.assert_close(moved, y, rtol=0, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_row_becomes_the_shift(backend):
    _, shift, scale = plain_operands(2, 6, 64)
    x = torch.full((2, 6, 64), 3.0, device=DEVICE)
    y = adaln_modulate(x, shift, scale, backend=backend)
    assert torch.equal(y, shift[:, None].expand_as(y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_huge_constant_row_stays_finite(backend):
    _, shift, scale = plain_operands(2, 6, 67)
    x = torch.full((2, 6, 67), 1.1e9, device=DEVICE)
    assert adaln_modulate(x, shift, scale, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_channel(backend):
    primals, tangents, (cotangent,) = AdalnModulateCase(2, 3, 1).operands(device=DEVICE)
    leaves = [t.detach().requires_grad_() for t in primals[:3]]
    y, y_dot = adaln_modulate_jvp(tuple(leaves), tangents[:3], backend=backend)
    dx, dshift, dscale = torch.autograd.grad(y, leaves, cotangent)
    assert torch.equal(y, primals[1][:, None].expand_as(y))
    assert torch.equal(y_dot, tangents[1][:, None].expand_as(y))
    assert torch.equal(dx, torch.zeros_like(dx))
    assert torch.equal(dscale, torch.zeros_like(dscale))
    torch.testing.assert_close(dshift, cotangent.sum(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_row_stays_alone(backend, bad):
    x, shift, scale = plain_operands(2, 6, 40)
    clean = adaln_modulate(x, shift, scale, backend=backend)
    x = x.clone()
    x[1, 2, 3] = bad
    y = adaln_modulate(x, shift, scale, backend=backend)
    assert y[1, 2].isnan().all()
    y[1, 2] = clean[1, 2]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_eps(backend, norm):
    if backend in WITHOUT_VARIANTS and norm == "rms":
        pytest.skip("these kernels have no such variant")
    primals = plain_operands(2, 6, 40)
    wide = [t.cpu().double() for t in primals]
    options = {"eps": 0.5, "norm": norm}
    y = adaln_modulate(*primals, **options, backend=backend)
    eager = adaln_modulate_reference(*primals, **options)
    assert_within_budget(y, adaln_modulate_reference(*wide, **options), eager, name="eps")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_empty(affine, per_token, shape, backend):
    if backend in WITHOUT_VARIANTS and affine:
        pytest.skip("these kernels have no such variant")
    case = AdalnModulateCase(*shape, per_token=per_token, affine=affine)
    primals, tangents, (cotangent,) = case.operands(device=DEVICE)
    present = 5 if affine else 3
    leaves = [t.detach().requires_grad_() for t in primals[:present]]
    y, y_dot = adaln_modulate_jvp(tuple(leaves), tangents[:present], backend=backend)
    assert y.shape == y_dot.shape == shape
    gradients = torch.autograd.grad(y, leaves, cotangent)
    assert [g.shape for g in gradients] == [t.shape for t in leaves]
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("backend", KERNELS)
def test_eps_may_be_zero(backend):
    """No row outside a tile's mask may join the sums: its deviation would be zero."""
    primals = plain_operands(2, 5, 24)

    def gradients(function, **options):
        leaves = [t.detach().clone().requires_grad_() for t in primals]
        return torch.autograd.grad(function(*leaves, eps=0.0, **options).sin().sum(), leaves)

    actual = gradients(adaln_modulate, backend=backend)
    expected = gradients(adaln_modulate_reference)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", KERNELS)
def test_elements_beyond_the_reach_of_32_bits(backend):
    """Two samples 2^31 elements apart; only the pages that are touched exist."""
    apart = 2**31
    storage = torch.empty(apart + 64, dtype=torch.bfloat16, device=DEVICE)
    x = storage.as_strided((2, 2, 32), (apart, 32, 1))
    plain, shift, scale = plain_operands(2, 2, 32, dtype=torch.bfloat16)
    x.copy_(plain)
    y = adaln_modulate(x, shift, scale, backend=backend)
    assert torch.equal(y, adaln_modulate(plain, shift, scale, backend=backend))


@runs(OP, "triton", torch.empty(1, 1, 1, device=DEVICE))
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("per_token", [False, True])
def test_splits_of_the_backward_pass(monkeypatch, per_token, programs):
    from disca_kernels.triton_common import rows

    monkeypatch.setattr(rows, "_BACKWARD_PROGRAMS", programs)
    case = AdalnModulateCase(2, 53, 40, per_token=per_token, affine=True)
    operands = case.operands(device=DEVICE)
    check_backward(
        lambda *p: adaln_modulate(*p, backend="triton"),
        adaln_modulate_reference,
        operands.primals,
        operands.cotangents[0],
        name=f"{programs} programs",
        tolerance=1e-5,
    )
