# SPDX-License-Identifier: Apache-2.0
"""What adaln_modulate accepts, what it refuses and what it says."""

import math

import pytest
import torch
from torch import Tensor

from disca_kernels import (
    Backend,
    BackendError,
    adaln_modulate,
    adaln_modulate_jvp,
    use_backend,
    why_not,
)
from disca_kernels.backend import LIMITS
from disca_kernels.ops.adaln_modulate import api
from disca_kernels.ops.adaln_modulate.cases import AdalnModulateCase

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _runs(backend: str) -> pytest.MarkDecorator:
    reasons = why_not("adaln_modulate", backend, torch.empty(1, 1, 1, device=DEVICE))
    return pytest.mark.skipif(bool(reasons), reason="; ".join(reasons))


BACKENDS = [pytest.param(b, marks=_runs(b)) for b in ("eager", "triton", "cpu", "cuda")]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 8), (2, 8), (2, 8)), r"x must be \[B, N, C\], got \[2, 8\]"),
        (((2, 3, 0), (2, 0), (2, 0)), r"at least one channel, got \[2, 3, 0\]"),
        (((2, 3, 8), (2, 7), (2, 8)), r"shift must be \[B, C\] = \[2, 8\].*got \[2, 7\]"),
        (((2, 3, 8), (2, 8), (1, 8)), r"scale must be .*for x \[2, 3, 8\], got \[1, 8\]"),
        (((2, 3, 8), (2, 1, 8), (2, 1, 8)), r"got \[2, 1, 8\]; nothing is broadcast"),
        (((2, 3, 8), (8,), (8,)), r"got \[8\]; nothing is broadcast"),
        (
            ((2, 3, 8), (2, 3, 8), (2, 8)),
            r"must be alike, got shift .*\[2, 3, 8\] on cpu and scale .*\[2, 8\]",
        ),
        (((3, 3, 3), (3, 3), (3, 3, 3)), "shift and scale must be alike"),
    ],
)
def test_rejects_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        adaln_modulate(*(torch.zeros(s) for s in shapes))


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ((torch.int32, torch.float32, torch.float32), r"x must be one of .*, got torch\.int32"),
        (
            (torch.float32, torch.bfloat16, torch.bfloat16),
            r"shift must have the dtype of x \(torch\.float32\) .*, got torch\.bfloat16",
        ),
        (
            (torch.bfloat16, torch.bfloat16, torch.float16),
            r"scale must have the dtype of x \(torch\.bfloat16\)",
        ),
    ],
)
def test_rejects_dtypes(dtypes, message):
    shapes = ((2, 3, 8), (2, 8), (2, 8))
    with pytest.raises(TypeError, match=message):
        adaln_modulate(*(torch.zeros(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)))


