# SPDX-License-Identifier: Apache-2.0
"""Time features: exact value and gradient, and a tangent that is band-limited on purpose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from disca_kernels import BackendError, timestep_features, timestep_features_jvp
from disca_kernels.ops.timestep_features.cases import TimestepFeaturesCase
from disca_kernels.ops.timestep_features.reference import (
    timestep_features_jvp_reference,
    timestep_features_reference,
    timestep_features_vjp_reference,
)
from disca_kernels.testing import assert_within_budget
from disca_kernels.testing.codegen import ARCHITECTURES, compile_kernels, registered

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
CASES = [
    TimestepFeaturesCase(5, 256),
    TimestepFeaturesCase(1, 2),
    TimestepFeaturesCase(3, 7),
    TimestepFeaturesCase(2, 1001),
    TimestepFeaturesCase(4, 64, BF16),
    TimestepFeaturesCase(4, 65, F16),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
backends = pytest.mark.parametrize("backend", ["eager", "triton"])


@backends
@cases
def test_forward(case: TimestepFeaturesCase, backend: str) -> None:
    t = case.operands(device=DEVICE).t
    expected = timestep_features_reference(t.double(), case.dim)
    eager = timestep_features_reference(t, case.dim)
    actual = timestep_features(t, case.dim, tangent_width=0.1, backend=backend)
    assert_within_budget(actual, expected, eager, name="timestep_features")


@backends
@cases
def test_backward(case: TimestepFeaturesCase, backend: str) -> None:
    """Exact whatever the width: the gradient of the value, which does not depend on it."""
    t, _, width, cotangent = case.operands(device=DEVICE)

    def gradient(function, t: Tensor, **options: object) -> Tensor:
        leaf = t.detach().requires_grad_()
        features = function(leaf, case.dim, **options)
        return torch.autograd.grad(features, leaf, cotangent.to(features.dtype))[0]

    expected = gradient(timestep_features_reference, t.double())
    eager = gradient(timestep_features_reference, t)
    actual = gradient(timestep_features, t, tangent_width=width, backend=backend)
    assert_within_budget(actual, expected, eager, name="timestep_features dt")


@pytest.mark.parametrize("way", ["pair", "func.jvp"])
@pytest.mark.parametrize("kind", ["exact", "number", "tensor"])
@backends
@cases
def test_jvp(case: TimestepFeaturesCase, backend: str, kind: str, way: str) -> None:
    t, t_dot, widths, _ = case.operands(device=DEVICE)
    width = {"exact": 0.0, "number": 0.03, "tensor": widths}[kind]
    wide = width.double() if isinstance(width, Tensor) else width
    expected = timestep_features_jvp_reference(
        t.double(), t_dot.double(), case.dim, tangent_width=wide
    )
    eager = timestep_features_jvp_reference(t, t_dot, case.dim, tangent_width=width)
    options = {"tangent_width": width, "backend": backend}
    if way == "pair":
        actual = timestep_features_jvp(t, t_dot, case.dim, **options)
    else:
        actual = jvp(lambda t: timestep_features(t, case.dim, **options), (t,), (t_dot,))
    for name, a, r, e in zip(("value", "tangent"), actual, expected, eager, strict=True):
        assert_within_budget(a, r, e, name=f"timestep_features {name}")


def averaged_slope(t: Tensor, width: Tensor, dim: int, nodes: int = 4001) -> Tensor:
    """d/dt of the mean of the features over t - h .. t + h, by Simpson's rule on the derivative."""
    offsets = torch.linspace(-1, 1, nodes, dtype=F64)
    weights = torch.full((nodes,), 2.0, dtype=F64)
    weights[1::2] = 4.0
    weights[0] = weights[-1] = 1.0
    weights /= weights.sum()
    times = (t[:, None] + width[:, None] * offsets).flatten()
    _, slopes = jvp(
        lambda x: timestep_features_reference(x, dim), (times,), (torch.ones_like(times),)
    )
    return torch.einsum("n,bnd->bd", weights, slopes.view(len(t), nodes, dim))


