# SPDX-License-Identifier: Apache-2.0
"""gated_residual against what a DiT block writes in PyTorch: value, gradients, tangent."""

import pytest
import torch

from benchmarks.fused import DEVICE, MODES, parameters, run_case
from benchmarks.gpu.ops.gated_residual import SUBJECT
from disca_kernels.ops.gated_residual.cases import GatedResidualCase

if DEVICE.type == "cuda":
    CASES = [
        GatedResidualCase(1, 32768, 3072, torch.bfloat16),
        GatedResidualCase(2, 8192, 1536, torch.bfloat16, torch.float32),
        GatedResidualCase(1, 8192, 3072, torch.bfloat16, per_token=True),
    ]
else:
    CASES = [
        GatedResidualCase(64, 36, 128),
        GatedResidualCase(1, 4096, 1024),
        GatedResidualCase(1, 4096, 1024, torch.bfloat16),
        GatedResidualCase(2, 1024, 1536, torch.bfloat16, torch.float32),
    ]


@pytest.mark.parametrize("impl", SUBJECT.backends())
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", parameters(CASES))
def test_gated_residual(measure, case: GatedResidualCase, mode: str, impl: str) -> None:
    run_case(measure, SUBJECT, case, mode, impl)
