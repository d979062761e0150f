# SPDX-License-Identifier: Apache-2.0
"""gated_residual_adaln against what a DiT block writes in PyTorch: value, gradients, tangent."""

import pytest
import torch

from benchmarks.fused import DEVICE, MODES, parameters, run_case
from benchmarks.gpu.ops.gated_residual_adaln import SUBJECT
from disca_kernels.ops.gated_residual_adaln.cases import GatedResidualAdalnCase

if DEVICE.type == "cuda":
    CASES = [
        GatedResidualAdalnCase(1, 32768, 3072, torch.bfloat16),
        GatedResidualAdalnCase(2, 8192, 1536, torch.bfloat16, torch.float32),
        GatedResidualAdalnCase(1, 8192, 3072, torch.bfloat16, per_token=True),
    ]
else:
    CASES = [
        GatedResidualAdalnCase(64, 36, 128),
        GatedResidualAdalnCase(1, 4096, 1024),
        GatedResidualAdalnCase(1, 4096, 1024, torch.bfloat16),
        GatedResidualAdalnCase(2, 1024, 1536, torch.bfloat16, torch.float32),
    ]


@pytest.mark.parametrize("impl", SUBJECT.backends())
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", parameters(CASES))
def test_gated_residual_adaln(measure, case: GatedResidualAdalnCase, mode: str, impl: str) -> None:
    run_case(measure, SUBJECT, case, mode, impl)