def test_the_tangent_is_the_derivative_of_the_averaged_features() -> None:
    t = torch.tensor([0.0, 0.31, 0.77, 1.0, 0.5], dtype=F64)
    width = torch.tensor([0.05, 0.01, 0.002, 0.1, 0.0], dtype=F64)
    _, actual = timestep_features_jvp(t, torch.ones_like(t), 64, tangent_width=width)
    torch.testing.assert_close(actual, averaged_slope(t, width, 64), rtol=1e-6, atol=1e-6)
    # The same in closed form: the slope of an average is the rise over the run.
    up, down = (timestep_features_reference(t[:-1] + s * width[:-1], 64).double() for s in (1, -1))
    rise_over_run = (up - down) / (2 * width[:-1, None])
    torch.testing.assert_close(actual[:-1], rise_over_run, rtol=1e-9, atol=1e-9)


def test_width_zero_is_the_exact_derivative() -> None:
    t, t_dot, _, _ = TimestepFeaturesCase(6, 65, F64).operands()
    exact = jvp(lambda t: timestep_features_reference(t, 65), (t,), (t_dot,))
    for width in (0.0, torch.zeros_like(t)):
        pair = timestep_features_jvp(t, t_dot, 65, tangent_width=width)
        torch.testing.assert_close(pair, exact, rtol=1e-13, atol=1e-10)


@backends
@pytest.mark.parametrize("width", [1e-45, 1e-30, 1e-12, 1e-9, 1e-7, 1e-6])
def test_a_vanishing_width_is_as_accurate_as_none(width: float, backend: str) -> None:
    """Sine of y over y keeps its accuracy as y goes to 0, where a cancelling form would not."""
    t, t_dot, _, _ = TimestepFeaturesCase(4, 64).operands(device=DEVICE)
    _, exact = timestep_features_jvp(t, t_dot, 64, backend=backend)
    for h in (width, torch.full_like(t, width)):
        _, banded = timestep_features_jvp(t, t_dot, 64, tangent_width=h, backend=backend)
        torch.testing.assert_close(banded, exact, rtol=1e-6, atol=0)


@backends
def test_forward_and_reverse_mode_differ_on_purpose(backend: str) -> None:
    t, t_dot, _, _ = TimestepFeaturesCase(4, 64).operands(device=DEVICE)

    def f(t: Tensor, width: float) -> Tensor:
        return timestep_features(t, 64, tangent_width=width, backend=backend)

    leaf = t.clone().requires_grad_()
    features, banded = jvp(lambda t: f(t, 0.05), (leaf,), (t_dot,))
    exact = jvp(lambda t: f(t, 0.0), (t,), (t_dot,))[1]
    torch.testing.assert_close(features, f(t, 0.0), rtol=0, atol=0)
    assert not banded.requires_grad
    # The fastest sinusoid, of 1000 radians, is damped to sin(50) / 50; the slowest is not.
    damping = torch.sinc(torch.tensor(1000 * 0.05 / torch.pi)).item()
    torch.testing.assert_close(banded[:, 0], damping * exact[:, 0], rtol=1e-3, atol=0)
    torch.testing.assert_close(banded[:, 31], exact[:, 31], rtol=1e-3, atol=0)
    cotangent = torch.ones_like(features)
    (dt,) = torch.autograd.grad(features, leaf, cotangent)
    exact_dt = timestep_features_vjp_reference(cotangent, t, 64)
    torch.testing.assert_close(dt, exact_dt, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("inside", [False, True])
def test_gradcheck_of_eager_in_float64(inside: bool) -> None:
    """Outside and inside forward mode, where another path runs."""
    t = torch.tensor([0.1, 0.6], dtype=F64, requires_grad=True)

    def f(t: Tensor) -> Tensor:
        return timestep_features(t, 9, scale=3.0, tangent_width=0.5)

    def g(t: Tensor) -> Tensor:
        return jvp(f, (t,), (torch.ones_like(t),))[0]

    assert torch.autograd.gradcheck(g if inside else f, t)
    assert torch.autograd.gradgradcheck(g if inside else f, t)


def test_follows_the_usual_embedding_of_1000_times_t() -> None:
    """HunyuanVideo's timestep_embedding, written out: cosines first, exponents over half."""
    t = torch.tensor([0.0, 0.25, 1.0])
    freqs = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(0, 128) / 128)
    args = (1000.0 * t)[:, None] * freqs
    usual = torch.cat([torch.cos(args), torch.sin(args)], -1)
    torch.testing.assert_close(timestep_features(t, 256), usual, rtol=0, atol=1e-4)


