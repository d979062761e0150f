# SPDX-License-Identifier: Apache-2.0
"""Attention: value, gradients and tangent on every backend that this machine can run."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp

from disca_kernels import attention, attention_jvp
from disca_kernels.ops.attention.cases import (
    AttentionCase,
    Operands,
    attention_gradient_in_dtype,
    attention_in_dtype,
)
from disca_kernels.ops.attention.reference import attention_jvp_reference, attention_reference
from disca_kernels.testing import assert_within_budget
from tests.ops.attention_calls import (
    BACKENDS,
    CASES,
    DEVICE,
    double,
    options,
    small,
    tangents_by,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
cases = pytest.mark.parametrize("case", CASES, ids=str)
backends = pytest.mark.parametrize("backend", BACKENDS)


@backends
@cases
def test_forward(case: AttentionCase, backend: str) -> None:
    operands = case.operands(device=DEVICE)
    kwargs = options(case, operands)
    expected = attention_reference(*double(operands.primals), **kwargs)
    eager = attention_in_dtype(*operands.primals, **kwargs)
    actual = attention(*operands.primals, **kwargs, backend=backend)
    assert_within_budget(actual, expected, eager, name="attention o")


@backends
@cases
def test_backward(case: AttentionCase, backend: str) -> None:
    operands = case.operands(device=DEVICE)
    kwargs = options(case, operands)

    def gradients(function, primals: tuple[Tensor, ...], **more: object) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in primals]
        o = function(*leaves, **kwargs, **more)
        return torch.autograd.grad(o, leaves, operands.cotangent.to(o.dtype))

    expected = gradients(attention_reference, double(operands.primals))
    eager = attention_gradient_in_dtype(operands.cotangent, *operands.primals, **kwargs)
    actual = gradients(attention, operands.primals, backend=backend)
    # A tile sums D products one after another, a matrix library in parts.
    factor = 2.0 * max(1.0, case.head_dim / 128)
    for name, a, r, e in zip("qkv", actual, expected, eager, strict=True):
        assert_within_budget(a, r, e, name=f"attention d{name}", factor=factor)


@pytest.mark.parametrize("way", ["pair", "func.jvp", "over a value"])
@backends
@cases
def test_jvp(case: AttentionCase, backend: str, way: str) -> None:
    operands = case.operands(device=DEVICE)
    primals, tangents = operands.primals, operands.tangents
    kwargs = options(case, operands)
    wide = double(primals), double(tangents)
    expected = jvp(lambda *x: attention_reference(*x, **kwargs), *wide)
    eager = jvp(lambda *x: attention_in_dtype(*x, **kwargs), primals, tangents)
    actual = tangents_by(way, operands, **kwargs, backend=backend)
    for name, a, r, e in zip(("o", "o_dot"), actual, expected, eager, strict=True):
        assert_within_budget(a, r, e, name=f"attention {name}")


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(2, 2, 5, 7, 4, torch.float64, lengths=(0, 6)),
        AttentionCase(2, 1, 6, 4, 4, torch.float64, causal=True),
        AttentionCase(2, 4, 6, 9, 4, torch.float64, key_heads=2, block_causal=2),
    ],
    ids=str,
)
def test_references_agree_with_autograd_and_finite_differences(case: AttentionCase) -> None:
    operands = case.operands()
    kwargs = options(case, operands)
    primals, tangents = operands.primals, operands.tangents
    closed = attention_jvp_reference(primals, tangents, **kwargs)
    automatic = jvp(lambda *x: attention_reference(*x, **kwargs), primals, tangents)
    torch.testing.assert_close(closed, automatic, rtol=1e-12, atol=1e-12)

    def moved(step: float) -> Tensor:
        at = (x + step * x_dot for x, x_dot in zip(primals, tangents, strict=True))
        return attention_reference(*at, **kwargs)

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    torch.testing.assert_close(closed[1], slope, rtol=1e-7, atol=1e-7)


def test_gradcheck_of_eager_in_float64() -> None:
    operands, kwargs = small(torch.float64)
    leaves = tuple(x.detach().contiguous().requires_grad_() for x in operands.primals)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, **kwargs), leaves)
    assert torch.autograd.gradgradcheck(lambda *x: attention(*x, **kwargs), leaves)


@backends
@pytest.mark.parametrize("present", range(8))
def test_absent_tangents(present: int, backend: str) -> None:
    operands, kwargs = small()
    tangents = tuple(x if present >> i & 1 else None for i, x in enumerate(operands.tangents))
    zeros = tuple(
        torch.zeros_like(x) if x_dot is None else x_dot
        for x, x_dot in zip(operands.primals, tangents, strict=True)
    )
    o, o_dot = attention_jvp(operands.primals, tangents, **kwargs, backend=backend)
    r, r_dot = attention_jvp_reference(operands.primals, zeros, **kwargs)
    torch.testing.assert_close((o, o_dot), (r, r_dot), rtol=2e-5, atol=2e-6)
    constants = [x for x, x_dot in zip(operands.primals, tangents, strict=True) if x_dot is None]
    if 0 < len(constants) < 3:
        moving = [i for i in range(3) if tangents[i] is not None]

        def f(*args: Tensor) -> Tensor:
            full = list(operands.primals)
            for i, x in zip(moving, args, strict=True):
                full[i] = x
            return attention(*full, **kwargs, backend=backend)

        primals = tuple(operands.primals[i] for i in moving)
        dots = tuple(tangents[i] for i in moving)
        torch.testing.assert_close(jvp(f, primals, dots)[1], r_dot, rtol=2e-5, atol=2e-6)


@backends
def test_rows_that_see_no_key_are_zero_in_every_mode(backend: str) -> None:
    case = AttentionCase(2, 1, 9, 4, 8, causal=True, lengths=(0, 4))
    operands = case.operands(device=DEVICE)
    kwargs = {**options(case, operands), "backend": backend}
    leaves = tuple(x.detach().requires_grad_() for x in operands.primals)
    o, o_dot = attention_jvp(leaves, operands.tangents, **kwargs)
    dq, dk, dv = torch.autograd.grad(o, leaves, operands.cotangent)
    for rows in (o, o_dot, dq):
        assert rows[0].eq(0).all()
        # Nine queries and four keys: the first five come before every key.
        assert rows[1, :, :5].eq(0).all()
        assert rows[1, :, 6:].ne(0).all()
    assert dk[0].eq(0).all()
    assert dv[0].eq(0).all()


@backends
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty(shape: tuple[int, int, int, int], backend: str) -> None:
    batch, heads, n_q, n_k = shape
    operands = AttentionCase(batch, heads, n_q, n_k, 8).operands(device=DEVICE)
    leaves = tuple(x.detach().requires_grad_() for x in operands.primals)
    o, o_dot = attention_jvp(leaves, operands.tangents, backend=backend)
    assert o.shape == o_dot.shape == (batch, heads, n_q, 8)
    assert o.eq(0).all()
    assert o_dot.eq(0).all()
    plain = attention(*leaves, backend=backend)
    gradients = torch.autograd.grad(plain, leaves, torch.ones_like(plain))
    assert all(g.eq(0).all() and g.shape == x.shape for g, x in zip(gradients, leaves, strict=True))


@backends
def test_noncontiguous(backend: str) -> None:
    """A strided last dimension, an expanded batch, tangents laid out unlike their primals."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 2, 2, 6, 8, generator=generator).to(DEVICE)
    odd = (q.mT.contiguous().mT, k[:1].expand(2, -1, -1, -1), v.flip(0).flip(0)[:, :, ::2])
    odd = (odd[0], odd[1][:, :, ::2], odd[2])
    dots = (q.contiguous(), k[:, :, ::2].contiguous().mT.contiguous().mT, odd[2].transpose(0, 1))
    plain = tuple(x.contiguous() for x in odd), tuple(x.contiguous() for x in dots)
    torch.testing.assert_close(
        attention_jvp(odd, dots, backend=backend), attention_jvp_reference(*plain)
    )


