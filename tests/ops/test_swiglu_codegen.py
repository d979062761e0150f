# SPDX-License-Identifier: Apache-2.0
"""What the swiglu kernels compile to for 8.0, 9.0 and 10.0, without a GPU."""

import pytest

pytest.importorskip("triton")

from disca_kernels.testing.codegen import ARCHITECTURES, compile_kernels, registered


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_spill_nothing_and_move_16_bytes_at_a_time(arch):
    for report in compile_kernels(registered(arch, ["swiglu"]), [arch]):
        assert report.faults == [], report
        # A bias in bfloat16 has 512 numbers for 128 threads: 8 bytes for each half.
        biases = (4 if "jvp" in report.kernel else 2) * ("bias bf16" in report.label)
        loads, stores = (
            (report.count(rf"{kind}\.(.*\.)?128"), report.count(kind)) for kind in ("LDG", "STG")
        )
        assert loads[0] == loads[1] - biases > 0, report
        assert stores[0] == stores[1] > 0, report
