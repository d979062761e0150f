# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from disca_kernels.backend import IMPLEMENTATIONS, Backend
from disca_kernels.testing.codegen import (
    ARCHITECTURES,
    KernelReport,
    KernelSpec,
    compile_kernels,
    registered,
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
PRODUCT = KernelSpec(
    "tests.testing.spilling:product_kernel", {}, {"SIZE": 128}, divisible=("p_out",), matrix=True
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
    spilling, capped = compile_kernels([SPILLING, replace(COPY, maxnreg=16)], [90])
    assert spilling.spills > 20
    assert spilling.stack_bytes > 50
    (fault,) = spilling.faults
    assert fault.startswith(f"{spilling.spills} spills, {spilling.stack_bytes} bytes of stack")
    assert capped.registers <= 16


def test_a_kernel_that_compiles_to_nothing_is_detected():
    spec = KernelSpec("tests.testing.spilling:idle_kernel", {"p_x": "*fp32"}, {"BLOCK": 128})
    (report,) = compile_kernels([replace(spec, matrix=True)], [90])
    assert report.faults == ["it stores nothing", "it has no matrix instruction"]


@pytest.mark.parametrize(("arch", "unit"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_the_matrix_units_and_copies_of_each_architecture_are_counted(arch, unit):
    tile = "tensordesc<bf16[128, 128]>"
    signature = {"x": tile, "y": tile, "p_out": "*fp32"}
    (report,) = compile_kernels([replace(PRODUCT, signature=signature)], [arch])
    assert report.matrix.startswith(unit)
    assert report.faults == []
    assert (report.count("UTMALDG") > 0) == (arch >= 90)


def test_limits_of_the_device_are_checked(reports):
    big = replace(reports["copy", 90], shared_bytes=228 * 1024, registers=255, num_warps=16)
    assert big.faults == [
        "233472 of 232448 bytes of shared memory",
        "255 registers for each of 512 threads",
    ]


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


def test_every_op_registers_its_kernels():
    found = {spec.kernel.split(".")[2] for spec in registered(90)}
    assert found == {op for op, backends in IMPLEMENTATIONS.items() if Backend.TRITON in backends}
    assert {spec.kernel.split(".")[2] for spec in registered(90, ["attention"])} == {"attention"}


def test_resource_table(reports):
    broken = replace(reports["copy", 90], instructions={}, label="nothing")
    table = resource_table([*reports.values(), broken])
    assert table.count("\n") == 2 + len(reports)
    assert "| `copy_kernel` |  | sm_90 | 4 | " in table
    assert table.endswith("| it stores nothing |")
