# SPDX-License-Identifier: Apache-2.0
"""What this machine is and which backends it can use: the report that ``disca env`` prints."""

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from disca_kernels import _ext
from disca_kernels._version import __version__
from disca_kernels.backend import IMPLEMENTATIONS, Backend, why_not

_PACKAGES = ("torch", "triton", "numpy", "diffusers", "flash-attn")


def collect() -> dict[str, Any]:
    """Return the environment as plain data, ready for JSON.

    Returns:
        ``versions`` (name to version, None if not installed), ``machine`` (processor, cores,
        threads, memory, CUDA devices), ``extension`` (what ``_C`` was built from, or ``error``)
        and ``backends`` (operation to backend to the list of reasons against it, empty if usable).
    """
    return {
        "versions": _versions(),
        "machine": _machine(),
        "extension": _extension(),
        "backends": {
            op: {str(backend): why_not(op, backend) for backend in implemented}
            for op, implemented in IMPLEMENTATIONS.items()
        },
    }


def format_report(environment: dict[str, Any] | None = None) -> str:
    """Return the environment as text for people.

    Args:
        environment: What :func:`collect` returned; collected now if None.
    """
    environment = collect() if environment is None else environment
    lines = ["versions"]
    lines += [f"  {k}: {v or 'not installed'}" for k, v in environment["versions"].items()]
    for section in ("machine", "extension"):
        lines.append(section)
        lines += [f"  {k.replace('_', ' ')}: {v}" for k, v in environment[section].items()]
    lines.append("backends")
    for backend in (b for b in Backend if b is not Backend.AUTO):
        lines += _backend_lines(str(backend), environment["backends"])
    return "\n".join(lines)


def _backend_lines(backend: str, per_op: dict[str, dict[str, list[str]]]) -> list[str]:
    """Say once what holds for every operation that has this backend, else say it per operation."""
    reasons = {op: found[backend] for op, found in per_op.items() if backend in found}
    verdicts = {op: "; ".join(found) or "usable" for op, found in reasons.items()}
    if not verdicts:
        return []
    if len(set(verdicts.values())) == 1:
        return [f"  {backend} ({', '.join(verdicts)}): {next(iter(verdicts.values()))}"]
    return [f"  {backend}:"] + [f"    {op}: {verdict}" for op, verdict in verdicts.items()]


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "disca-kernels": __version__,
        "python": platform.python_version(),
    }
    return found | package_versions(_PACKAGES)


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Return the installed version of each distribution, None of one that is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _machine() -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "cuda_devices": ", ".join(devices) or "none",
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _extension() -> dict[str, Any]:
    missing = _ext.why_not()
    return {"error": missing} if missing is not None else dict(_ext.load().build_info())
