# SPDX-License-Identifier: Apache-2.0
"""mean_velocity_step on latents of video DiTs: value, gradients, value with tangent."""

import torch

from benchmarks.fused import Fused, gpu_operation
from disca_kernels import mean_velocity_step, mean_velocity_step_jvp
from disca_kernels.ops.mean_velocity_step.cases import (
    MeanVelocityStepCase,
    mean_velocity_step_in_dtype,
)
from disca_kernels.ops.mean_velocity_step.reference import mean_velocity_step_reference

SUBJECT = Fused(
    "mean_velocity_step",
    mean_velocity_step,
    mean_velocity_step_jvp,
    mean_velocity_step_reference,
    mean_velocity_step_in_dtype,
    outputs=("x_r",),
    operands=("x", "u", "t", "r"),
)
BF16 = torch.bfloat16
CASES = {
    "second": [MeanVelocityStepCase((1, 16, 33, 90, 160), torch.float32, BF16)],
    "third": [MeanVelocityStepCase((8, 16, 33, 90, 160), BF16)],
    "quick": [MeanVelocityStepCase((1, 16, 33, 90, 160), torch.float32, BF16)],
    "dry": [MeanVelocityStepCase((2, 3, 5, 7), torch.float32, BF16)],
}
OP = gpu_operation(SUBJECT, CASES)
