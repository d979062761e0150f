# SPDX-License-Identifier: Apache-2.0
"""swiglu at the sizes of video DiTs: value, gradients, value with tangent."""

import torch

from benchmarks.fused import Fused, gpu_operation
from disca_kernels import swiglu, swiglu_jvp
from disca_kernels.ops.swiglu.cases import SwigluCase, swiglu_in_dtype
from disca_kernels.ops.swiglu.reference import swiglu_reference

SUBJECT = Fused(
    "swiglu",
    swiglu,
    swiglu_jvp,
    swiglu_reference,
    swiglu_in_dtype,
    outputs=("y",),
    operands=("x", "bias"),
)
BF16 = torch.bfloat16
CASES = {
    "second": [SwigluCase(1, 32768, 8192, BF16)],
    "third": [SwigluCase(1, 32768, 8192, BF16, biased=False), SwigluCase(2, 8192, 4096)],
    "quick": [SwigluCase(1, 4096, 8192, BF16)],
    "dry": [SwigluCase(2, 5, 33, BF16)],
}
OP = gpu_operation(SUBJECT, CASES)