@backends
def test_odd_dimensions_end_in_zero(backend: str) -> None:
    t, t_dot, _, _ = TimestepFeaturesCase(3, 7).operands(device=DEVICE)
    for result in timestep_features_jvp(t, t_dot, 7, backend=backend):
        assert result.shape == (3, 7)
        assert result[:, -1].eq(0).all()
        assert result[:, :-1].ne(0).all()


@backends
def test_empty_and_absent(backend: str) -> None:
    t = torch.zeros(0, device=DEVICE, requires_grad=True)
    features = timestep_features(t, 6, backend=backend)
    assert features.shape == (0, 6)
    assert torch.autograd.grad(features.sum(), t)[0].shape == (0,)
    some = torch.rand(2, device=DEVICE)
    features, features_dot = timestep_features_jvp(some, None, 6, backend=backend)
    torch.testing.assert_close(features, timestep_features_reference(some, 6), atol=1e-4, rtol=0)
    assert features_dot.shape == (2, 6)
    assert features_dot.eq(0).all()


def test_dtypes() -> None:
    for dtype, expected in ((F32, F32), (BF16, F32), (F16, F32), (F64, F64)):
        t = torch.rand(2, dtype=dtype)
        assert timestep_features(t, 6).dtype == expected
        assert timestep_features_jvp(t, t, 6)[1].dtype == expected
    with pytest.raises(BackendError, match="float64 is not supported"):
        timestep_features(torch.rand(2, dtype=F64, device=DEVICE), 6, backend="triton")


@backends
def test_dual_level_and_a_width_made_from_the_time(backend: str) -> None:
    t, t_dot, _, _ = TimestepFeaturesCase(4, 16).operands(device=DEVICE)

    def f(t: Tensor) -> Tensor:
        return timestep_features(t, 16, tangent_width=0.5 * t, backend=backend)

    _, expected = timestep_features_jvp_reference(t, t_dot, 16, tangent_width=0.5 * t)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(t, t_dot))).tangent
        constant = forward_ad.make_dual(0.5 * t, t_dot)
        still = timestep_features(t, 16, tangent_width=constant, backend=backend)
        still_dot = forward_ad.unpack_dual(still).tangent
    for actual in (tangent, jvp(f, (t,), (t_dot,))[1]):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-2)
    assert still_dot is None or still_dot.eq(0).all()


@backends
def test_vmap(backend: str) -> None:
    t, t_dot, width, _ = TimestepFeaturesCase(6, 8).operands(device=DEVICE)
    t, t_dot, width = (x.reshape(3, 2) for x in (t, t_dot, width))

    def f(t: Tensor, width: Tensor) -> Tensor:
        return timestep_features(t, 8, scale=10.0, tangent_width=width, backend=backend)

    expected = [
        timestep_features_jvp_reference(a, b, 8, scale=10.0, tangent_width=h)
        for a, b, h in zip(t, t_dot, width, strict=True)
    ]
    value, tangent = (torch.stack(x) for x in zip(*expected, strict=True))
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(vmap(f)(t, width), value, **close)
    inner = vmap(lambda t, d, h: jvp(lambda t: f(t, h), (t,), (d,))[1])
    torch.testing.assert_close(inner(t, t_dot, width), tangent, **close)
    outer = jvp(lambda t: vmap(f)(t, width), (t,), (t_dot,))[1]
    torch.testing.assert_close(outer, tangent, **close)
    pair = vmap(
        lambda t, d, h: timestep_features_jvp(t, d, 8, scale=10.0, tangent_width=h, backend=backend)
    )
    torch.testing.assert_close(pair(t, t_dot, width), (value, tangent), **close)
    dt = vmap(grad(lambda t, h: f(t, h).square()[:, 0].sum()))(t, width)
    exact = grad(
        lambda t: timestep_features_reference(t.flatten(), 8, scale=10.0).square()[:, 0].sum()
    )(t)
    torch.testing.assert_close(dt, exact, **close)


