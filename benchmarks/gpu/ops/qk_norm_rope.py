# SPDX-License-Identifier: Apache-2.0
"""qk_norm_rope at the sizes of video DiTs: value, gradients, value with tangent."""

import torch

from benchmarks.fused import Fused, gpu_operation
from disca_kernels import qk_norm_rope, qk_norm_rope_jvp
from disca_kernels.ops.qk_norm_rope.cases import QkNormRopeCase, qk_norm_rope_in_dtype
from disca_kernels.ops.qk_norm_rope.reference import qk_norm_rope_reference

SUBJECT = Fused(
    "qk_norm_rope",
    qk_norm_rope,
    qk_norm_rope_jvp,
    qk_norm_rope_reference,
    qk_norm_rope_in_dtype,
    outputs=("q", "k", "v"),
    operands=(
        *("qkv", "q_weight", "k_weight", "cos", "sin"),
        *("context_qkv", "context_q_weight", "context_k_weight"),
    ),
)
BF16 = torch.bfloat16
CASES = {
    "second": [QkNormRopeCase(1, 32768, 24, 128, BF16, n_context=256)],
    "third": [
        QkNormRopeCase(1, 32768, 24, 128, BF16, rope_tokens=32512),
        QkNormRopeCase(1, 32768, 24, 128, BF16, wide=True),
        QkNormRopeCase(2, 8192, 24, 64, BF16, interleaved=False),
    ],
    "quick": [QkNormRopeCase(1, 4096, 24, 128, BF16)],
    "dry": [QkNormRopeCase(2, 5, 3, 18, BF16, 4, n_context=3)],
}
OP = gpu_operation(SUBJECT, CASES)
