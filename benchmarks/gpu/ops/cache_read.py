# SPDX-License-Identifier: Apache-2.0
"""cache_read at the width of HunyuanVideo: value, gradients, value with tangent.

A predictor's training moves the current tokens alone; the gradients of all operands are measured
in a case in which all of them move.
"""

import torch

from benchmarks.fused import Fused, gpu_operation
from disca_kernels import cache_read, cache_read_jvp
from disca_kernels.ops.cache_read.cases import CacheReadCase, cache_read_in_dtype
from disca_kernels.ops.cache_read.reference import cache_read_reference

SUBJECT = Fused(
    "cache_read",
    cache_read,
    cache_read_jvp,
    cache_read_reference,
    cache_read_in_dtype,
    outputs=("y",),
    operands=("current", "cache", "weight", "bias"),
)
BF16 = torch.bfloat16
CASES = {
    "second": [CacheReadCase(1, 32768, 3072, dtype=BF16, moving="c")],
    "third": [
        CacheReadCase(1, 32768, 3072, dtype=BF16),
        CacheReadCase(2, 8192, 2048, dtype=BF16, moving="c"),
        CacheReadCase(1, 256, 3072, dtype=BF16, moving="c"),
    ],
    "quick": [CacheReadCase(1, 4096, 3072, dtype=BF16, moving="c")],
    "dry": [CacheReadCase(2, 5, 24, 17, BF16)],
}
OP = gpu_operation(SUBJECT, CASES)
