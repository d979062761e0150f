# SPDX-License-Identifier: Apache-2.0
"""adaln_modulate under torch.func, forward_ad, torch.compile: what the battery leaves out."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from disca_kernels import adaln_modulate, adaln_modulate_jvp, why_not
from disca_kernels.ops.adaln_modulate.cases import AdalnModulateCase
from disca_kernels.ops.adaln_modulate.reference import (
    adaln_modulate_jvp_reference,
    adaln_modulate_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERANDS = AdalnModulateCase(2, 3, 8).operands(device=DEVICE)
PRIMALS, TANGENTS, (COTANGENT,) = OPERANDS.primals[:3], OPERANDS.tangents[:3], OPERANDS.cotangents
X, SHIFT, SCALE = PRIMALS


def _runs(backend: str) -> pytest.MarkDecorator:
    reasons = why_not("adaln_modulate", backend, X)
    return pytest.mark.skipif(bool(reasons), reason="; ".join(reasons))


BACKENDS = [pytest.param(b, marks=_runs(b)) for b in ("eager", "triton", "cpu", "cuda")]
KERNELS = BACKENDS[1:]


@pytest.fixture(params=BACKENDS)
def op(request):
    return lambda x, shift, scale: adaln_modulate(x, shift, scale, backend=request.param)


@pytest.fixture(params=KERNELS)
def kernel(request):
    return lambda x, shift, scale: adaln_modulate(x, shift, scale, backend=request.param)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def leaves() -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in PRIMALS]


def test_tangent_of_another_dtype(op):
    half = tuple(t.bfloat16() for t in PRIMALS)
    _, y_dot = torch.func.jvp(op, half, TANGENTS)
    _, expected = torch.func.jvp(adaln_modulate_reference, PRIMALS, TANGENTS)
    torch.testing.assert_close(y_dot.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pair_keeps_nothing_of_the_tangent(backend):
    saved = []
    primals, tangents = leaves(), [t.clone().requires_grad_() for t in TANGENTS]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, _ = adaln_modulate_jvp(tuple(primals), tuple(tangents), backend=backend)
    kept = {t.data_ptr() for t in saved}
    assert kept.isdisjoint(t.data_ptr() for t in tangents)
    y.sum().backward()
    assert all(t.grad is None for t in tangents)


def test_func_grad(op):
    def loss(function):
        return lambda *primals: (function(*primals) * COTANGENT).sin().sum()

    expected = torch.func.grad(loss(adaln_modulate_reference), (0, 1, 2))(*PRIMALS)
    close(torch.func.grad(loss(op), (0, 1, 2))(*PRIMALS), expected)


@pytest.mark.parametrize(
    "in_dims", [(0, 0, 0), (0, None, None), (None, 0, 1), (2, None, 0)], ids=str
)
def test_vmap(op, in_dims):
    def stacked(t, dim):
        return t if dim is None else torch.stack([t, 2 * t, t - 1], dim)

    operands = [stacked(t, dim) for t, dim in zip(PRIMALS, in_dims, strict=True)]
    expected = torch.vmap(adaln_modulate_reference, in_dims)(*operands)
    close(torch.vmap(op, in_dims)(*operands), expected)


@pytest.mark.parametrize("jacobian", [torch.func.jacfwd, torch.func.jacrev])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_jacobians(op, jacobian, index):
    close(
        jacobian(op, index)(*PRIMALS),
        torch.func.jacrev(adaln_modulate_reference, index)(*PRIMALS),
    )


def test_jvp_of_vmap(op):
    operands = tuple(torch.stack([t, t + 1]) for t in PRIMALS)
    directions = tuple(torch.stack([v, -v]) for v in TANGENTS)
    expected = torch.func.jvp(torch.vmap(adaln_modulate_reference), operands, directions)
    close(torch.func.jvp(torch.vmap(op), operands, directions), expected)


def test_gradcheck():
    primals = [t.double().requires_grad_() for t in PRIMALS]
    assert torch.autograd.gradcheck(
        adaln_modulate, primals, check_forward_ad=True, check_batched_grad=True
    )


def test_jvp_of_jvp_in_another_operand_is_refused(op):
    def once(scale):
        return torch.func.jvp(lambda z: op(z, SHIFT, scale), (X,), (TANGENTS[0],))[1]

    with pytest.raises(NotImplementedError, match="jvp of jvp"):
        torch.func.jvp(once, (SCALE,), (TANGENTS[2],))


def test_second_derivatives_are_refused_by_kernels(kernel):
    def gradient(x):
        return torch.func.grad(lambda z: kernel(z, SHIFT, SCALE).sin().sum())(x)

    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        torch.func.jvp(gradient, (X,), (TANGENTS[0],))
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        torch.func.grad(lambda x: gradient(x).square().sum())(X)
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(kernel(x, SHIFT, SCALE).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        dx.sum().backward()


def test_second_derivatives_on_eager():
    def gradient(function):
        return torch.func.grad(lambda z: function(z, SHIFT, SCALE).sin().sum())

    def eager(*operands):
        return adaln_modulate(*operands, backend="eager")

    expected = torch.func.jvp(gradient(adaln_modulate_reference), (X,), (TANGENTS[0],))
    close(torch.func.jvp(gradient(eager), (X,), (TANGENTS[0],)), expected)


@pytest.fixture(params=BACKENDS)
def compiled(request):
    torch._dynamo.reset()
    backend = request.param

    def compile_whole(function):
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    return compile_whole, lambda *primals: adaln_modulate(*primals, backend=backend), backend


def test_compile_a_loss_with_a_tangent(compiled):
    """The training step of MeanFlow in small: weights under the op, a detached tangent beside."""
    compile_whole, op, _ = compiled

    def loss(function):
        def of(weight, x, x_dot):
            def model(z):
                return function(z @ weight, SHIFT, SCALE) * z

            y, y_dot = torch.func.jvp(model, (x,), (x_dot,))
            return (y * y_dot.detach()).sum()

        return of

    weight = torch.eye(8, device=DEVICE) + 0.1
    actual, expected = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    compile_whole(loss(op))(actual, X, TANGENTS[0]).backward()
    loss(adaln_modulate_reference)(expected, X, TANGENTS[0]).backward()
    assert expected.grad.abs().max() > 1
    close(actual.grad, expected.grad)


def test_compile_pair(compiled):
    compile_whole, _, backend = compiled
    primals = leaves()

    @compile_whole
    def pair(primals, x_dot, scale_dot):
        return adaln_modulate_jvp(tuple(primals), (x_dot, None, scale_dot), backend=backend)

    y, y_dot = pair(primals, TANGENTS[0], TANGENTS[2])
    tangents = (TANGENTS[0], None, TANGENTS[2])
    close((y, y_dot), adaln_modulate_jvp_reference((*PRIMALS, None, None), (*tangents, None, None)))
    assert not y_dot.requires_grad
    y.backward(COTANGENT)
    expected = leaves()
    adaln_modulate_reference(*expected).backward(COTANGENT)
    close([t.grad for t in primals], [t.grad for t in expected])


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_code_inside_dual_level_is_refused(backend, fullgraph):
    """Compiled code drops the tangents of its inputs; also when it was compiled before."""
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=fullgraph)
    def function(x):
        return adaln_modulate(x, SHIFT, SCALE, backend=backend)

    close(function(X), adaln_modulate_reference(*PRIMALS))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, TANGENTS[0])
        with pytest.raises(
            NotImplementedError, match=r"torch\.compile inside forward_ad\.dual_level"
        ):
            function(dual)
