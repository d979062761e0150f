# SPDX-License-Identifier: Apache-2.0
"""gelu_tanh at the sizes of video DiTs: value, gradients, value with tangent."""

import torch

from benchmarks.fused import Fused, gpu_operation
from disca_kernels import gelu_tanh, gelu_tanh_jvp
from disca_kernels.ops.gelu_tanh.cases import GeluTanhCase, gelu_tanh_in_dtype
from disca_kernels.ops.gelu_tanh.reference import gelu_tanh_reference

SUBJECT = Fused(
    "gelu_tanh",
    gelu_tanh,
    gelu_tanh_jvp,
    gelu_tanh_reference,
    gelu_tanh_in_dtype,
    outputs=("y",),
    operands=("x", "bias", "prefix"),
)
BF16 = torch.bfloat16
CASES = {
    "second": [GeluTanhCase(1, 32768, 12288, BF16, heads=24, head_dim=128)],
    "third": [
        GeluTanhCase(1, 32768, 12288, BF16),
        GeluTanhCase(1, 32768, 12288, BF16, biased=False),
        GeluTanhCase(2, 8192, 6144, heads=24, head_dim=64),
    ],
    "quick": [GeluTanhCase(1, 4096, 12288, BF16, heads=24, head_dim=128)],
    "dry": [GeluTanhCase(2, 5, 33, BF16, heads=3, head_dim=10)],
}
OP = gpu_operation(SUBJECT, CASES)
