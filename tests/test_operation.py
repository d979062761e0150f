# SPDX-License-Identifier: Apache-2.0
"""FusedOperation on an operation that has one of everything: two outputs, an extra, a weight
without a batch, a constant, an optional operand, and an operand whose gradient is a cotangent.

    z = x + shift * gain        a = x + shift        b = sin(z) * weight * table + bias
"""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from disca_kernels.backend import Backend
from disca_kernels.operation import FusedOperation

N_BATCH, N_CHANNELS = 3, 4


def reference(x, shift, weight, table, bias, gain):
    z = x + shift * gain
    b = z.sin() * weight * table
    return x + shift, b if bias is None else b + bias


def jvp_reference(primals, tangents, gain):
    x, shift, weight, table, bias = primals
    x_dot, shift_dot, weight_dot, _, bias_dot = (
        torch.zeros_like(p) if t is None and p is not None else t
        for p, t in zip(primals, tangents, strict=True)
    )
    z, z_dot = x + shift * gain, x_dot + shift_dot * gain
    b_dot = (z.cos() * z_dot * weight + z.sin() * weight_dot) * table
    dots = x_dot + shift_dot, b_dot if bias is None else b_dot + bias_dot
    return reference(*primals, gain), dots


def launch_fwd(operands, options, keep):
    x, shift, *_ = operands
    z = x + shift * options[0] if keep else x.new_empty(0)
    return (*reference(*operands, *options), z)


def launch_bwd(cotangents, saved, needs, options):
    da, db = cotangents
    weight, table, z = saved
    assert z.numel(), "the extra was not kept"
    zero = torch.zeros_like(z)
    db = zero if db is None else db
    da = zero if da is None else da
    dz = db * z.cos() * weight * table
    full = (
        dz + da,
        dz * options[0] + da,
        (db * z.sin() * table).sum(0),
        None,
        db.sum(0),
    )
    return tuple(g if need else None for g, need in zip(full, needs, strict=True))


def launch_jvp(primals, tangents, options, with_value, keep):
    dots = jvp_reference(primals, tangents, *options)[1]
    return launch_fwd(primals, options, keep) if with_value else None, dots


class Toy(FusedOperation):
    def launchers(self, backend):
        return SimpleNamespace(launch_fwd=launch_fwd, launch_bwd=launch_bwd, launch_jvp=launch_jvp)


def fake(operands, options, keep):
    x = operands[0]
    return [
        torch.empty_like(x),
        torch.empty_like(x),
        torch.empty_like(x) if keep else x.new_empty(0),
    ]


TOY = Toy(
    "toy_of_test_operation",
    operands=("x", "shift", "weight", "table", "bias"),
    options="float gain",
    outputs=2,
    reference=reference,
    jvp_reference=jvp_reference,
    fake=fake,
    saved=("weight", "table", "result2"),
    like={"x": "result2", "shift": "result2", "bias": "weight"},
    unbatched=("weight", "table", "bias"),
    constant=("table",),
)
BOTH = pytest.mark.parametrize("backend", [Backend.CPU, Backend.EAGER], ids=str)


def operands(n=N_BATCH, bias=True):
    generator = torch.Generator().manual_seed(0)
    shapes = [(n, N_CHANNELS)] * 2 + [(N_CHANNELS,)] * 3
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [*drawn[:4], drawn[4] if bias else None]


def leaves_of(bias=True):
    """Operands that autograd tracks, but for the constant."""
    drawn = operands(bias=bias)
    return [x if x is None or i == 3 else x.requires_grad_() for i, x in enumerate(drawn)]


def tangents():
    drawn = [torch.cos(3 * x) for x in operands()]
    drawn[3] = None
    return drawn


def of(backend):
    return lambda *given: TOY.value(given, (1.5,), backend)


def exact_tangent():
    table = operands()[3]

    def without_table(x, shift, weight, bias):
        return reference(x, shift, weight, table, bias, 1.5)

    keep = [0, 1, 2, 4]
    primals, dots = [operands()[i] for i in keep], [tangents()[i] for i in keep]
    return torch.func.jvp(without_table, tuple(primals), tuple(dots))


