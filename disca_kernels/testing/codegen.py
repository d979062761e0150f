# SPDX-License-Identifier: Apache-2.0
"""Compile Triton kernels to machine code without a GPU and report what the code needs and does.

`python -m disca_kernels.testing.codegen [op ...]` prints the table of every kernel that the ops
register (`registered`) and fails if one of them has a fault. `compile_kernels` starts one fresh
process, because a process in which Triton runs as an interpreter (`TRITON_INTERPRET=1`) cannot
compile; this module run with `--worker` is that process.
"""

import argparse
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities, times ten, that every kernel must compile for."""

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Shared memory that one program may have, by compute capability times ten."""

REGISTERS = 65536
"""32-bit registers of a multiprocessor, on every architecture."""

# Single warps multiply with HMMA, groups of four with HGMMA (9.0), whole programs with UTC*MMA
# (10.0); float64 goes to DMMA. Float32 in full precision has no matrix instruction.
MATRIX = r"[HID]MMA|[HIQ]GMMA|UTC\w*MMA"


@dataclass(frozen=True)
class KernelSpec:
    """One specialisation of a Triton kernel.

    Attributes:
        kernel: where the jitted function is, as "package.module:name".
        signature: type of each run-time argument, such as {"p_x": "*bf16", "n": "i32"}; a tensor
            descriptor is "tensordesc<bf16[1, 1, 64, 128]>" with its block shape.
        constexprs: value of each compile-time argument; None-valued pointers belong here too.
        divisible: run-time arguments that are multiples of 16 (pointers: aligned to 16 bytes),
            which is what the launcher's specialisation finds on ordinary tensors.
        num_warps: warps per program.
        num_stages: depth of software pipelining.
        maxnreg: cap on the registers of a thread, or None.
        label: what a table calls this specialisation.
        matrix: whether the code has to hold matrix instructions.
    """

    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    label: str = ""
    matrix: bool = False


