# SPDX-License-Identifier: Apache-2.0
"""gated_residual at the widths of video DiTs: value, gradients, value with tangent."""

import torch

from benchmarks.fused import Fused, gpu_operation
from disca_kernels import gated_residual, gated_residual_jvp
from disca_kernels.ops.gated_residual.cases import GatedResidualCase, gated_residual_in_dtype
from disca_kernels.ops.gated_residual.reference import gated_residual_reference

SUBJECT = Fused(
    "gated_residual",
    gated_residual,
    gated_residual_jvp,
    gated_residual_reference,
    gated_residual_in_dtype,
    outputs=("out",),
    operands=("x", "y", "gate"),
)
CASES = {
    "second": [GatedResidualCase(1, 32768, 3072, torch.bfloat16)],
    "third": [
        GatedResidualCase(2, 8192, 1536, torch.bfloat16, torch.float32),
        GatedResidualCase(1, 8192, 3072, torch.bfloat16, per_token=True),
    ],
    "quick": [GatedResidualCase(1, 4096, 3072, torch.bfloat16)],
    "dry": [GatedResidualCase(2, 5, 33, torch.bfloat16, torch.float32)],
}
OP = gpu_operation(SUBJECT, CASES)
