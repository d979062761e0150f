# SPDX-License-Identifier: Apache-2.0
"""mean_velocity_step against what a sampler writes in PyTorch: value, gradients, tangent."""

import pytest
import torch

from benchmarks.fused import DEVICE, MODES, parameters, run_case
from benchmarks.gpu.ops.mean_velocity_step import SUBJECT
from disca_kernels.ops.mean_velocity_step.cases import MeanVelocityStepCase

BF16 = torch.bfloat16
if DEVICE.type == "cuda":
    CASES = [
        MeanVelocityStepCase((1, 16, 33, 90, 160), torch.float32, BF16),
        MeanVelocityStepCase((8, 16, 33, 90, 160), BF16),
    ]
else:
    CASES = [
        MeanVelocityStepCase((1, 16, 33, 45, 80)),
        MeanVelocityStepCase((1, 16, 33, 45, 80), torch.float32, BF16),
    ]


@pytest.mark.parametrize("impl", SUBJECT.backends())
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", parameters(CASES))
def test_mean_velocity_step(measure, case: MeanVelocityStepCase, mode: str, impl: str) -> None:
    run_case(measure, SUBJECT, case, mode, impl)
