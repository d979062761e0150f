# SPDX-License-Identifier: Apache-2.0
"""How every benchmark measures: check first, then time ours and eager in alternation.

Speed is reported as a ratio to the eager version timed in the same run, round by round, with the
spread of that ratio; a ratio whose middle half contains 1 is called a tie. On CUDA the clock is a
pair of device events and the L2 cache is flushed before every timed call; on a CPU caches are warm.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

SECONDS_PER_CASE = 1.0
MIN_ROUNDS, MAX_ROUNDS = 10, 200
WARMUP_ROUNDS = 3


@dataclass(frozen=True)
class Subject:
    """One benchmark case: what runs, what it is compared with, and what it costs on paper.

    Args:
        run: Calls the implementation under test.
        eager: Calls the eager version on the same inputs.
        check: Raises AssertionError if the implementation is wrong on exactly these inputs.
        bytes_moved: Bytes the operation must read and write, the same for every implementation.
        flops: Floating-point operations, the same for every implementation.
        device: Where the inputs are.
    """

    run: Callable[[], object]
    eager: Callable[[], object]
    check: Callable[[], None]
    bytes_moved: int
    flops: int
    device: torch.device


@dataclass
class Clock:
    """A timer for pytest-benchmark that advances only while :meth:`time` runs something."""

    device: torch.device
    elapsed: float = 0.0
    _flush: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(self.device).L2_cache_size
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


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a large copy reads and writes on this device."""
    source = torch.ones(1 << 25, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    seconds = min(clock.time(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.numel() * source.element_size() / seconds


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the bytes that one call allocates at its peak, None where that is not measurable."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def ratio_with_spread(eager: list[float], ours: list[float]) -> dict[str, Any]:
    """Summarise the per-round ratio eager / ours: median, quartiles and an honest verdict."""
    ratios = [e / o for e, o in zip(eager, ours, strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4)
    verdict = "faster" if lower > 1 else "slower" if upper < 1 else "tie"
    return {
        "speedup_vs_eager": round(middle, 3),
        "speedup_quartiles": [round(lower, 3), round(upper, 3)],
        "verdict": verdict,
    }


def measure(benchmark: BenchmarkFixture, clock: Clock, subject: Subject) -> None:
    """Check a case, time it against eager, and record the fixed set of ``extra_info`` columns.

    A case that fails its check raises before anything is timed, so it never reports a speed.
    With benchmarks disabled the case is checked and run once.
    """
    subject.check()
    if not benchmark.enabled:
        benchmark.pedantic(subject.run)
        return
    eager_seconds: list[float] = []
    our_seconds: list[float] = []

    def time_eager() -> None:
        eager_seconds.append(clock.time(subject.eager))

    def time_ours() -> None:
        our_seconds.append(clock.time(subject.run))

    for _ in range(WARMUP_ROUNDS):
        time_eager()
        time_ours()
    rounds = int(SECONDS_PER_CASE / (eager_seconds[-1] + our_seconds[-1]))
    rounds = min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)
    eager_seconds.clear()
    our_seconds.clear()
    benchmark.pedantic(time_ours, setup=time_eager, rounds=rounds)
    seconds = statistics.median(our_seconds)
    bandwidth = subject.bytes_moved / seconds
    benchmark.extra_info.update(
        ratio_with_spread(eager_seconds, our_seconds),
        bytes_moved=subject.bytes_moved,
        flops=subject.flops,
        gigabytes_per_second=round(bandwidth / 1e9, 2),
        gigaflops_per_second=round(subject.flops / seconds / 1e9, 2),
        share_of_copy_bandwidth=round(bandwidth / copy_bandwidth(subject.device), 3),
        peak_bytes=peak_memory(subject.run, subject.device),
        eager_peak_bytes=peak_memory(subject.eager, subject.device),
    )


def device_name() -> str:
    """Return the name under which this machine's results are filed."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{torch.backends.cpu.get_cpu_capability().lower().replace(' ', '-')}"


if __name__ == "__main__":
    print(device_name())
