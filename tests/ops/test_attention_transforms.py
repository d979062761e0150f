# SPDX-License-Identifier: Apache-2.0
"""Attention under forward-mode AD, vmap, autocast, overrides and torch.compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vmap

from disca_kernels import attention, attention_jvp, attention_tangent, dual
from disca_kernels.ops.attention.cases import AttentionCase, Operands
from disca_kernels.ops.attention.reference import attention_jvp_reference, attention_reference
from tests.ops.attention_calls import BACKENDS, DEVICE

F32, BF16 = torch.float32, torch.bfloat16
backends = pytest.mark.parametrize("backend", BACKENDS)


def small() -> tuple[Operands, dict[str, object]]:
    case = AttentionCase(2, 2, 5, 7, 8, lengths=(0, 6), key_heads=1, block_causal=3)
    operands = case.operands(device=DEVICE)
    return operands, {"kv_lengths": operands.kv_lengths, "block_causal": 3}


@backends
def test_dual_level(backend: str) -> None:
    operands, kwargs = small()
    _, expected = attention_jvp_reference(operands.primals, operands.tangents, **kwargs)
    leaves = tuple(x.detach().requires_grad_() for x in operands.primals)
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, leaves, operands.tangents)
        o, o_dot = forward_ad.unpack_dual(attention(*duals, **kwargs, backend=backend))
    torch.testing.assert_close(o_dot, expected, rtol=2e-5, atol=2e-6)
    torch.autograd.grad(o, leaves, operands.cotangent)


@backends
def test_vmap(backend: str) -> None:
    operands, kwargs = small()
    factors = torch.tensor([1.0, -0.5, 2.0], device=DEVICE)

    def scaled(tensors: tuple[Tensor, ...], factor: float) -> tuple[Tensor, ...]:
        return tuple(factor * x for x in tensors)

    def f(*x: Tensor) -> Tensor:
        return attention(*x, **kwargs, backend=backend)

    def at(primals: tuple[Tensor, ...], dots: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return attention_jvp_reference(primals, dots, **kwargs)

    many = tuple(factors.view(3, 1, 1, 1, 1) * x for x in operands.primals)
    dots = tuple(factors.view(3, 1, 1, 1, 1) * x for x in operands.tangents)
    expected = [
        at(scaled(operands.primals, c), scaled(operands.tangents, c)) for c in factors.tolist()
    ]
    o, o_dot = (torch.stack(x) for x in zip(*expected, strict=True))
    close = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(vmap(f)(*many), o, **close)
    torch.testing.assert_close(vmap(lambda p, d: jvp(f, p, d))(many, dots), (o, o_dot), **close)
    torch.testing.assert_close(jvp(vmap(f), many, dots), (o, o_dot), **close)
    pair = vmap(lambda p, d: attention_jvp(p, d, **kwargs, backend=backend))(many, dots)
    torch.testing.assert_close(pair, (o, o_dot), **close)
    lse = vmap(lambda *x: attention(*x, **kwargs, return_lse=True, backend=backend)[1])(*many)
    tangent = vmap(lambda *x: attention_tangent(*x, **kwargs, backend=backend)[0])
    torch.testing.assert_close(tangent(many, dots, o, lse), o_dot, **close)
    dq = vmap(grad(lambda q, k, v: f(q, k, v).sum()))(*many)
    dq_one = grad(lambda q, k, v: attention_reference(q, k, v, **kwargs).sum())
    stacked = torch.stack([dq_one(*scaled(operands.primals, c)) for c in factors.tolist()])
    torch.testing.assert_close(dq, stacked, **close)


@backends
def test_jacfwd(backend: str) -> None:
    q, k, v = AttentionCase(1, 1, 2, 3, 4).operands(device=DEVICE).primals
    actual = jacfwd(lambda q: attention(q, k, v, backend=backend))(q)
    expected = jacfwd(lambda q: attention_reference(q, k, v))(q)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@backends
def test_second_derivatives_are_right_or_refused(backend: str) -> None:
    operands, kwargs = small()
    primals, tangents = operands.primals, operands.tangents

    def f(*x: Tensor) -> Tensor:
        return attention(*x, **kwargs, backend=backend)

    with pytest.raises(NotImplementedError, match="jvp of jvp"):
        jvp(lambda *x: jvp(f, x, tangents)[1], primals, tangents)

    def jvp_of_grad(function) -> Tensor:
        of_q = grad(lambda q: function(q, *primals[1:]).square().sum())
        return jvp(of_q, primals[:1], tangents[:1])[1]

    def grad_of_grad(function) -> Tensor:
        leaf = primals[0].detach().requires_grad_()
        value = function(leaf, *primals[1:]).square().sum()
        (dq,) = torch.autograd.grad(value, leaf, create_graph=True)
        return torch.autograd.grad(dq.square().sum(), leaf)[0]

    for twice in (jvp_of_grad, grad_of_grad):
        if backend == "eager":
            expected = twice(lambda *x: attention_reference(*x, **kwargs))
            torch.testing.assert_close(twice(f), expected, rtol=1e-4, atol=1e-5)
        else:
            with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
                twice(f)


@backends
def test_the_pair_refuses_a_dual_operand(backend: str) -> None:
    operands, _ = small()
    with pytest.raises(NotImplementedError, match="Inside forward mode call attention"):
        jvp(lambda *x: attention_jvp(x, operands.tangents, backend=backend)[0],
            operands.primals, operands.tangents)  # fmt: skip


@backends
def test_the_tangent_over_a_value_refuses_a_dual_operand(backend: str) -> None:
    operands, kwargs = small()
    o, lse = attention(*operands.primals, **kwargs, return_lse=True)

    def f(*x: Tensor) -> Tensor:
        return attention_tangent(x, operands.tangents, o, lse, **kwargs, backend=backend)[0]

    with pytest.raises(NotImplementedError, match="Inside forward mode call attention"):
        jvp(f, operands.primals, operands.tangents)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="Inside forward mode"):
        f(*map(forward_ad.make_dual, operands.primals, operands.tangents))
    with pytest.raises(dual.TangentError, match="Inside forward mode"):
        dual.jvp(f, operands.primals, operands.tangents)


@backends
def test_dual_jvp_with_the_log_sum_exp(backend: str) -> None:
    operands, kwargs = small()
    leaves = tuple(x.detach().requires_grad_() for x in operands.primals)
    (o, lse), (o_dot, lse_dot) = dual.jvp(
        lambda *x: attention(*x, **kwargs, return_lse=True, backend=backend),
        leaves, operands.tangents,
    )  # fmt: skip
    expected = attention_jvp_reference(
        operands.primals, operands.tangents, **kwargs, return_lse=True
    )
    torch.testing.assert_close((o, o_dot, lse, lse_dot), expected, rtol=2e-5, atol=1e-5)
    assert o.requires_grad
    assert lse.requires_grad
    assert not o_dot.requires_grad
    assert not lse_dot.requires_grad
    with pytest.raises(dual.TangentError, match="primal='sdpa' inside dual"):
        dual.jvp(lambda *x: attention(*x, primal="sdpa"), operands.primals, operands.tangents)


@backends
def test_autocast(backend: str) -> None:
    operands, kwargs = small()
    half = tuple(x.to(BF16) for x in operands.primals)
    dots = tuple(x.to(BF16) for x in operands.tangents)
    expected = attention_jvp(half, dots, **kwargs, backend=backend)
    mixed = (operands.primals[0], *half[1:])
    leaves = tuple(x.detach().requires_grad_() for x in operands.primals)
    with torch.autocast(DEVICE, dtype=BF16):
        inside = attention_jvp(operands.primals, operands.tangents, **kwargs, backend=backend)
        through = jvp(
            lambda *x: attention(*x, **kwargs, backend=backend), operands.primals, operands.tangents
        )
        from_mixed = attention(*mixed, **kwargs, backend=backend)
        tracked = attention(*leaves, **kwargs, backend=backend)
    for pair in (inside, through):
        assert pair[0].dtype == pair[1].dtype == BF16
        torch.testing.assert_close(pair, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(from_mixed, expected[0], rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad(tracked, leaves, operands.cotangent.to(BF16))
    assert all(g.dtype == F32 and g.isfinite().all() for g in gradients)


def test_is_overridable() -> None:
    class Wrapped(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return func.__name__

    q, k, v = small()[0].primals
    assert attention(q, k, v.as_subclass(Wrapped)) == "attention"
    assert attention_jvp((q, k, v), (None, None, v.as_subclass(Wrapped))) == "attention_jvp"


_COMPILED = """
import sys
import torch
from torch.autograd import forward_ad
from torch.func import jvp
from disca_kernels import attention, attention_jvp, attention_tangent, dual
from disca_kernels.ops.attention.cases import AttentionCase
from disca_kernels.ops.attention.reference import attention_reference

