# SPDX-License-Identifier: Apache-2.0
"""Compile Triton kernels to machine code without a GPU and report what the code needs and does.

`compile_kernels` starts one fresh process, because a process in which Triton runs as an
interpreter (`TRITON_INTERPRET=1`) cannot compile. This module run as a script is that process.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities, times ten, that every kernel must compile for."""


@dataclass(frozen=True)
class KernelSpec:
    """One specialisation of a Triton kernel.

    Attributes:
        kernel: where the jitted function is, as "package.module:name".
        signature: type of each run-time argument, such as {"p_x": "*bf16", "n": "i32"}.
        constexprs: value of each compile-time argument; None-valued pointers belong here too.
        divisible: run-time arguments that are multiples of 16 (pointers: aligned to 16 bytes),
            which is what the launcher's specialisation finds on ordinary tensors.
        num_warps: warps per program.
        num_stages: depth of software pipelining.
    """

    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class KernelReport:
    """Resources and instructions of one compiled kernel.

    Attributes:
        kernel: as in `KernelSpec`.
        arch: compute capability times ten.
        registers: registers per thread.
        stack_bytes: stack frame per thread; spilled registers live there.
        local_bytes: other local memory per thread.
        shared_bytes: shared memory per program, static and dynamic.
        instructions: how often each machine instruction occurs, by its full mnemonic.
    """

    kernel: str
    arch: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    instructions: Mapping[str, int]

    def count(self, pattern: str) -> int:
        """Count the instructions whose mnemonic matches a regular expression from its start."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))

    @property
    def spills(self) -> int:
        """Loads and stores of thread-local memory: what register spilling compiles to."""
        return self.count(r"LDL|STL")


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
        [sys.executable, "-m", __name__],
        input=json.dumps(request),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        names = ", ".join(s.kernel for s in specs)
        raise RuntimeError(f"could not compile {names}:\n{finished.stderr[-4000:]}")
    return [KernelReport(**report) for report in json.loads(finished.stdout)]


def resource_table(reports: Sequence[KernelReport]) -> str:
    """Format the resources of compiled kernels as a Markdown table."""
    lines = [
        "| kernel | arch | registers | stack | shared | spills | 16-byte loads | loads |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in reports:
        name = r.kernel.partition(":")[2]
        wide, loads = r.count(r"LDG\.(.*\.)?128"), r.count("LDG")
        lines.append(
            f"| `{name}` | sm_{r.arch} | {r.registers} | {r.stack_bytes} | {r.shared_bytes} "
            f"| {r.spills} | {wide} | {loads} |"
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
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _inspect(spec.kernel, arch, compiled.asm["cubin"], compiled.metadata.shared)


def _inspect(kernel: str, arch: int, cubin: bytes, shared: int) -> KernelReport:
    """Read a cubin's resources and instructions with the tools that come with Triton."""
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
    resources = {
        name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)
    }
    mnemonics = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    return KernelReport(
        kernel=kernel,
        arch=arch,
        registers=resources["REG"],
        stack_bytes=resources["STACK"],
        local_bytes=resources["LOCAL"],
        shared_bytes=shared,
        instructions=dict(Counter(mnemonics)),
    )


def _main() -> None:
    """Compile what standard input asks for and print the reports as JSON."""
    request = json.load(sys.stdin)
    specs = [KernelSpec(**{**s, "divisible": tuple(s["divisible"])}) for s in request["specs"]]
    reports = [asdict(_compile(s, arch)) for s in specs for arch in request["architectures"]]
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    _main()
