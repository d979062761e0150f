# SPDX-License-Identifier: Apache-2.0
"""qk_norm_rope against what a DiT block writes in PyTorch: value, gradients, tangent."""

import pytest
import torch

from benchmarks.fused import DEVICE, MODES, parameters, run_case
from benchmarks.gpu.ops.qk_norm_rope import SUBJECT
from disca_kernels.ops.qk_norm_rope.cases import QkNormRopeCase

BF16 = torch.bfloat16
if DEVICE.type == "cuda":
    CASES = [
        QkNormRopeCase(1, 32768, 24, 128, BF16, n_context=256),
        QkNormRopeCase(1, 32768, 24, 128, BF16, rope_tokens=32512),
    ]
else:
    CASES = [
        QkNormRopeCase(1, 4096, 8, 128),
        QkNormRopeCase(1, 4096, 16, 64),
        QkNormRopeCase(1, 4096, 8, 128, BF16),
        QkNormRopeCase(1, 4096, 16, 64, BF16),
        QkNormRopeCase(1, 3840, 8, 128, BF16, n_context=256, wide=True),
    ]


@pytest.mark.parametrize("impl", SUBJECT.backends())
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", parameters(CASES))
def test_qk_norm_rope(measure, case: QkNormRopeCase, mode: str, impl: str) -> None:
    run_case(measure, SUBJECT, case, mode, impl)
