# SPDX-License-Identifier: Apache-2.0
"""Time features against their reference in eager PyTorch: value, gradient, value with tangent."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from disca_kernels import timestep_features, timestep_features_jvp
from disca_kernels.ops.timestep_features.cases import Operands, TimestepFeaturesCase
from disca_kernels.ops.timestep_features.reference import (
    timestep_features_jvp_reference,
    timestep_features_reference,
)
from disca_kernels.testing import assert_within_budget

if torch.cuda.is_available():
    DEVICE, IMPLEMENTATIONS = torch.device("cuda"), ["eager", "triton"]
else:
    DEVICE, IMPLEMENTATIONS = torch.device("cpu"), ["eager"]
CASES = [TimestepFeaturesCase(64, 256), TimestepFeaturesCase(4096, 256)]


def exact_pair(t: Tensor, t_dot: Tensor, dim: int, **_: object) -> tuple[Tensor, Tensor]:
    """Value and unbanded tangent by forward-mode AD, which is what the width-0 tangent costs."""
    return jvp(lambda t: timestep_features_reference(t, dim), (t,), (t_dot,))


def calls(mode: str, dim: int, function: Callable, pair: Callable, operands: Operands) -> Callable:
    """Return what computes the results of a mode: (features,), (dt,) or (features, tangent)."""
    t, t_dot, _, cotangent = operands
    if mode == "fwd":
        return lambda: (function(t, dim),)
    if mode == "jvp":
        return lambda: pair(t, t_dot, dim)
    leaf = t.detach().requires_grad_()
    features = function(leaf, dim)
    return lambda: torch.autograd.grad(
        features, leaf, cotangent.to(features.dtype), retain_graph=True
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["fwd", "bwd", "jvp"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_timestep_features(measure, case: TimestepFeaturesCase, mode: str, impl: str) -> None:
    operands = case.operands(device=DEVICE)
    wide = Operands(*(x.double() for x in operands))

    def ours(t: Tensor, dim: int) -> Tensor:
        return timestep_features(t, dim, backend=impl)

    def our_pair(t: Tensor, t_dot: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        return timestep_features_jvp(t, t_dot, dim, backend=impl)

    run = calls(mode, case.dim, ours, our_pair, operands)
    eager = calls(mode, case.dim, timestep_features_reference, exact_pair, operands)
    reference = timestep_features_jvp_reference
    exact = calls(mode, case.dim, timestep_features_reference, reference, wide)

    def check() -> None:
        for actual, expected, base in zip(run(), exact(), eager(), strict=True):
            assert_within_budget(actual, expected, base.clone(), name=f"timestep_features {mode}")

    measure(
        run=run,
        eager=eager,
        check=check,
        bytes_moved=case.bytes_moved(mode),
        flops=case.flops(mode),
        device=DEVICE,
    )
