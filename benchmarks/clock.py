# SPDX-License-Identifier: Apache-2.0
"""How long a call takes, how much memory it needs, and what the machine can do at most.

On CUDA the clock is a pair of device events and the L2 cache is flushed before every timed call;
on a CPU it is the wall clock and caches are warm.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from disca_kernels.testing.memory import allocated_peak

_FLUSH_BYTES = 1 << 30


@dataclass
class Clock:
    """A timer for pytest-benchmark that advances only while :meth:`time` runs something."""

    device: torch.device
    elapsed: float = 0.0
    _flush: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            # A gigabyte takes about 0.3 ms: longer than a call needs to reach its first launch.
            size = min(_FLUSH_BYTES, properties.total_memory // 8)
            size = max(2 * properties.L2_cache_size, size)
            self._flush = torch.empty(size, dtype=torch.int8, device=self.device)

    def __call__(self) -> float:
        return self.elapsed

    def time(self, run: Callable[[], object]) -> float:
        """Run once, advance by the seconds that took, and return them."""
        seconds = self._on_device(run) if self.device.type == "cuda" else self._on_host(run)
        self.elapsed += seconds
        return seconds

    def _on_host(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def _on_device(self, run: Callable[[], object]) -> float:
        assert self._flush is not None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The flush is not waited for: while it runs the host gets ahead, so that the events
        # enclose device work and not the latency of the launch.
        self._flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def middle_half(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return lower, median, upper


def copy_samples(device: torch.device, size: int, rounds: int) -> list[float]:
    """Return the bytes per second, read and written, of copies of `size` bytes."""
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    clock.time(lambda: target.copy_(source))
    return [2 * size / clock.time(lambda: target.copy_(source)) for _ in range(rounds)]


def matmul_samples(device: torch.device, dtype: torch.dtype, size: int, rounds: int) -> list[float]:
    """Return the operations per second of square matrix products of random numbers."""
    # Random, because products of zeros draw less power and then run at higher clocks.
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock = Clock(device)
    for _ in range(3):
        clock.time(lambda: left @ right)
    return [2 * size**3 / clock.time(lambda: left @ right) for _ in range(rounds)]


@cache
def copy_rate(device: torch.device) -> float:
    """Return the bytes per second that a large copy reads and writes on this device."""
    return max(copy_samples(device, 1 << 27, 5))


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of a large matrix product in `dtype` on this device."""
    size = 8192 if device.type == "cuda" else 1536
    return max(matmul_samples(device, dtype, size, 5))


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the bytes by which one call raises memory at its peak, its results included.

    On CUDA what PyTorch's allocator handed out; on Linux what the process had resident, which
    counts the memory of compiled code too. None where neither can be read.
    """
    if device.type == "cuda":
        return allocated_peak(run, device)
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept would be reused unseen
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the old peak
        before = _status("VmRSS")
    except (AttributeError, OSError):
        return None
    run()
    return max(_status("VmHWM") - before, 0)


def _status(name: str) -> int:
    """Return one of the sizes in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
