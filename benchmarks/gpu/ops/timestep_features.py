# SPDX-License-Identifier: Apache-2.0
"""timestep_features for the batch of a training step: value, gradient, value with tangent."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp

from benchmarks.gpu.model import Implementation, Op, Run, own
from benchmarks.gpu.rivals import gradients
from benchmarks.slices import Part
from disca_kernels import timestep_features, timestep_features_jvp
from disca_kernels.ops.timestep_features.cases import TimestepFeaturesCase
from disca_kernels.ops.timestep_features.reference import timestep_features_reference

MODES = ("jvp", "fwd", "bwd")
CASES = {
    "second": [TimestepFeaturesCase(4096, 256)],
    "third": [TimestepFeaturesCase(64, 256)],
    "quick": [TimestepFeaturesCase(4096, 256)],
    "dry": [TimestepFeaturesCase(3, 16)],
}
_NAMES = {"fwd": ("features",), "jvp": ("features", "tangent"), "bwd": ("dt",)}


class Operands(NamedTuple):
    """What the harness calls the operation with."""

    primals: tuple[Tensor]
    tangent: Tensor
    cotangent: Tensor


def draw(case: TimestepFeaturesCase, device: torch.device, seed: int) -> Operands:
    """Draw times in [0, 1]."""
    t, t_dot, _, cotangent = case.operands(seed, device)
    return Operands((t,), t_dot, cotangent)


def _ours(case: TimestepFeaturesCase, mode: str, operands: Operands, backend: str) -> Run:
    (t,), t_dot, cotangent = operands
    if mode == "fwd":
        return lambda: (timestep_features(t, case.dim, backend=backend),)
    if mode == "jvp":
        return lambda: timestep_features_jvp(t, t_dot, case.dim, backend=backend)
    return gradients(lambda t: timestep_features(t, case.dim, backend=backend), (t,), cotangent)


def _eager(case: TimestepFeaturesCase, mode: str, operands: Operands) -> Run:
    (t,), t_dot, cotangent = operands

    def function(t: Tensor) -> Tensor:
        return timestep_features_reference(t, case.dim)

    if mode == "fwd":
        return lambda: (function(t),)
    if mode == "jvp":
        return lambda: jvp(function, (t,), (t_dot,))
    return gradients(function, (t,), cotangent)


def expected(case: TimestepFeaturesCase, mode: str, operands: Operands) -> list[Part]:
    """Compute the results of a mode in float64."""
    (t,), t_dot, cotangent = operands
    results = _eager(case, mode, Operands((t.double(),), t_dot.double(), cotangent.double()))()
    parts = zip(_NAMES[mode], results, strict=True)
    return [
        Part(name, torch.atleast_2d(result.detach()), torch.atleast_2d) for name, result in parts
    ]


def implementations() -> list[Implementation]:
    """Return our backends and PyTorch's way."""
    return [
        own("timestep_features", "triton", MODES, _ours),
        Implementation("eager", MODES, _eager),
    ]


OP = Op("timestep_features", MODES, CASES, draw, implementations, expected)
