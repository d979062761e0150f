# SPDX-License-Identifier: Apache-2.0
import torch

from disca_kernels import cache_read, cache_read_jvp
from disca_kernels.ops.cache_read.cases import CacheReadCase
from disca_kernels.ops.cache_read.reference import (
    cache_read_reference,
)
from tests.ops.battery import Battery, Subject

BF16, F16 = torch.bfloat16, torch.float16
# Sizes on both sides of a tile; strides that a tensor descriptor reaches and others.
CASES = [
    CacheReadCase(2, 5, 24, 16),
    CacheReadCase(2, 3, 17, 9, has_bias=False),
    CacheReadCase(2, 130, 72, 40, BF16),
    CacheReadCase(1, 7, 33, 21, BF16),
    CacheReadCase(2, 9, 40, 264, F16, moving="c"),
    CacheReadCase(1, 33, 136, 24, BF16, has_bias=False, moving="ch"),
    CacheReadCase(2, 40, 70, 48),
]
SUBJECT = Subject("cache_read", cache_read, cache_read_jvp, cache_read_reference, CASES)


class TestCacheRead(Battery):
    subject = SUBJECT