@backends
@pytest.mark.parametrize("scale", [0.0, 0.3, -2.0])
def test_scale(scale: float, backend: str) -> None:
    operands, kwargs = small()
    pair = attention_jvp(
        operands.primals, operands.tangents, **kwargs, scale=scale, backend=backend
    )
    expected = attention_jvp_reference(
        *(double(x) for x in (operands.primals, operands.tangents)), **kwargs, scale=scale
    )
    torch.testing.assert_close(pair, tuple(x.float() for x in expected), rtol=1e-4, atol=1e-5)


@backends
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_large_scores_do_not_overflow(dtype: torch.dtype, backend: str) -> None:
    operands, kwargs = small(dtype)
    q, k, v = operands.primals
    o, o_dot = attention_jvp((60 * q, 60 * k, v), operands.tangents, **kwargs, backend=backend)
    assert o.isfinite().all()
    assert o_dot.isfinite().all()
    assert o.abs().max() <= v.abs().max()


def drifting(drift: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Operands whose keys' tangents share a drift, values with a mean: what a change of t does."""
    operands = AttentionCase(1, 2, 64, 256, 32, BF16).operands(seed=3, device=DEVICE)
    (q, k, v), (q_dot, k_dot, v_dot) = operands.primals, operands.tangents
    direction = torch.ones(32, device=DEVICE, dtype=BF16)
    return (q, k, v + 1), (q_dot, k_dot + drift * direction, v_dot)


def relative_error(o_dot: Tensor, primals: tuple[Tensor, ...], dots: tuple[Tensor, ...]) -> float:
    exact = attention_jvp_reference(double(primals), double(dots))[1]
    return ((o_dot.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("way", ["pair", "func.jvp", "over a value"])
@backends
def test_a_common_drift_does_not_hurt_the_tangent(backend: str, way: str) -> None:
    errors = []
    for drift in (0.0, 4.0, 16.0, 64.0):
        primals, dots = drifting(drift)
        operands = Operands(primals, dots, primals[0], None)
        o_dot = tangents_by(way, operands, backend=backend)[1]
        errors.append(relative_error(o_dot, primals, dots))
    assert errors[0] < 4e-3, errors
    assert max(errors) < 1.5 * errors[0], errors


def test_without_centring_the_drift_would_hurt() -> None:
    """The control of the test above: the usual formula, with the usual roundings, fails it."""
    errors = []
    for drift in (0.0, 64.0):
        (q, k, v), (q_dot, k_dot, v_dot) = primals, dots = drifting(drift)
        scale = 32**-0.5
        p = (q.float() @ k.float().mT * scale).softmax(-1)
        s_dot = scale * (q_dot.float() @ k.float().mT + q.float() @ k_dot.float().mT)
        h = p * s_dot
        o, mean = p.to(BF16).float() @ v.float(), h.sum(-1, keepdim=True)
        o_dot = h.to(BF16).float() @ v.float() + p.to(BF16).float() @ v_dot.float() - mean * o
        errors.append(relative_error(o_dot, primals, dots))
    assert errors[1] > 5 * errors[0], errors


@backends
def test_the_tangent_has_no_graph_and_the_value_has_one(backend: str) -> None:
    operands, kwargs = small()
    leaves = tuple(x.detach().requires_grad_() for x in operands.primals)

    def f(*x: Tensor) -> Tensor:
        return attention(*x, **kwargs, backend=backend)

    for o, o_dot in (
        attention_jvp(leaves, operands.tangents, **kwargs, backend=backend),
        jvp(f, leaves, operands.tangents),
    ):
        assert o.requires_grad
        assert not o_dot.requires_grad
        actual = torch.autograd.grad(o, leaves, operands.cotangent)
        expected = torch.autograd.grad(
            attention_reference(*leaves, **kwargs), leaves, operands.cotangent
        )
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)
    blocked = grad(lambda q: jvp(f, (q, *operands.primals[1:]), operands.tangents)[1].sum())
    assert blocked(operands.primals[0]).eq(0).all()


def test_backends_agree() -> None:
    operands, kwargs = small()
    one, *others = (
        attention_jvp(operands.primals, operands.tangents, **kwargs, backend=b) for b in BACKENDS
    )
    for other in others:
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def test_short_sequences_with_gradient_agree_with_long_ones(monkeypatch) -> None:
    """The two ways of the eager forward, by matrix products and by PyTorch's attention."""
    case = AttentionCase(2, 2, 9, 6, 8, causal=True, lengths=(0, 5))
    operands = case.operands()
    leaves = tuple(x.detach().requires_grad_() for x in operands.primals)

    def both() -> tuple[Tensor, ...]:
        o = attention(*leaves, **options(case, operands), backend="eager")
        return o, *torch.autograd.grad(o, leaves, operands.cotangent)

    short = both()
    for limit in ("_MATMUL_LIMIT", "_SHORT_LIMIT"):
        monkeypatch.setattr(f"disca_kernels.ops.attention.eager.{limit}", 0)
    torch.testing.assert_close(both(), short, rtol=2e-5, atol=2e-6)
