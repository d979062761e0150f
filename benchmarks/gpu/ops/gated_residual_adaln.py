# SPDX-License-Identifier: Apache-2.0
"""gated_residual_adaln at the widths of video DiTs: value, gradients, value with tangent."""

import torch

from benchmarks.fused import Fused, gpu_operation
from disca_kernels import gated_residual_adaln, gated_residual_adaln_jvp
from disca_kernels.ops.gated_residual_adaln.cases import (
    GatedResidualAdalnCase,
    gated_residual_adaln_in_dtype,
)
from disca_kernels.ops.gated_residual_adaln.reference import gated_residual_adaln_reference

SUBJECT = Fused(
    "gated_residual_adaln",
    gated_residual_adaln,
    gated_residual_adaln_jvp,
    gated_residual_adaln_reference,
    gated_residual_adaln_in_dtype,
    outputs=("x_new", "h"),
    operands=("x", "y", "gate", "shift", "scale", "weight", "bias"),
)
CASES = {
    "second": [GatedResidualAdalnCase(1, 32768, 3072, torch.bfloat16)],
    "third": [
        GatedResidualAdalnCase(2, 8192, 1536, torch.bfloat16, torch.float32),
        GatedResidualAdalnCase(1, 8192, 5120, torch.bfloat16, torch.float32),
        GatedResidualAdalnCase(1, 32768, 3072, torch.bfloat16, norm="rms", affine=True),
    ],
    "quick": [GatedResidualAdalnCase(1, 4096, 3072, torch.bfloat16)],
    "dry": [GatedResidualAdalnCase(2, 5, 33, torch.bfloat16, torch.float32)],
}
OP = gpu_operation(SUBJECT, CASES)
