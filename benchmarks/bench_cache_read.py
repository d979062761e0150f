# SPDX-License-Identifier: Apache-2.0
"""cache_read against concatenation, linear layer and SiLU in PyTorch: value, gradients, tangent."""

import pytest
import torch

from benchmarks.fused import DEVICE, MODES, parameters, run_case
from benchmarks.gpu.ops.cache_read import SUBJECT
from disca_kernels.ops.cache_read.cases import CacheReadCase

if DEVICE.type == "cuda":
    CASES = [
        CacheReadCase(1, 32768, 3072, dtype=torch.bfloat16, moving="c"),
        CacheReadCase(1, 32768, 3072, dtype=torch.bfloat16),
    ]
else:
    CASES = [
        CacheReadCase(64, 36, 128, moving="c"),
        CacheReadCase(64, 36, 128),
        CacheReadCase(1, 1024, 1024, moving="c"),
        CacheReadCase(1, 1024, 1024),
        CacheReadCase(1, 1024, 1024, dtype=torch.bfloat16, moving="c"),
    ]


@pytest.mark.parametrize("impl", SUBJECT.backends())
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", parameters(CASES))
def test_cache_read(measure, case: CacheReadCase, mode: str, impl: str) -> None:
    run_case(measure, SUBJECT, case, mode, impl)
