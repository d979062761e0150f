# SPDX-License-Identifier: Apache-2.0
"""What the gated_residual_adaln kernels compile to for 8.0, 9.0 and 10.0, without a GPU."""

import pytest

pytest.importorskip("triton")

from disca_kernels.testing.codegen import ARCHITECTURES, compile_kernels, registered


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_spill_nothing_and_move_16_bytes_at_a_time(arch):
    for report in compile_kernels(registered(arch, ["gated_residual_adaln"]), [arch]):
        assert report.faults == [], report
        for kind in ("LDG", "STG"):
            assert report.count(rf"{kind}\.(.*\.)?128") == report.count(kind) > 0, report
