# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels compile to for 8.0, 9.0, 10.0 and 12.0, without a GPU."""

from functools import cache

import pytest

pytest.importorskip("triton")

from disca_kernels.ops.attention.codegen import KERNELS, spec
from disca_kernels.ops.attention.tiles import tiles_for
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
    """bfloat16 and float16, D = 64 and 128, one padded D and D = 256, all operands present."""
    reports = compiled(arch)
    assert len(reports) == 2 * 2 * len(KERNELS) + 2 * len(KERNELS)
    assert {report.label: report.faults for report in reports if report.faults} == {}
    if arch == 80:
        # Devices of 8.6, 8.9 and 12.0 take these tiles too, and have less shared memory.
        assert max(report.shared_bytes for report in reports) <= SHARED_BYTES[120]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "unit"), [(90, "HGMMA"), (100, "UTCHMMA")])
def test_data_centre_devices_copy_and_multiply_with_their_own_units(arch: int, unit: str) -> None:
    """Every load of a tile is a TMA load; plain HMMA appears only where a tile is too narrow."""
    for report in compiled(arch):
        assert report.count("UTMALDG") >= 2 * (report.kernel.count("jvp") + 3), report
        assert report.count("LDGSTS") <= 16, report
        if "D=256" not in report.label:
            assert report.matrix.startswith(unit), report
            assert "," not in report.matrix, report
