# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels compile to for 8.0, 9.0 and 10.0, without a GPU."""

from functools import cache

import pytest

pytest.importorskip("triton")

from disca_kernels.ops.attention.codegen import KERNELS
from disca_kernels.testing.codegen import (
    ARCHITECTURES,
    SHARED_BYTES,
    KernelReport,
    compile_kernels,
    registered,
)


@cache
def compiled(arch: int) -> tuple[KernelReport, ...]:
    return tuple(compile_kernels(registered(arch, ["attention"]), [arch]))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_fit_the_device_and_spill_nothing(arch: int) -> None:
    """Every kernel at D = 64, 128 and 256, all optional operands present, block-causal."""
    reports = compiled(arch)
    assert len(reports) > 4 * len(KERNELS)
    assert {report.label: report.faults for report in reports if report.faults} == {}
    if arch == 80:
        # Devices of 8.6, 8.9 and 12.0 take these tiles too, and have less shared memory.
        assert max(report.shared_bytes for report in reports) <= SHARED_BYTES[120]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "unit"), [(90, "HGMMA"), (100, "UTCHMMA")])
def test_data_centre_devices_copy_and_multiply_with_their_own_units(arch: int, unit: str) -> None:
    """Tiles come by TMA alone; D = 256 falls back to single warps where nothing else fits."""
    for report in compiled(arch):
        described = "pointers" not in report.label
        assert (report.count("UTMALDG") > 0) == described, report
        if described:
            assert report.count("LDGSTS") == 0, report
        if described and "D=256" not in report.label:
            assert report.matrix.startswith(unit), report
            assert "," not in report.matrix, report