@dataclass(frozen=True)
class KernelReport:
    """Resources and instructions of one compiled kernel.

    Attributes:
        kernel: as in `KernelSpec`.
        label: as in `KernelSpec`.
        arch: compute capability times ten.
        num_warps: warps per program.
        registers: registers per thread.
        stack_bytes: stack frame per thread; spilled registers live there.
        local_bytes: other local memory per thread.
        shared_bytes: shared memory per program, static and dynamic.
        instructions: how often each machine instruction occurs, by its full mnemonic.
        needs_matrix: `KernelSpec.matrix`.
    """

    kernel: str
    label: str
    arch: int
    num_warps: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    instructions: Mapping[str, int]
    needs_matrix: bool = False

    def count(self, pattern: str) -> int:
        """Count the instructions whose mnemonic matches a regular expression from its start."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))

    @property
    def spills(self) -> int:
        """Loads and stores of thread-local memory: what register spilling compiles to."""
        return self.count(r"LDL|STL")

    @property
    def matrix(self) -> str:
        """The matrix instructions with their counts, such as "HGMMA 12"; empty if there are none.

        One of them multiplies a different amount on each architecture.
        """
        counts = Counter[str]()
        for name, n in self.instructions.items():
            if re.match(MATRIX, name):
                counts[name.partition(".")[0]] += n
        return ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))

    @property
    def faults(self) -> list[str]:
        """What is wrong with the code, each as a short sentence; empty if nothing is."""
        found = []
        if self.spills or self.stack_bytes or self.local_bytes:
            found.append(
                f"{self.spills} spills, {self.stack_bytes} bytes of stack, "
                f"{self.local_bytes} of local memory"
            )
        if self.shared_bytes > SHARED_BYTES[self.arch]:
            found.append(f"{self.shared_bytes} of {SHARED_BYTES[self.arch]} bytes of shared memory")
        if self.registers * self.num_warps * 32 > REGISTERS:
            found.append(f"{self.registers} registers for each of {self.num_warps * 32} threads")
        # The compiler can lose a kernel's whole body without an error.
        if not self.count(r"STG|ST\.E|UTMASTG"):
            found.append("it stores nothing")
        if self.needs_matrix and not self.matrix:
            found.append("it has no matrix instruction")
        return found


def compile_kernels(
    specs: Sequence[KernelSpec], architectures: Sequence[int] = ARCHITECTURES
) -> list[KernelReport]:
    """Compile every specialisation for every architecture, in a process of its own.

    Args:
        specs: what to compile.
        architectures: compute capabilities times ten.

    Returns:
        One report per pair, the architectures of the first kernel first.

    Raises:
        RuntimeError: compilation failed; the message ends with the compiler's.
    """
    request = {"specs": [asdict(s) for s in specs], "architectures": list(architectures)}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    finished = subprocess.run(
        [sys.executable, "-m", "disca_kernels.testing.codegen", "--worker"],
        input=json.dumps(request),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        names = ", ".join(dict.fromkeys(s.kernel for s in specs))
        raise RuntimeError(f"could not compile {names}:\n{finished.stderr[-4000:]}")
    return [KernelReport(**report) for report in json.loads(finished.stdout)]


def registered(arch: int, ops: Sequence[str] = ()) -> list[KernelSpec]:
    """Return what the ops want compiled for one architecture, from their rooms `codegen.py`.

    Args:
        arch: compute capability times ten.
        ops: names of operations; all that have such a room if empty.
    """
    package = import_module("disca_kernels.ops")
    names = ops or sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    rooms = [f"{package.__name__}.{name}.codegen" for name in names]
    return [spec for room in rooms if find_spec(room) for spec in import_module(room).specs(arch)]


def resource_table(reports: Sequence[KernelReport]) -> str:
    """Format the resources of compiled kernels as a Markdown table."""
    lines = [
        "| kernel | case | arch | warps | registers | spills | shared | matrix instructions "
        "| TMA loads | loads of 16 bytes | barriers | faults |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in reports:
        wide, loads = r.count(r"LDG\.(.*\.)?128"), r.count("LDG")
        lines.append(
            f"| `{r.kernel.partition(':')[2]}` | {r.label} | sm_{r.arch} | {r.num_warps} "
            f"| {r.registers} | {r.spills} | {r.shared_bytes} | {r.matrix or '-'} "
            f"| {r.count('UTMALDG')} | {wide} of {loads} | {r.count(r'BAR|SYNCS')} "
            f"| {'; '.join(r.faults) or '-'} |"
        )
    return "\n".join(lines)


def _jit_function(path: str) -> Any:
    """Import a kernel and strip its autotuner and heuristics."""
    module, _, name = path.partition(":")
    found = getattr(import_module(module), name)
    while not hasattr(found, "arg_names") or hasattr(found, "configs") or hasattr(found, "values"):
        found = found.fn
    return found


def _compile(spec: KernelSpec, arch: int) -> KernelReport:
    """Compile one specialisation; runs in the process without the interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _jit_function(spec.kernel)
    arguments = set(spec.signature) | set(spec.constexprs)
    if arguments != set(kernel.arg_names):
        raise ValueError(
            f"{spec.kernel} takes {sorted(kernel.arg_names)}, the spec has {sorted(arguments)}"
        )
    signature = {n: spec.signature.get(n, "constexpr") for n in kernel.arg_names}
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in spec.divisible
    }
    source = ASTSource(kernel, signature, dict(spec.constexprs), attributes)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    if spec.maxnreg is not None:
        options["maxnreg"] = spec.maxnreg
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    resources, instructions = _inspect(compiled.asm["cubin"])
    return KernelReport(
        kernel=spec.kernel,
        label=spec.label,
        arch=arch,
        num_warps=compiled.metadata.num_warps,
        registers=resources["REG"],
        stack_bytes=resources["STACK"],
        local_bytes=resources["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        instructions=instructions,
        needs_matrix=spec.matrix,
    )


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return what cuobjdump, which comes with Triton, says of resources, and the instructions."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run(
                [str(tool), option, str(path)], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    return usage, sass


def _inspect(cubin: bytes) -> tuple[dict[str, int], dict[str, int]]:
    """Read a cubin's resources and instructions."""
    usage, sass = disassemble(cubin)
    resources = {
        name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)
    }
    mnemonics = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    return resources, dict(Counter(mnemonics))


def _work() -> None:
    """Compile what standard input asks for and print the reports as JSON."""
    request = json.load(sys.stdin)
    specs = [KernelSpec(**{**s, "divisible": tuple(s["divisible"])}) for s in request["specs"]]
    reports = [asdict(_compile(s, arch)) for s in specs for arch in request["architectures"]]
    json.dump(reports, sys.stdout)


def _main() -> int:
    """Print the table of all registered kernels, or work for `compile_kernels`."""
    parser = argparse.ArgumentParser(description="Compile the kernels without a GPU.")
    parser.add_argument("ops", nargs="*", help="operations; all of them by default")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, metavar="90")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work()
        return 0
    reports = [
        report
        for arch in options.arch
        for report in compile_kernels(registered(arch, options.ops), [arch])
    ]
    print(resource_table(reports))
    return int(any(report.faults for report in reports))


if __name__ == "__main__":
    sys.exit(_main())
