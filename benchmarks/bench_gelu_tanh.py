# SPDX-License-Identifier: Apache-2.0
"""gelu_tanh against what a DiT block writes in PyTorch: value, gradients, tangent."""

import pytest
import torch

from benchmarks.fused import DEVICE, MODES, parameters, run_case
from benchmarks.gpu.ops.gelu_tanh import SUBJECT
from disca_kernels.ops.gelu_tanh.cases import GeluTanhCase

BF16 = torch.bfloat16
if DEVICE.type == "cuda":
    CASES = [
        GeluTanhCase(1, 32768, 12288, BF16, heads=24, head_dim=128),
        GeluTanhCase(1, 32768, 12288, BF16),
    ]
else:
    CASES = [
        GeluTanhCase(1, 4096, 1024),
        GeluTanhCase(1, 4096, 1024, biased=False),
        GeluTanhCase(1, 4096, 1024, heads=8, head_dim=128),
        GeluTanhCase(1, 4096, 1024, BF16),
        GeluTanhCase(1, 4096, 1024, BF16, heads=8, head_dim=128),
    ]


@pytest.mark.parametrize("impl", SUBJECT.backends())
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", parameters(CASES))
def test_gelu_tanh(measure, case: GeluTanhCase, mode: str, impl: str) -> None:
    run_case(measure, SUBJECT, case, mode, impl)
