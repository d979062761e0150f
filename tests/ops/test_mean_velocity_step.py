# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from disca_kernels import mean_velocity_step, mean_velocity_step_jvp
from disca_kernels.ops.mean_velocity_step.cases import (
    MeanVelocityStepCase,
    mean_velocity_step_in_dtype,
)
from disca_kernels.ops.mean_velocity_step.reference import (
    mean_velocity_step_jvp_reference,
    mean_velocity_step_reference,
)
from tests.ops.battery import DEVICE, Battery, Subject, backends

OP = "mean_velocity_step"
BACKENDS, KERNELS = backends(OP), backends(OP, kernels_only=True)
BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64


class TestMeanVelocityStep(Battery):
    # Lengths on both sides of a part; one, three and five dimensions.
    subject = Subject(
        OP,
        mean_velocity_step,
        mean_velocity_step_jvp,
        mean_velocity_step_reference,
        [
            MeanVelocityStepCase((2, 5, 24)),
            MeanVelocityStepCase((3, 4, 3, 5, 7)),
            MeanVelocityStepCase((4,)),
            MeanVelocityStepCase((1, 2051)),
            MeanVelocityStepCase((2, 5, 33), BF16),
            MeanVelocityStepCase((2, 5, 33), torch.float32, BF16),
            MeanVelocityStepCase((2, 4, 17), FP16, torch.float32, FP64),
            MeanVelocityStepCase((2, 3, 17, 19), FP16),
            MeanVelocityStepCase((2, 16, 9, 30)),
        ],
    )


def test_reference_is_what_samplers_write():
    primals = MeanVelocityStepCase((2, 3, 4), FP64, time_dtype=FP64).operands().primals
    x, u, t, r = primals
    expected = torch.stack([x[b] - (t[b] - r[b]) * u[b] for b in range(2)])
    torch.testing.assert_close(mean_velocity_step_reference(*primals), expected)
    torch.testing.assert_close(mean_velocity_step_in_dtype(*primals), expected)


def test_closed_formula_of_the_reference():
    primals, tangents, _ = MeanVelocityStepCase((2, 3, 4), FP64, time_dtype=FP64).operands()
    expected = torch.func.jvp(mean_velocity_step_reference, primals, tangents)
    actual = mean_velocity_step_jvp_reference(primals, tangents)
    torch.testing.assert_close(actual, expected)


