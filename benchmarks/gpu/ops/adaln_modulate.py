# SPDX-License-Identifier: Apache-2.0
"""adaln_modulate at the widths of video DiTs: value, gradients, value with tangent."""

import torch

from benchmarks.fused import Fused, gpu_operation
from disca_kernels import adaln_modulate, adaln_modulate_jvp
from disca_kernels.ops.adaln_modulate.cases import AdalnModulateCase, adaln_modulate_in_dtype
from disca_kernels.ops.adaln_modulate.reference import adaln_modulate_reference

SUBJECT = Fused(
    "adaln_modulate",
    adaln_modulate,
    adaln_modulate_jvp,
    adaln_modulate_reference,
    adaln_modulate_in_dtype,
    outputs=("y",),
    operands=("x", "shift", "scale", "weight", "bias"),
)
CASES = {
    "second": [AdalnModulateCase(1, 32768, 3072, torch.bfloat16)],
    "third": [
        AdalnModulateCase(2, 8192, 1536, torch.bfloat16, torch.float32),
        AdalnModulateCase(1, 8192, 3072, torch.bfloat16, per_token=True),
        AdalnModulateCase(1, 32768, 3072, torch.bfloat16, affine=True),
        AdalnModulateCase(1, 32768, 3072, torch.bfloat16, affine=True, norm="rms"),
    ],
    "quick": [AdalnModulateCase(1, 4096, 3072, torch.bfloat16)],
    "dry": [AdalnModulateCase(2, 5, 33, torch.bfloat16, torch.float32)],
}
OP = gpu_operation(SUBJECT, CASES)
