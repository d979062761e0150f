# SPDX-License-Identifier: Apache-2.0
"""What the qk_norm_rope kernels compile to for 8.0, 9.0 and 10.0, without a GPU."""

import pytest

pytest.importorskip("triton")

from disca_kernels.testing.codegen import ARCHITECTURES, compile_kernels, registered


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_spill_nothing_and_move_16_bytes_at_a_time(arch):
    for report in compile_kernels(registered(arch, ["qk_norm_rope"]), [arch]):
        assert report.faults == [], report
        for kind in ("LDG", "STG"):
            wide, all_ = report.count(rf"{kind}\.(.*\.)?128"), report.count(kind)
            # A program stores its sums of the weights' gradients once, a row of D for each weight:
            # the two halves of a pair's row are stored apart where they are apart.
            sums = 0
            if kind == "STG" and "bwd" in report.kernel:
                sums = 4 if "half-split" in report.label else 2
            assert wide == all_ - sums > 0, report
