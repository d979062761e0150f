# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from disca_kernels import adaln_modulate, adaln_modulate_jvp, why_not
from disca_kernels.ops.adaln_modulate.cases import AdalnModulateCase
from disca_kernels.ops.adaln_modulate.reference import (
    adaln_modulate_jvp_reference,
    adaln_modulate_reference,
    adaln_modulate_vjp_reference,
)
from disca_kernels.testing import assert_within_budget
from disca_kernels.testing.gradients import check_backward, check_jvp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Widths on both sides of a power of two, of a vector and of a tile; lengths that fill no tile.
CASES = [
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
]
ABSENT = [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]


def _runs(backend: str) -> pytest.MarkDecorator:
    reasons = why_not("adaln_modulate", backend, torch.empty(1, 1, 1, device=DEVICE))
    return pytest.mark.skipif(bool(reasons), reason="; ".join(reasons))


BACKENDS = [pytest.param(b, marks=_runs(b)) for b in ("eager", "triton", "cpu", "cuda")]
KERNELS = BACKENDS[1:]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, backend):
    primals = case.operands(device=DEVICE).primals
    y = adaln_modulate(*primals, backend=backend)
    expected = adaln_modulate_reference(*(t.cpu().double() for t in primals))
    assert y.is_contiguous()
    assert_within_budget(y, expected, adaln_modulate_reference(*primals), name=str(case))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, backend):
    operands = case.operands(device=DEVICE)
    check_backward(
        lambda *p: adaln_modulate(*p, backend=backend),
        adaln_modulate_reference,
        operands.primals,
        operands.cotangent,
        name=str(case),
        tolerance=1e-5,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_jvp(case, backend):
    operands = case.operands(device=DEVICE)
    check_jvp(
        lambda p, v: adaln_modulate_jvp(p, v, backend=backend),
        adaln_modulate_reference,
        operands.primals,
        operands.tangents,
        name=str(case),
        tolerance=1e-5,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", ABSENT, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
def test_jvp_with_absent_tangents(per_token, absent, backend):
    operands = AdalnModulateCase(2, 6, 40, per_token=per_token).operands(device=DEVICE)
    tangents = [None if i in absent else t for i, t in enumerate(operands.tangents)]
    check_jvp(
        lambda p, v: adaln_modulate_jvp(p, v, backend=backend),
        adaln_modulate_reference,
        operands.primals,
        tangents,
        name=f"without {absent}",
        tolerance=1e-5,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_jvp_without_any_tangent(backend):
    primals = AdalnModulateCase(2, 6, 40).operands(device=DEVICE).primals
    y, y_dot = adaln_modulate_jvp(primals, (None, None, None), backend=backend)
    assert torch.equal(y, adaln_modulate(*primals, backend=backend))
    assert torch.equal(y_dot, torch.zeros_like(y))


def test_reference_is_layer_norm():
    x, shift, scale = AdalnModulateCase(2, 6, 40, torch.float64).operands().primals
    normal = torch.nn.functional.layer_norm(x, (40,), eps=1e-6)
    expected = normal * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(adaln_modulate_reference(x, shift, scale), expected)


@pytest.mark.parametrize("per_token", [False, True])
def test_closed_formulas_of_the_reference(per_token):
    case = AdalnModulateCase(2, 6, 40, torch.float64, per_token=per_token)
    primals, tangents, cotangent = case.operands()
    expected = torch.func.jvp(adaln_modulate_reference, primals, tangents)
    torch.testing.assert_close(adaln_modulate_jvp_reference(primals, tangents), expected)
    leaves = [t.detach().requires_grad_() for t in primals]
    expected = torch.autograd.grad(adaln_modulate_reference(*leaves), leaves, cotangent)
    actual = adaln_modulate_vjp_reference(cotangent, primals[0], primals[2])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_does_not_see_a_constant_added_to_a_row(backend):
    x, shift, scale = AdalnModulateCase(2, 6, 64, offset=0.0).operands(device=DEVICE).primals
    # Multiples of 1/64 stay exact beside 512, so that only the mean may differ.
    x = (64 * x).round() / 64
    y = adaln_modulate(x, shift, scale, backend=backend)
    moved = adaln_modulate(x + 512, shift, scale, backend=backend)
    torch.testing.assert_close(moved, y, rtol=0, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_row_becomes_the_shift(backend):
    _, shift, scale = AdalnModulateCase(2, 6, 64).operands(device=DEVICE).primals
    x = torch.full((2, 6, 64), 3.0, device=DEVICE)
    y = adaln_modulate(x, shift, scale, backend=backend)
    assert torch.equal(y, shift[:, None].expand_as(y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_huge_constant_row_stays_finite(backend):
    _, shift, scale = AdalnModulateCase(2, 6, 67).operands(device=DEVICE).primals
    x = torch.full((2, 6, 67), 1.1e9, device=DEVICE)
    assert adaln_modulate(x, shift, scale, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_channel(backend):
    primals, tangents, cotangent = AdalnModulateCase(2, 3, 1).operands(device=DEVICE)
    leaves = [t.detach().requires_grad_() for t in primals]
    y, y_dot = adaln_modulate_jvp(tuple(leaves), tangents, backend=backend)
    dx, dshift, dscale = torch.autograd.grad(y, leaves, cotangent)
    assert torch.equal(y, primals[1][:, None].expand_as(y))
    assert torch.equal(y_dot, tangents[1][:, None].expand_as(y))
    assert torch.equal(dx, torch.zeros_like(dx))
    assert torch.equal(dscale, torch.zeros_like(dscale))
    torch.testing.assert_close(dshift, cotangent.sum(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_row_stays_alone(backend, bad):
    x, shift, scale = AdalnModulateCase(2, 6, 40).operands(device=DEVICE).primals
    clean = adaln_modulate(x, shift, scale, backend=backend)
    x = x.clone()
    x[1, 2, 3] = bad
    y = adaln_modulate(x, shift, scale, backend=backend)
    assert y[1, 2].isnan().all()
    y[1, 2] = clean[1, 2]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps(backend):
    primals = AdalnModulateCase(2, 6, 40).operands(device=DEVICE).primals
    wide = [t.cpu().double() for t in primals]
    y = adaln_modulate(*primals, eps=0.5, backend=backend)
    eager = adaln_modulate_reference(*primals, eps=0.5)
    assert_within_budget(y, adaln_modulate_reference(*wide, eps=0.5), eager, name="eps")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("per_token", [False, True])
def test_noncontiguous(per_token, backend):
    """The last dimension itself is strided, in every operand and in the gradient."""
    case = AdalnModulateCase(3, 5, 24, per_token=per_token)
    primals, tangents, _ = case.operands(device=DEVICE)
    strided = [torch.stack([t, t + 1], -1)[..., 0] for t in (*primals, *tangents)]
    leaves = [t.detach().requires_grad_() for t in strided[:3]]
    plain = [t.contiguous().requires_grad_() for t in primals]
    y, y_dot = adaln_modulate_jvp(tuple(leaves), tuple(strided[3:]), backend=backend)
    expected, expected_dot = adaln_modulate_jvp(tuple(plain), tangents, backend=backend)
    assert torch.equal(y, expected)
    assert torch.equal(y_dot, expected_dot)
    y.sum().backward()
    expected.backward(torch.ones_like(expected))
    for leaf, plain_leaf in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, plain_leaf.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
@pytest.mark.parametrize("per_token", [False, True])
def test_empty(per_token, shape, backend):
    primals, tangents, cotangent = AdalnModulateCase(*shape, per_token=per_token).operands(
        device=DEVICE
    )
    leaves = [t.detach().requires_grad_() for t in primals]
    y, y_dot = adaln_modulate_jvp(tuple(leaves), tangents, backend=backend)
    assert y.shape == y_dot.shape == shape
    gradients = torch.autograd.grad(y, leaves, cotangent)
    assert [g.shape for g in gradients] == [t.shape for t in primals]
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (1, 2), (0, 2)], ids=str)
def test_backward_of_some(needed, backend):
    operands = AdalnModulateCase(2, 6, 40).operands(device=DEVICE)
    leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(operands.primals)]
    adaln_modulate(*leaves, backend=backend).backward(operands.cotangent)
    x, _, scale = operands.primals
    expected = adaln_modulate_vjp_reference(operands.cotangent, x, scale)
    for index, (leaf, gradient) in enumerate(zip(leaves, expected, strict=True)):
        if index in needed:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-5)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("backend", KERNELS)
def test_backward_is_deterministic(backend):
    operands = AdalnModulateCase(2, 200, 40).operands(device=DEVICE)
    gradients = []
    for _ in range(2):
        leaves = [t.detach().requires_grad_() for t in operands.primals]
        y = adaln_modulate(*leaves, backend=backend)
        gradients.append(torch.autograd.grad(y, leaves, operands.cotangent))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_elements_beyond_the_reach_of_32_bits(backend):
    """Two samples 2^31 elements apart; only the pages that are touched exist."""
    apart = 2**31
    storage = torch.empty(apart + 64, dtype=torch.bfloat16, device=DEVICE)
    x = storage.as_strided((2, 2, 32), (apart, 32, 1))
    plain, shift, scale = (
        AdalnModulateCase(2, 2, 32, torch.bfloat16).operands(device=DEVICE).primals
    )
    x.copy_(plain)
    y = adaln_modulate(x, shift, scale, backend=backend)
    assert torch.equal(y, adaln_modulate(plain, shift, scale, backend=backend))


@_runs("cpu")
def test_threads_do_not_change_a_bit():
    operands = AdalnModulateCase(2, 300, 130).operands()
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.detach().requires_grad_() for t in operands.primals]
            y, y_dot = adaln_modulate_jvp(tuple(leaves), operands.tangents, backend="cpu")
            results.append((y, y_dot, *torch.autograd.grad(y, leaves, operands.cotangent)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@_runs("triton")
@pytest.mark.parametrize("programs", [1, 3])
def test_splits_of_the_backward_pass(monkeypatch, programs):
    from disca_kernels.ops.adaln_modulate import triton as kernels

    monkeypatch.setattr(kernels, "_BACKWARD_PROGRAMS", programs)
    operands = AdalnModulateCase(2, 53, 40).operands(device=DEVICE)
    check_backward(
        lambda *p: adaln_modulate(*p, backend="triton"),
        adaln_modulate_reference,
        operands.primals,
        operands.cotangent,
        name=f"{programs} programs",
        tolerance=1e-5,
    )