@backends
def test_second_derivatives_are_right_or_refused(backend: str) -> None:
    t, t_dot, _, _ = TimestepFeaturesCase(3, 6).operands(device=DEVICE)

    def f(t: Tensor) -> Tensor:
        return timestep_features(t, 6, scale=5.0, tangent_width=0.1, backend=backend)

    with pytest.raises(NotImplementedError, match="jvp of jvp"):
        jvp(lambda t: jvp(f, (t,), (t_dot,))[1], (t,), (t_dot,))

    def curvature(function) -> Tensor:
        leaf = t.clone().requires_grad_()
        (dt,) = torch.autograd.grad(function(leaf)[:, 0].sum(), leaf, create_graph=True)
        return torch.autograd.grad(dt.sum(), leaf)[0]

    if backend == "eager":
        expected = curvature(lambda t: timestep_features_reference(t, 6, scale=5.0))
        torch.testing.assert_close(curvature(f), expected)
        return
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        curvature(f)
    with pytest.raises(NotImplementedError, match="Inside forward mode call timestep_features"):
        jvp(lambda t: timestep_features_jvp(t, t_dot, 6, backend=backend)[0], (t,), (t_dot,))


def test_is_overridable() -> None:
    class Wrapped(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return func.__name__

    t = torch.rand(2)
    wrapped = t.as_subclass(Wrapped)
    assert timestep_features(wrapped, 6) == "timestep_features"
    assert timestep_features(t, 6, tangent_width=wrapped) == "timestep_features"
    assert timestep_features_jvp(t, wrapped, 6) == "timestep_features_jvp"


T = torch.rand(3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((T[None], 6), {}, ValueError, r"t must be \[B\]"),
        ((torch.arange(3), 6), {}, TypeError, "t must be a tensor of one of"),
        ((0.5, 6), {}, TypeError, "got float"),
        ((T, 1), {}, ValueError, "dim must be at least 2"),
        ((T, 6), {"max_period": 0.0}, ValueError, "max_period must be positive"),
        ((T, 6), {"max_period": float("inf")}, ValueError, "max_period must be positive"),
        ((T, 6), {"tangent_width": -0.1}, ValueError, "not negative, got -0.1"),
        ((T, 6), {"tangent_width": float("nan")}, ValueError, "not negative, got nan"),
        ((T, 6), {"tangent_width": T[:2]}, ValueError, r"\[B\] = \[3\]"),
        ((T, 6), {"tangent_width": torch.arange(3)}, TypeError, "tangent_width must be one of"),
        ((T, 6), {"backend": "cpu"}, BackendError, "no cpu implementation"),
    ],
)
def test_rejects(arguments, options, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        timestep_features(*arguments, **options)
    t, dim = arguments
    with pytest.raises(error, match=message):
        timestep_features_jvp(t, t, dim, **options)


def test_rejects_tangents() -> None:
    with pytest.raises(ValueError, match="t_dot must match t"):
        timestep_features_jvp(T, T[:2], 6)
    with pytest.raises(TypeError, match="t_dot must have the dtype of t"):
        timestep_features_jvp(T, T.double(), 6)


_COMPILED = """
import sys
import torch
from torch.func import jvp
from disca_kernels import timestep_features, timestep_features_jvp
from disca_kernels.ops.timestep_features.reference import *

backend, device = sys.argv[1:]
t, t_dot = torch.rand(2, 4, generator=torch.Generator().manual_seed(1)).to(device)
options = {"scale": 20.0, "tangent_width": 0.5 * t}
expected = timestep_features_jvp_reference(t, t_dot, 10, **options)

def with_tangent(t, t_dot):
    f = lambda t: timestep_features(t, 10, **options, backend=backend)
    return jvp(f, (t,), (t_dot,))

def pair(t, t_dot):
    return timestep_features_jvp(t, t_dot, 10, **options, backend=backend)

def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)

for function in (with_tangent, pair):
    torch.testing.assert_close(compiled(function)(t, t_dot), expected, rtol=1e-4, atol=1e-4)
leaf = t.clone().requires_grad_()
features = compiled(lambda t: timestep_features(t, 10, **options, backend=backend))(leaf)
(dt,) = torch.autograd.grad(features, leaf, torch.ones_like(features))
exact = timestep_features_vjp_reference(torch.ones_like(features), t, 10, scale=20.0)
torch.testing.assert_close(dt, exact, rtol=1e-4, atol=1e-4)
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


def test_kernels_compile_without_spills() -> None:
    for arch in ARCHITECTURES:
        for report in compile_kernels(registered(arch, ["timestep_features"]), [arch]):
            assert report.registers <= 128, report
            assert report.faults == [], report