def test_rejects_modulations_of_two_dtypes():
    x, shift, scale, *_ = AdalnModulateCase(2, 3, 8, torch.bfloat16).operands().primals
    with pytest.raises(
        ValueError, match=r"alike, got shift torch\.float32 .* scale torch\.bfloat16"
    ):
        adaln_modulate(x, shift.float(), scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_widens_a_narrow_modulation(backend):
    x, shift, scale, *_ = AdalnModulateCase(2, 6, 40).operands(device=DEVICE).primals
    narrow = shift.bfloat16(), scale.bfloat16()
    wide = narrow[0].float(), narrow[1].float()
    expected = adaln_modulate_jvp((x, *wide), (x, wide[0], None), backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = adaln_modulate(x, *narrow, backend=backend)
        pair = adaln_modulate_jvp((x, *narrow), (x, narrow[0], None), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(pair, expected, strict=True))
    assert torch.equal(y, expected[0])


@pytest.mark.parametrize(
    ("vectors", "options", "error", "message"),
    [
        ((torch.ones(7), None), {}, ValueError, r"weight must be \[C\] = \[8\].*got \[7\]"),
        ((torch.ones(1, 8), None), {}, ValueError, r"weight must be .*got \[1, 8\]"),
        ((None, torch.ones(8)), {}, ValueError, "bias was given without weight"),
        ((torch.ones(8),) * 2, {"norm": "rms"}, ValueError, "an RMS norm has no bias"),
        ((torch.ones(8), 0.0), {}, TypeError, "bias must be a tensor, got float"),
        ((torch.ones(8).half(), None), {}, TypeError, r"weight must have the dtype of x"),
        ((None, None), {"norm": "batch"}, ValueError, "'layer' or 'rms', got 'batch'"),
    ],
)
def test_rejects_what_is_no_affine_part_or_norm(vectors, options, error, message):
    x, shift, scale, *_ = AdalnModulateCase(2, 3, 8).operands().primals
    with pytest.raises(error, match=message):
        adaln_modulate(x, shift, scale, *vectors, **options)


def test_rejects_weight_and_bias_of_two_dtypes():
    x, shift, scale, weight, bias = (
        AdalnModulateCase(2, 3, 8, torch.bfloat16, affine=True).operands().primals
    )
    with pytest.raises(TypeError, match=r"one dtype, got torch\.float32 and torch\.bfloat16"):
        adaln_modulate(x, shift, scale, weight.float(), bias)


def test_rejects_devices_and_strangers():
    x, shift, scale, *_ = AdalnModulateCase(2, 3, 8).operands().primals
    with pytest.raises(ValueError, match=r"scale is on meta, x is on cpu"):
        adaln_modulate(x, shift, scale.to("meta"))
    with pytest.raises(TypeError, match="shift must be a tensor, got float"):
        adaln_modulate(x, 1.0, scale)


def test_rejects_tangents():
    primals, tangents = (t[:3] for t in AdalnModulateCase(2, 3, 8).operands()[:2])
    with pytest.raises(
        ValueError, match=r"scale_dot must match scale \[2, 8\] on cpu, got \[2, 7\]"
    ):
        adaln_modulate_jvp(primals, (*tangents[:2], tangents[2][:, 1:]))
    with pytest.raises(TypeError, match=r"x_dot must have the dtype of x, torch\.float32"):
        adaln_modulate_jvp(primals, (tangents[0].double(), None, None))
    with pytest.raises(ValueError, match="3 to 5 tangents are needed, got 2"):
        adaln_modulate_jvp(primals, tangents[:2])
    with pytest.raises(ValueError, match="weight_dot was given without weight"):
        adaln_modulate_jvp(primals, (*tangents, tangents[1][0]))


def test_rejects_backends():
    x, shift, scale, *_ = AdalnModulateCase(1, 1, 8200).operands().primals
    wide = [t.double() for t in (x, shift, scale)]
    for backend in ("triton", "cuda", "cpu"):
        with pytest.raises(
            BackendError, match=f"adaln_modulate: backend='{backend}' was requested"
        ):
            adaln_modulate(*wide, backend=backend)
    assert adaln_modulate(*wide).dtype == torch.float64
    reasons = why_not("adaln_modulate", "triton", x, shift, scale)
    assert "at most 8192 channels fit the registers that share a row, got 8200" in reasons
    with pytest.raises(ValueError, match="got 'tritno'"):
        adaln_modulate(x, shift, scale, backend="tritno")
    with use_backend("eager"):
        assert math.isfinite(adaln_modulate(x, shift, scale).sum().item())


def test_cuda_kernels_name_what_they_lack(monkeypatch):
    x, shift, scale, weight, bias = AdalnModulateCase(2, 3, 8, affine=True).operands().primals
    lacks = LIMITS["adaln_modulate", Backend.CUDA]
    assert lacks(x, shift, scale, None, None) == []
    assert lacks(x, shift, scale, weight, bias) == ["its kernels have no weight and bias"]
    monkeypatch.setattr(api, "resolve", lambda *_: Backend.CUDA)
    with pytest.raises(BackendError, match=r"its kernels have no norm='rms'\. Would work"):
        adaln_modulate(x, shift, scale, norm="rms")


class Recorder(Tensor):
    """Records which public functions were offered to it."""

    calls: list = []  # noqa: RUF012 (a class-level record is what the test reads)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append((func, kwargs))
        return "handled"


def test_can_be_overridden_by_a_tensor_type():
    x, shift, scale, *_ = AdalnModulateCase(2, 3, 8).operands().primals
    Recorder.calls.clear()
    special = torch.ones(2, 8).as_subclass(Recorder)
    assert adaln_modulate(x, shift, special, eps=1e-3) == "handled"
    weight = torch.ones(8).as_subclass(Recorder)
    assert adaln_modulate(x, shift, shift, weight, norm="rms") == "handled"
    assert adaln_modulate_jvp((x, shift, scale), (None, special, None)) == "handled"
    (first, kwargs), (_, other), (second, _) = Recorder.calls
    assert (first, second) == (adaln_modulate, adaln_modulate_jvp)
    assert kwargs == {"norm": "layer", "eps": 1e-3, "backend": "auto"}
    assert other == {"norm": "rms", "eps": 1e-6, "backend": "auto"}
