# SPDX-License-Identifier: Apache-2.0
"""The machine and the versions that a speed depends on, and nothing that identifies its owner."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from disca_kernels.env import package_versions

_PACKAGES = (
    "disca-kernels",
    "triton",
    "numpy",
    "flash-attn",
    "flash-attn-3",
    "jvp-flash-attention",
)


def processor() -> str:
    """Return the name of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def machine() -> dict[str, Any]:
    """Return processor and cores, and of the first CUDA device name, size and driver."""
    found: dict[str, Any] = {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": _driver(),
        }
    return found


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    return answer.stdout.strip() or None


def versions() -> dict[str, str | None]:
    """Return the versions of Python, torch, CUDA, cuDNN and of packages, None if not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": None,
    }
    if torch.cuda.is_available() and torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found | package_versions(_PACKAGES)


def file_name() -> str:
    """Return the name under which this machine's results are filed."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name().lower()
    else:
        name = f"cpu-{torch.backends.cpu.get_cpu_capability().lower()}"
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


if __name__ == "__main__":
    print(file_name())
