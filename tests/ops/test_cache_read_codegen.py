# SPDX-License-Identifier: Apache-2.0
"""What the cache_read kernels compile to for 8.0, 9.0 and 10.0, without a GPU."""

from functools import cache

import pytest

pytest.importorskip("triton")

from disca_kernels.testing.codegen import (
    ARCHITECTURES,
    SHARED_BYTES,
    KernelReport,
    compile_kernels,
    registered,
)


@cache
def compiled(arch: int) -> tuple[KernelReport, ...]:
    return tuple(compile_kernels(registered(arch, ["cache_read"]), [arch]))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_fit_the_device_and_spill_nothing(arch: int) -> None:
    reports = compiled(arch)
    assert {report.label: report.faults for report in reports if report.faults} == {}
    if arch == 80:
        # Devices of 8.6, 8.9 and 12.0 take these tiles too, and have less shared memory.
        assert max(report.shared_bytes for report in reports) <= SHARED_BYTES[120]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pointers_move_16_bytes_at_a_time(arch: int) -> None:
    """Tiles are copied past the registers (LDGSTS); a float32 tile may be too small for that."""
    for report in compiled(arch):
        if "pointers" in report.label:
            assert report.count("UTMALDG") == 0, report
            assert report.count(r"STG\.(.*\.)?128") == report.count("STG") > 0, report
            if "bf16" in report.label:
                copies = report.count("LDGSTS")
                assert report.count(r"LDGSTS\.(.*\.)?128") == copies > 0, report


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "unit"), [(90, "HGMMA"), (100, "UTCHMMA")])
def test_data_centre_devices_copy_and_multiply_with_their_own_units(arch: int, unit: str) -> None:
    described = [r for r in compiled(arch) if "pointers" not in r.label]
    assert len(described) == 4
    for report in described:
        assert report.count("UTMALDG") > 0, report
        assert report.count("UTMASTG") > 0, report
        assert report.count("LDGSTS") == report.count("STG") == 0, report
        assert report.matrix.startswith(unit), report
        assert "," not in report.matrix, report
