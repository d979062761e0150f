# SPDX-License-Identifier: Apache-2.0
"""The same DiT in every mode: tangents, autocast, compilation, recomputation."""

import pytest
import torch

from disca.models import DiT
from disca_kernels import dual
from tests.model.tiny import TINY_1_5, inputs, model

MODELS = {
    "sum": {"mean_flow": True},
    "mean": {"mean_flow": True, "time_reduction": "mean", "guidance_embed": True},
    "refiner": {"mean_flow": True, "text_refiner_depth": 1},
    "1.5": {**TINY_1_5, "mean_flow": True},
}
PARAMETRISED = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())


def _problem(dtype=torch.float64, **changes):
    """Return model, function of (x, t, r), its arguments and the MeanFlow direction (v, 1, 0)."""
    net = model(dtype, **changes)
    x, t, r, cond = inputs(net.config, dtype=dtype)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(dtype)

    def func(x, t, r, **options):
        return net(x, t, r, cond, **options)

    return net, func, (x, t, r), (direction, torch.ones_like(t), torch.zeros_like(r))


def _relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@PARAMETRISED
def test_tangents_agree_with_central_differences(changes):
    _, func, primals, tangents = _problem(**changes)
    step = 1e-6
    plus, minus = (
        func(*(p + sign * step * d for p, d in zip(primals, tangents, strict=True)))
        for sign in (1, -1)
    )
    slope = (plus - minus) / (2 * step)
    value = func(*primals)
    for jvp in (torch.func.jvp, dual.jvp):
        out, out_dot = jvp(func, primals, tangents)
        torch.testing.assert_close(out, value, rtol=0, atol=1e-11)
        assert _relative(out_dot, slope) < 1e-6
    assert slope.norm() > 1e-2


@PARAMETRISED
@pytest.mark.parametrize("width", [0.05, "per row"])
def test_tangent_width_bends_the_tangent_only(changes, width):
    _, func, primals, tangents = _problem(**changes)
    if width == "per row":
        width = (primals[1] - primals[2]) / 2
    exact_out, exact = torch.func.jvp(func, primals, tangents)
    dots = []
    for jvp in (torch.func.jvp, dual.jvp):
        out, out_dot = jvp(lambda *p: func(*p, tangent_width=width), primals, tangents)
        torch.testing.assert_close(out, exact_out, rtol=0, atol=1e-11)
        dots.append(out_dot)
    torch.testing.assert_close(dots[0], dots[1], rtol=1e-9, atol=1e-10)
    assert _relative(dots[0], exact) > 1e-2


def test_tangent_width_default_and_override():
    net, func, primals, tangents = _problem(mean_flow=True, time_tangent_width=0.05)
    twin = DiT.from_teacher(net)
    assert twin.config.time_tangent_width == 0.05
    default = torch.func.jvp(func, primals, tangents)[1]
    given = torch.func.jvp(lambda *p: func(*p, tangent_width=0.05), primals, tangents)[1]
    exact = torch.func.jvp(lambda *p: func(*p, tangent_width=0.0), primals, tangents)[1]
    assert torch.equal(default, given)
    assert _relative(default, exact) > 1e-2


def test_end_time_is_never_band_limited():
    """The width belongs to t; a tangent of r passes its own embedder as it is."""
    _, func, (x, t, r), _ = _problem(mean_flow=True)
    zeros = (torch.zeros_like(x), torch.zeros_like(t), torch.ones_like(r))
    exact = torch.func.jvp(func, (x, t, r), zeros)[1]
    wide = torch.func.jvp(lambda *p: func(*p, tangent_width=0.1), (x, t, r), zeros)[1]
    torch.testing.assert_close(wide, exact)
    assert exact.norm() > 1e-3


@PARAMETRISED
def test_dual_value_trains_as_the_plain_one_and_its_tangent_does_not(changes):
    net, func, primals, tangents = _problem(torch.float32, **changes)
    out, out_dot = dual.jvp(func, primals, tangents)
    assert not out_dot.requires_grad
    out.square().mean().backward()
    through_dual = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    func(*primals).square().mean().backward()
    for name, parameter in net.named_parameters():
        if parameter.grad is None:
            assert through_dual[name] is None
        else:
            torch.testing.assert_close(through_dual[name], parameter.grad, rtol=1e-4, atol=1e-6)


@PARAMETRISED
def test_autocast_stays_close_to_float32(changes):
    net, func, primals, tangents = _problem(torch.float32, **changes)
    value, value_dot = torch.func.jvp(func, primals, tangents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = func(*primals)
        dual_out, out_dot = dual.jvp(func, primals, tangents)
    assert _relative(out.float(), value) < 0.05
    assert _relative(dual_out.float(), value) < 0.05
    assert _relative(out_dot.float(), value_dot) < 0.2
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "changes",
    [{"mean_flow": True, "single_blocks": 1}, {**TINY_1_5, "text_refiner_depth": 0}],
    ids=["1.0", "1.5"],
)
def test_compiles_without_a_graph_break(changes):
    net = model(**{**changes, "double_blocks": 1})
    x, t, r, cond = inputs(net.config)
    r = r if net.config.mean_flow else None
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, r, cond), net(x, t, r, cond), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, TINY_1_5], ids=["1.0", "1.5"])
def test_gradient_checkpointing_changes_memory_not_results(changes):
    net = model(**changes)
    x, t, _, cond = inputs(net.config)

    def run():
        kept = []
        net.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
            out = net(x, t, cond=cond)
        out.square().sum().backward()
        return out, [p.grad for p in net.parameters()], len(kept)

    plain, plain_grads, plain_kept = run()
    net.gradient_checkpointing = True
    out, grads, kept = run()
    assert torch.equal(out, plain)
    for grad, expected in zip(grads, plain_grads, strict=True):
        assert (grad is None and expected is None) or torch.equal(grad, expected)
    assert kept < plain_kept / 2


def test_gradient_checkpointing_steps_aside_or_serves_in_forward_mode():
    net, func, primals, tangents = _problem(mean_flow=True)
    expected = torch.func.jvp(func, primals, tangents)
    net.gradient_checkpointing = True
    for jvp in (torch.func.jvp, dual.jvp):
        out, out_dot = jvp(func, primals, tangents)
        torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-11)
        torch.testing.assert_close(out_dot, expected[1], rtol=1e-9, atol=1e-10)
        out.sum().backward()