def along(function):
    """torch.func.jvp in everything but the constant."""
    table = operands()[3]
    keep = [0, 1, 2, 4]
    return torch.func.jvp(
        lambda x, s, w, b: function(x, s, w, table, b),
        tuple(operands()[i] for i in keep),
        tuple(tangents()[i] for i in keep),
    )


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@BOTH
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients(backend, bias):
    leaves = leaves_of(bias)
    wanted = [x for i, x in enumerate(leaves) if x is not None and i != 3]

    def gradients(outputs):
        return torch.autograd.grad((outputs[0] * 2 + outputs[1].square()).sum(), wanted)

    expected = reference(*leaves, 1.5)
    close(of(backend)(*leaves), expected)
    close(gradients(of(backend)(*leaves)), gradients(expected))


@pytest.mark.parametrize("unused", [0, 1])
def test_an_output_that_is_not_used(unused):
    leaves = leaves_of()
    expected = torch.autograd.grad(
        reference(*leaves, 1.5)[1 - unused].sum(), leaves[:2], allow_unused=True
    )
    close(torch.autograd.grad(of(Backend.CPU)(*leaves)[1 - unused].sum(), leaves[:2]), expected)


@BOTH
def test_forward_mode(backend):
    close(along(of(backend)), exact_tangent())
    with forward_ad.dual_level():
        duals = [
            x if t is None else forward_ad.make_dual(x, t)
            for x, t in zip(operands(), tangents(), strict=True)
        ]
        dots = [forward_ad.unpack_dual(y).tangent for y in of(backend)(*duals)]
    close(tuple(dots), exact_tangent()[1])


@BOTH
def test_value_and_tangent(backend):
    leaves = leaves_of()
    outputs, dots = TOY.value_and_tangent(tuple(leaves), tuple(tangents()), (1.5,), backend)
    close((outputs, dots), exact_tangent())
    assert not any(dot.requires_grad for dot in dots)
    expected = torch.autograd.grad(reference(*leaves, 1.5)[1].sum(), leaves[:3])
    close(torch.autograd.grad(outputs[1].sum(), leaves[:3]), expected)


@BOTH
def test_a_constant_has_no_tangent(backend):
    dots = (None, None, None, torch.ones(N_CHANNELS, dtype=torch.float64), None)
    with pytest.raises(NotImplementedError, match="table is a constant and cannot have a tangent"):
        TOY.value_and_tangent(tuple(operands()), dots, (1.5,), backend)
    with pytest.raises(NotImplementedError, match="table is a constant"):
        torch.func.jvp(
            lambda table: of(backend)(*operands()[:3], table, None), (operands()[3],), (dots[3],)
        )


@BOTH
def test_a_constant_has_no_gradient(backend):
    given = operands()
    given[3].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"pass table\.detach\(\)"):
        of(backend)(*given)
    with pytest.raises(NotImplementedError, match=r"pass table\.detach\(\)"):
        TOY.value_and_tangent(tuple(given), (None,) * 5, (1.5,), backend)
    with torch.no_grad():
        close(of(backend)(*given), reference(*given, 1.5))


def test_the_old_vmap_is_refused_by_name():
    leaves = leaves_of()
    y = of(Backend.CPU)(*leaves)[1]
    with pytest.raises(NotImplementedError, match=r"toy_of_test_operation: is_grads_batched=True"):
        torch.autograd.grad(y, leaves[0], torch.ones(2, *y.shape).double(), is_grads_batched=True)


@BOTH
def test_pair_refuses_duals(backend):
    def pair(x):
        return TOY.value_and_tangent((x, *operands()[1:]), (None,) * 5, (1.5,), backend)[0]

    with pytest.raises(NotImplementedError, match="carries a tangent of its own"):
        torch.func.jvp(pair, (operands()[0],), (operands()[0],))


