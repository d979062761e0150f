# SPDX-License-Identifier: Apache-2.0
import pytest

pytest.importorskip("triton")

from disca_kernels.testing.codegen import (
    ARCHITECTURES,
    KernelReport,
    KernelSpec,
    compile_kernels,
    resource_table,
)

COPY = KernelSpec(
    "tests.testing.spilling:copy_kernel",
    {"p_x": "*fp32", "p_y": "*fp32", "n": "i32"},
    {"BLOCK": 1024},
    divisible=("p_x", "p_y", "n"),
)
UNALIGNED = KernelSpec(COPY.kernel, COPY.signature, COPY.constexprs)
SPILLING = KernelSpec(
    "tests.testing.spilling:spilling_kernel",
    COPY.signature,
    {"BLOCK": 8192},
    divisible=COPY.divisible,
    num_warps=1,
)


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, int], KernelReport]:
    compiled = compile_kernels([COPY, UNALIGNED])
    pairs = [(label, arch) for label in ("copy", "unaligned") for arch in ARCHITECTURES]
    return dict(zip(pairs, compiled, strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_kernel_that_fits_has_no_spills(reports, arch):
    report = reports["copy", arch]
    assert report.arch == arch
    assert (report.spills, report.stack_bytes, report.local_bytes) == (0, 0, 0)
    assert 0 < report.registers < 64


def test_a_spilling_kernel_is_detected():
    (report,) = compile_kernels([SPILLING], [90])
    assert report.spills > 20
    assert report.stack_bytes > 50


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_wide_loads_are_told_from_narrow_ones(reports, arch):
    aligned, unaligned = reports["copy", arch], reports["unaligned", arch]
    assert aligned.count(r"LDG\.(.*\.)?128") == aligned.count("LDG") == 2
    assert unaligned.count(r"LDG\.(.*\.)?128") == 0
    assert unaligned.count("LDG") == 8


def test_the_interpreter_does_not_reach_the_compiler(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (report,) = compile_kernels([COPY], [90])
    assert report.count("STG") == 2


def test_wrong_arguments_are_named():
    wrong = KernelSpec(COPY.kernel, {"p_x": "*fp32"}, COPY.constexprs)
    with pytest.raises(RuntimeError, match=r"copy_kernel takes \['BLOCK', 'n', 'p_x', 'p_y'\]"):
        compile_kernels([wrong], [90])


def test_resource_table(reports):
    table = resource_table(list(reports.values()))
    assert table.count("\n") == 1 + len(reports)
    assert "| `copy_kernel` | sm_90 |" in table