backend, device = sys.argv[1:]
case = AttentionCase(2, 2, 5, 7, 8, lengths=(0, 6), key_heads=1, block_causal=3)
primals, tangents, _, lengths = case.operands(device=device)
options = {"kv_lengths": lengths, "block_causal": 3}
weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
plain = weight.detach()

def model(q, k, v):
    return attention(q @ weight, k, v @ weight, **options, backend=backend)

def with_lse(q, k, v):
    o, lse = attention(q @ weight, k, v @ weight, **options, return_lse=True, backend=backend)
    return o + lse.nan_to_num(neginf=0.0)[..., None]

def specification(q, k, v):
    return attention_reference(q @ weight, k, v @ weight, **options)

def specification_with_lse(q, k, v):
    o, lse = attention_reference(q @ weight, k, v @ weight, **options, return_lse=True)
    return o + lse.nan_to_num(neginf=0.0)[..., None]

def with_tangent(primals, tangents):
    o, o_dot = jvp(model, primals, tangents)
    return o, o_dot.detach()

def lse_with_tangent(primals, tangents):
    o, o_dot = jvp(with_lse, primals, tangents)
    return o, o_dot.detach()

def over_a_value(primals, tangents):
    (q, k, v), (q_dot, k_dot, v_dot) = primals, tangents
    inner = q @ weight, k, v @ weight
    o, lse = attention(*inner, **options, return_lse=True, backend=backend)
    dots = q_dot @ plain, k_dot, v_dot @ plain
    return o, attention_tangent(inner, dots, o, lse, **options, backend=backend)[0]

