# SPDX-License-Identifier: Apache-2.0
"""What the mean_velocity_step kernels compile to for 8.0, 9.0 and 10.0, without a GPU."""

import pytest

pytest.importorskip("triton")

from disca_kernels.testing.codegen import ARCHITECTURES, compile_kernels, registered


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_spill_nothing_and_move_16_bytes_at_a_time(arch):
    for report in compile_kernels(registered(arch, ["mean_velocity_step"]), [arch]):
        assert report.faults == [], report
        times = 4 if "jvp" in report.kernel else 2
        sums = 1 if "bwd" in report.kernel else 0
        loads, stores = (
            (report.count(rf"{kind}\.(.*\.)?128"), report.count(kind)) for kind in ("LDG", "STG")
        )
        assert loads[0] == loads[1] - times > 0, report
        assert stores[0] == stores[1] - sums > 0, report