def test_gradcheck_of_the_reference():
    primals = MeanVelocityStepCase((2, 3), FP64, time_dtype=FP64).operands().primals
    leaves = [t.detach().clone().requires_grad_() for t in primals]
    assert torch.autograd.gradcheck(mean_velocity_step_reference, leaves, check_forward_ad=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_add_up(backend):
    """Two steps along one mean velocity are the step over both."""
    x, u, _, _ = MeanVelocityStepCase((2, 3, 8)).operands(device=DEVICE).primals
    t, s, r = (torch.full((2,), time, device=DEVICE) for time in (1.0, 0.5, 0.25))
    half = mean_velocity_step(x, u, t, s, backend=backend)
    twice = mean_velocity_step(half, u, s, r, backend=backend)
    torch.testing.assert_close(twice, mean_velocity_step(x, u, t, r, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_times_keep_their_digits(backend):
    t = torch.tensor([0.5], dtype=FP64, device=DEVICE)
    r = t - 1e-12
    u = torch.full((1, 4), 1e12, device=DEVICE)
    step = mean_velocity_step(torch.zeros_like(u), u, t, r, backend=backend)
    torch.testing.assert_close(step, -((t - r) * 1e12).float().expand(1, 4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_of_x_is_the_cotangent(kernel):
    x, u, t, r = MeanVelocityStepCase((2, 3, 8)).operands(device=DEVICE).primals
    leaf, cotangent = x.clone().requires_grad_(), torch.randn_like(u)
    seen = []
    leaf.register_hook(seen.append)
    mean_velocity_step(leaf, u, t, r, backend=kernel).backward(cotangent)
    assert seen[0].data_ptr() == cotangent.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_numbers_stay_alone(backend):
    x, u, t, r = (
        a.clone() for a in MeanVelocityStepCase((2, 3, 8)).operands(device=DEVICE).primals
    )
    clean = mean_velocity_step(x, u, t, r, backend=backend)
    x[0, 1, 2], u[1, 2, 3] = math.nan, math.inf
    y = mean_velocity_step(x, u, t, r, backend=backend)
    assert y[0, 1, 2].isnan()
    assert y[1, 2, 3] == -math.inf
    y[0, 1, 2], y[1, 2, 3] = clean[0, 1, 2], clean[1, 2, 3]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty(shape, backend):
    primals, tangents, cotangents = MeanVelocityStepCase(shape).operands(device=DEVICE)
    leaves = [a.detach().requires_grad_() for a in primals]
    y, y_dot = mean_velocity_step_jvp(leaves, tangents, backend=backend)
    assert y.shape == y_dot.shape == shape
    gradients = torch.autograd.grad(y, leaves, cotangents)
    assert [g.shape for g in gradients] == [a.shape for a in primals]
    assert torch.equal(gradients[2], torch.zeros_like(gradients[2]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_elements_beyond_the_reach_of_32_bits(kernel):
    """Two samples 2^31 elements apart; only the pages that are touched exist."""
    apart = 2**31
    storage = torch.empty(apart + 64, dtype=BF16, device=DEVICE)
    x = storage.as_strided((2, 2, 32), (apart, 32, 1))
    plain, *rest = MeanVelocityStepCase((2, 2, 32), BF16).operands(device=DEVICE).primals
    x.copy_(plain)
    expected = mean_velocity_step(plain, *rest, backend=kernel)
    assert torch.equal(mean_velocity_step(x, *rest, backend=kernel), expected)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((), (), (1,), (1,)), r"x must be \[B, \.\.\.\], got a tensor without dimensions"),
        (((2, 3), (2, 1), (2,), (2,)), r"u must have the shape of x, \[2, 3\], got \[2, 1\]"),
        (((2, 3), (2, 3), (1,), (2,)), r"t must be \[B\] = \[2\] for x \[2, 3\], got \[1\]"),
        (((2, 3), (2, 3), (2,), ()), r"r must be \[B\] = \[2\] for x \[2, 3\], got \[\]"),
    ],
)
def test_rejects_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        mean_velocity_step(*(torch.zeros(s) for s in shapes))


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ((torch.int32, torch.float32, torch.float32, torch.float32), "x must be one of .*int32"),
        ((torch.float32, torch.int32, torch.float32, torch.float32), "u must be one of .*int32"),
        ((BF16, BF16, BF16, BF16), r"t must be one of .*float64, got torch\.bfloat16"),
        (
            (torch.float32, torch.float32, torch.float32, FP64),
            r"t and r must have one dtype, got t torch\.float32 and r torch\.float64",
        ),
    ],
)
def test_rejects_dtypes(dtypes, message):
    shapes = ((2, 3), (2, 3), (2,), (2,))
    with pytest.raises(TypeError, match=message):
        mean_velocity_step(*(torch.zeros(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)))


def test_rejects_devices_tangents_and_what_is_no_tensor():
    x, t = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(ValueError, match="r is on meta, x is on cpu"):
        mean_velocity_step(x, x, t, t.to("meta"))
    with pytest.raises(TypeError, match="t must be a tensor, got float"):
        mean_velocity_step(x, x, 1.0, t)
    with pytest.raises(ValueError, match=r"t_dot must match t \[2\].*got \[3\]"):
        mean_velocity_step_jvp((x, x, t, t), (x, x, torch.zeros(3), t))
    with pytest.raises(ValueError, match="4 primals are needed, got 3"):
        mean_velocity_step_jvp((x, x, t), (x, x, t))
