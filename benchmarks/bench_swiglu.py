# SPDX-License-Identifier: Apache-2.0
"""swiglu against what a feed-forward layer writes in PyTorch: value, gradients, tangent."""

import pytest
import torch

from benchmarks.fused import DEVICE, MODES, parameters, run_case
from benchmarks.gpu.ops.swiglu import SUBJECT
from disca_kernels.ops.swiglu.cases import SwigluCase

BF16 = torch.bfloat16
if DEVICE.type == "cuda":
    CASES = [
        SwigluCase(1, 32768, 8192, BF16),
        SwigluCase(1, 32768, 8192, BF16, biased=False),
    ]
else:
    CASES = [
        SwigluCase(1, 4096, 1024),
        SwigluCase(1, 4096, 1024, biased=False),
        SwigluCase(1, 4096, 1024, BF16),
        SwigluCase(1, 4096, 1024, BF16, biased=False),
    ]


@pytest.mark.parametrize("impl", SUBJECT.backends())
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", parameters(CASES))
def test_swiglu(measure, case: SwigluCase, mode: str, impl: str) -> None:
    run_case(measure, SUBJECT, case, mode, impl)
