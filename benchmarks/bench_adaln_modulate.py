# SPDX-License-Identifier: Apache-2.0
"""adaln_modulate against what a DiT block writes in PyTorch: value, gradients, tangent."""

import pytest
import torch

from benchmarks.fused import DEVICE, MODES, parameters, run_case
from benchmarks.gpu.ops.adaln_modulate import SUBJECT
from disca_kernels.ops.adaln_modulate.cases import AdalnModulateCase

if DEVICE.type == "cuda":
    CASES = [
        AdalnModulateCase(1, 32768, 3072, torch.bfloat16),
        AdalnModulateCase(2, 8192, 1536, torch.bfloat16, torch.float32),
        AdalnModulateCase(1, 8192, 3072, torch.bfloat16, per_token=True),
    ]
else:
    CASES = [
        AdalnModulateCase(64, 36, 128),
        AdalnModulateCase(1, 4096, 1024),
        AdalnModulateCase(1, 4096, 1024, torch.bfloat16),
        AdalnModulateCase(2, 1024, 1536, torch.bfloat16, torch.float32),
        AdalnModulateCase(1, 4096, 1024, torch.bfloat16, torch.float32, affine=True),
        AdalnModulateCase(1, 4096, 1024, norm="rms", affine=True),
    ]


@pytest.mark.parametrize("impl", SUBJECT.backends())
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", parameters(CASES))
def test_adaln_modulate(measure, case: AdalnModulateCase, mode: str, impl: str) -> None:
    run_case(measure, SUBJECT, case, mode, impl)