def pair(primals, tangents):
    (q, k, v), (q_dot, k_dot, v_dot) = primals, tangents
    dots = q_dot @ plain, k_dot, v_dot @ plain
    return attention_jvp((q @ weight, k, v @ weight), dots, **options, backend=backend)

def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)

def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

o, o_dot = jvp(specification, primals, tangents)
(dweight,) = torch.autograd.grad(o.square().sum(), weight)

trained = compiled(model)(*primals)
close(trained, o)
close(torch.autograd.grad(trained.square().sum(), weight)[0], dweight)
with torch.no_grad():
    close(compiled(model)(*primals), o)
close(compiled(with_lse)(*primals), specification_with_lse(*primals))
close(compiled(lse_with_tangent)(primals, tangents),
      jvp(specification_with_lse, primals, tangents))
for function in (with_tangent, pair, over_a_value):
    value, value_dot = compiled(function)(primals, tangents)
    close((value, value_dot), (o, o_dot))
    assert not value_dot.requires_grad
    close(torch.autograd.grad(value.square().sum(), weight)[0], dweight)

# Around a compiled function: right, or an error, but never a tangent of zero.
torch._dynamo.reset()
close(jvp(torch.compile(model, backend="aot_eager"), primals, tangents)[1], o_dot)
torch._dynamo.reset()
try:
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, primals, tangents)
        outside = forward_ad.unpack_dual(torch.compile(model, backend="aot_eager")(*duals)).tangent
except NotImplementedError:
    pass
else:
    close(outside, o_dot)
print("every mode is right")
"""


@backends
def test_compile(backend: str) -> None:
    """In a process of its own, since a compiler's state outlives a test."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", _COMPILED, backend, DEVICE]
    finished = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert finished.stdout.strip() == "every mode is right", finished.stderr[-3000:]