def test_second_derivatives_of_a_kernel_are_refused():
    leaves = leaves_of()
    (dx,) = torch.autograd.grad(of(Backend.CPU)(*leaves)[1].sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        dx.sum().backward()
    rest, x = operands()[1:], operands()[0]

    def tangent(x):
        return torch.func.jvp(lambda x: of(Backend.CPU)(x, *rest), (x,), (x,))[1]

    with pytest.raises(NotImplementedError, match="jvp of jvp"):
        torch.func.jvp(tangent, (x,), (x,))


def test_eager_in_forward_mode_has_second_gradients():
    x = operands()[0].requires_grad_()

    def value(x):
        return torch.func.jvp(lambda x: of(Backend.EAGER)(x, *operands()[1:])[1], (x,), (x,))[0]

    (dx,) = torch.autograd.grad(value(x).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    _, shift, weight, table, _ = operands()
    close(ddx, -(x + 1.5 * shift).sin() * weight * table)


@BOTH
@pytest.mark.parametrize("mapped", [(0, 1), (0, 2), (2, 4), (0,)], ids=str)
def test_vmap_of_value_gradient_and_jvp(backend, mapped):
    names = range(5)
    stacked = [
        torch.stack([x + k for k in (0.0, 0.3)], dim=0) if i in mapped else x
        for i, x in enumerate(operands())
    ]
    in_dims = tuple(0 if i in mapped else None for i in names)

    def gradient(*given):
        loss = lambda *g: sum(y.square().sum() for y in of(backend)(*g))  # noqa: E731
        return torch.func.grad(loss, argnums=(0, 1, 2, 4))(*given)

    def tangent(*given):
        return torch.func.jvp(lambda x: of(backend)(x, *given[1:]), given[:1], given[:1])

    for function in (of(backend), gradient, tangent):
        actual = torch.vmap(function, in_dims=in_dims)(*stacked)
        each = [
            function(*(x[k] if i in mapped else x for i, x in enumerate(stacked))) for k in (0, 1)
        ]
        flat = torch.utils._pytree.tree_leaves
        close(flat(actual), [torch.stack(pair) for pair in zip(*map(flat, each), strict=True)])


def test_the_extra_is_kept_only_for_a_backward_pass(monkeypatch):
    kept = []

    def recorded(operands, options, keep):
        kept.append(keep)
        return launch_fwd(operands, options, keep)

    monkeypatch.setattr(TOY, "launchers", lambda _: SimpleNamespace(launch_fwd=recorded))
    of(Backend.CPU)(*operands())
    of(Backend.CPU)(*leaves_of())
    with torch.no_grad():
        of(Backend.CPU)(*leaves_of())
    torch.func.vjp(lambda x: of(Backend.CPU)(x, *operands()[1:]), operands()[0])
    assert kept == [False, True, False, True]


def test_plain_calls_run_what_the_operators_run(monkeypatch):
    """Without gradients, transforms or modes the operators are left out; with them they are not."""
    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    expected = of(Backend.CPU)(*operands())
    monkeypatch.setitem(TOY._kernels.operators, "fwd", None)
    close(of(Backend.CPU)(*operands()), expected)
    close(of(Backend.CPU)(*leaves_of()), expected)
    monkeypatch.undo()
    with Recorder():
        close(of(Backend.CPU)(*operands()), expected)
    assert "disca_kernels::toy_of_test_operation_fwd" in called


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_whole_in_every_mode(compiler):
    leaves = leaves_of()

    def loss(*given):
        return sum(y.square().sum() for y in of(Backend.CPU)(*given))

    directions = tuple(tangents())

    def pair(*given):
        outputs, dots = TOY.value_and_tangent(given, directions, (1.5,), Backend.CPU)
        return *outputs, *dots

    def tangent(x, *rest):
        return torch.func.jvp(lambda x: of(Backend.CPU)(x, *rest), (x,), (x,))

    compiled = torch.compile(loss, backend=compiler, fullgraph=True)
    close(
        torch.autograd.grad(compiled(*leaves), leaves[:3]),
        torch.autograd.grad(loss(*leaves), leaves[:3]),
    )
    detached = [x.detach() for x in leaves]
    expected = [*exact_tangent()[0], *exact_tangent()[1]]
    close(list(torch.compile(pair, backend=compiler, fullgraph=True)(*detached)), expected)
    compiled = torch.compile(tangent, backend=compiler, fullgraph=True)
    close(compiled(*detached), tangent(*detached))
