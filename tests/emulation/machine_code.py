# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the Hopper kernel of attention: `python -m tests.emulation.machine_code`."""

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from disca_kernels.testing.codegen import disassemble
from tests.emulation.emulator import CSRC


class Report(NamedTuple):
    """One variant of the kernel.

    Attributes:
        dtype: "bfloat16" or "float16".
        tangents: which of q_dot, k_dot and v_dot are present.
        registers: of a thread at the start; the roles then trade them.
        highest_register: that any thread uses.
        stack_bytes: stack frame of a thread.
        local_bytes: other local memory of a thread.
        instructions: how often each instruction occurs, by the first part of its name.
    """

    dtype: str
    tangents: tuple[bool, bool, bool]
    registers: int
    highest_register: int
    stack_bytes: int
    local_bytes: int
    instructions: Counter[str]


def find_nvcc() -> str | None:
    """Return an nvcc that knows sm_90a, found as the build finds it, or None."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    places = [os.environ.get("CUDACXX", ""), "nvcc", str(home / "bin" / "nvcc")]
    nvcc = next((path for path in map(shutil.which, filter(None, places)) if path), None)
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    known = release is not None and tuple(map(int, release.groups())) >= (12, 3)
    return nvcc if known else None


def _variant(mangled: str) -> tuple[str, tuple[bool, bool, bool]]:
    q, k, v = (flag == "1" for flag in re.findall(r"Lb([01])E", mangled))
    return "bfloat16" if "__nv_bfloat16" in mangled else "float16", (q, k, v)


def compile_kernel(nvcc: str) -> tuple[list[Report], str]:
    """Compile every variant for sm_90a; return reports and what the compiler said."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "attention.cubin"
        source = CSRC / "attention" / "attention_cuda.cu"
        command = [nvcc, "-std=c++17", "-O3", "-I", CSRC, "-Xptxas", "-v", "-cubin", source]
        command += ["-gencode=arch=compute_90a,code=sm_90a", "-o", cubin]
        done = subprocess.run(map(str, command), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        usage, sass = disassemble(cubin.read_bytes())
    resources = {
        name: tuple(map(int, numbers))
        for name, *numbers in re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage
        )
    }
    reports = []
    for body in sass.split("Function : ")[1:]:
        name = body.split(maxsplit=1)[0]
        found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", body)
        registers, stack, local = resources[name]
        highest = max(map(int, re.findall(r"\bR(\d+)\b", body)))
        reports.append(Report(*_variant(name), registers, highest, stack, local, Counter(found)))
    return sorted(reports, key=lambda r: (r.dtype, [not x for x in r.tangents])), done.stderr


def main() -> None:
    """Print a Markdown table."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("no nvcc that knows sm_90a")
    print("| dtype | tangents | registers | highest | stack | local | HGMMA | UTMALDG | spills |")
    print("|---|---|---|---|---|---|---|---|---|")
    for r in compile_kernel(nvcc)[0]:
        present = (n for n, here in zip(("q", "k", "v"), r.tangents, strict=True) if here)
        count = r.instructions
        print(
            f"| {r.dtype} | {' '.join(present)} | {r.registers} | R{r.highest_register} "
            f"| {r.stack_bytes} | {r.local_bytes} | {count['HGMMA']} | {count['UTMALDG']} "
            f"| {count['STL'] + count['LDL']} |"
        )


if __name__ == "__main__":
    main()
