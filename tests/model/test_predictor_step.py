# SPDX-License-Identifier: Apache-2.0
"""The skipped step as a unit: its result, its static shapes, what it refuses."""

import pytest
import torch

from disca.errors import UserError
from disca.models import Condition, DiT, DiTConfig, Predictor, PredictorStep
from disca_kernels import use_backend
from tests.model.tiny import TINY_1_5, config, inputs, roughen

KINDS = {"1.0": config(mean_flow=True), "1.5": DiTConfig(**TINY_1_5)}
KIND = pytest.mark.parametrize("host_config", KINDS.values(), ids=KINDS.keys())


def case(host_config, **size):
    torch.manual_seed(0)
    host = roughen(DiT(host_config))
    predictor = roughen(Predictor(host_config, form="residual"), seed=3)
    x, t, r, cond = inputs(host_config, **size)
    with torch.no_grad():
        cache = host.run(host.embed(x, t, r if host.mean_flow else None, cond)).tokens
    return PredictorStep(host, predictor), (x, t, r, cond, cache)


@KIND
def test_is_what_its_parts_do_one_by_one(host_config):
    step, (x, t, r, cond, cache) = case(host_config)
    end = r if host_config.mean_flow else None
    with torch.no_grad():
        state = step.host.embed(x, t, end, cond)
        velocity = step.predictor.velocity(step.host, state, cache)
        result = step(x, t, r, cond, cache)
    expected = x - (t - r).view(-1, 1, 1, 1, 1) * velocity
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert (result - x).abs().max() > 1e-2


@KIND
def test_runs_unfused(host_config):
    step, given = case(host_config)
    with torch.no_grad():
        fused = step(*given)
        with use_backend("eager"):
            torch.testing.assert_close(step(*given), fused, rtol=1e-4, atol=1e-5)


@KIND
def test_never_reads_a_value(host_config):
    """On the meta device there are none: shapes are static and nothing waits for a device."""
    step, given = case(host_config)
    step.to("meta")
    moved = [x.to("meta") for x in given]
    with torch.no_grad():
        result = step(*moved)
    assert result.device.type == "meta"
    assert result.shape == given[0].shape


@KIND
def test_compiles_without_a_graph_break(host_config):
    step, given = case(host_config)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), step(*given), rtol=1e-4, atol=1e-5)


def test_a_half_precision_network_moves_a_float32_sample():
    """A step of 1e-4 is far below the rounding of a bfloat16 sample."""
    step, (x, t, r, cond, cache) = case(config(mean_flow=True))
    step.to(torch.bfloat16)
    cond, cache = cond.to(dtype=torch.bfloat16), cache.bfloat16()
    r = t - 1e-4
    with torch.no_grad():
        velocity = step.predictor.velocity(step.host, step.host.embed(x, t, r, cond), cache)
        result = step(x, t, r, cond, cache)
    assert velocity.dtype == torch.bfloat16
    assert result.dtype == torch.float32
    expected = x - (t - r).view(-1, 1, 1, 1, 1) * velocity.float()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda cache: cache.double(),
            "tokens are torch.float32 on cpu, the cache is torch.float64",
        ),
        (
            lambda cache: cache.to("meta"),
            "tokens are torch.float32 on cpu, .* torch.float32 on meta",
        ),
        (lambda cache: None, "the cache must be a tensor, got NoneType"),
    ],
    ids=["dtype", "device", "none"],
)
def test_refuses_a_cache_that_cannot_be_read(wrong, message):
    step, (x, t, r, cond, cache) = case(config(mean_flow=True))
    with pytest.raises(UserError, match=message):
        step(x, t, r, cond, wrong(cache))


@pytest.mark.parametrize("changed", ["batch", "resolution", "width"])
def test_refuses_a_cache_of_another_run(changed):
    step, (x, t, r, cond, cache) = case(config(mean_flow=True))
    wrong = {"batch": cache[:2], "resolution": cache[:, :-6], "width": cache[..., :12]}[changed]
    with pytest.raises(UserError, match=r"tokens \[3, 23, 24\], got .*another batch, resolution"):
        step(x, t, r, cond, wrong)


def test_capture_needs_a_cuda_device():
    step, given = case(config(mean_flow=True))
    with pytest.raises(UserError, match="must be on a CUDA device, got cpu"):
        step.capture(*given)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@KIND
def test_a_captured_step_repeats_the_step_on_new_inputs(host_config):
    step, given = case(host_config)
    step.cuda()
    x, t, r, cond, cache = (tensor.to("cuda") for tensor in given)
    captured = step.capture(x, t, r, cond, cache)
    for shift in (0.0, 0.1):
        moved = (x + shift, t - shift, r - shift, cond, cache * (1 + shift))
        with torch.no_grad():
            expected = step(*moved)
        first = captured(*moved)
        torch.testing.assert_close(first, expected)
        captured(x + 1, t, r, cond, cache)
        torch.testing.assert_close(first, expected)  # its result is not overwritten
    with pytest.raises(UserError, match="was captured for"):
        captured(x[:2], t[:2], r[:2], cond.select(slice(2)), cache[:2])
    with pytest.raises(UserError, match="a captured step has no gradient"):
        captured(x.requires_grad_(), t, r, cond, cache)
    x = x.detach()
    with pytest.raises(UserError, match="for a condition with"):
        captured(x, t, r, Condition(cond.text, cond.text_lengths), cache)
