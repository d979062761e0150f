# SPDX-License-Identifier: Apache-2.0
"""How every benchmark measures: check first, then time ours and eager in alternation.

Speed is reported as a ratio to the eager version timed in the same run, round by round, with the
spread of that ratio; a ratio whose middle half contains 1 is called a tie. Where a call takes
seconds there are few rounds, and the record says how many.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.clock import Clock, copy_rate, matmul_rate, middle_half, peak_memory

SECONDS_PER_CASE = 1.0
MIN_ROUNDS, MAX_ROUNDS = 10, 200
WARMUP_ROUNDS = 3
SLOW_SECONDS, SLOW_ROUNDS = 0.5, 3
VERY_SLOW_SECONDS = 5.0
"""Ours and eager together: from here on they are timed so many times, or once, without warm-up."""


@dataclass(frozen=True)
class Subject:
    """One benchmark case: what runs, what it is compared with, and what it costs on paper.

    Args:
        run: Calls the implementation under test.
        eager: Calls the eager version on the same inputs; a text says why there is none.
        check: Raises AssertionError if the implementation is wrong on exactly these inputs.
        bytes_moved: Bytes the operation must read and write, the same for every implementation.
        flops: Floating-point operations, the same for every implementation.
        device: Where the inputs are.
        matmul_dtype: dtype of the matrix products that the operation consists of, None if it
            does not; the rate of a large one is then the ceiling that the record compares with.
    """

    run: Callable[[], object]
    eager: Callable[[], object] | str
    check: Callable[[], None]
    bytes_moved: int
    flops: int
    device: torch.device
    matmul_dtype: torch.dtype | None = None


def ratio_with_spread(eager: list[float], ours: list[float]) -> dict[str, Any]:
    """Summarise eager / ours: median, quartiles and an honest verdict.

    Round by round; where the rounds are so slow that eager had fewer, over all pairs.
    """
    pairs = zip(eager, ours, strict=True) if len(eager) == len(ours) else product(eager, ours)
    lower, median, upper = middle_half([e / o for e, o in pairs])
    verdict = "faster" if lower > 1 else "slower" if upper < 1 else "tie"
    return {
        "speedup_vs_eager": round(median, 3),
        "speedup_quartiles": [round(lower, 3), round(upper, 3)],
        "verdict": verdict,
    }


@dataclass
class Eager:
    """Timed calls of the eager version."""

    run: Callable[[], object] | str
    clock: Clock
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def time(self) -> None:
        """Time one call, if there is anything to call."""
        if not isinstance(self.run, str):
            self.seconds.append(self.clock.time(self.run))


_slow_eager: dict[str, Eager] = {}
"""Slow eager calls are timed for the first implementation of a group, not for each."""


def measure(benchmark: BenchmarkFixture, clock: Clock, subject: Subject, group: str) -> None:
    """Check a case, time it against eager, and record the fixed set of ``extra_info`` columns.

    A case that fails its check raises before anything is timed, so it never reports a speed.
    With benchmarks disabled the case is checked and run once. Implementations of one `group` have
    the same eager version on the same inputs.
    """
    subject.check()
    if not benchmark.enabled:
        benchmark.pedantic(subject.run)
        return
    seconds: list[float] = []

    def time_ours() -> None:
        seconds.append(clock.time(subject.run))

    peak_bytes = peak_memory(time_ours, subject.device)
    shared = _slow_eager.get(group)
    eager = shared or Eager(subject.eager, clock)
    if shared is None:
        eager.peak_bytes = peak_memory(eager.time, subject.device)
        if sum([*seconds, *eager.seconds]) <= VERY_SLOW_SECONDS:  # or was that only the first call?
            time_ours()
            eager.time()
    pair = sum([*seconds[-1:], *eager.seconds[-1:]])
    if pair > SLOW_SECONDS:  # too slow to need warming: the calls above count
        _slow_eager[group] = eager
        again = shared is None and pair <= VERY_SLOW_SECONDS
        rounds = max(SLOW_ROUNDS - len(seconds), 1) if pair <= VERY_SLOW_SECONDS else 1
        benchmark.pedantic(time_ours, setup=eager.time if again else None, rounds=rounds)
    else:
        for _ in range(WARMUP_ROUNDS):
            eager.time()
            time_ours()
        eager.seconds.clear()
        seconds.clear()
        rounds = min(max(int(SECONDS_PER_CASE / pair), MIN_ROUNDS), MAX_ROUNDS)
        benchmark.pedantic(time_ours, setup=eager.time, rounds=rounds)
    benchmark.extra_info.update(_columns(subject, seconds, eager), peak_bytes=peak_bytes)


def _columns(subject: Subject, samples: list[float], eager: Eager) -> dict[str, Any]:
    """Return what is recorded of the timed calls."""
    low, seconds, high = middle_half(samples)
    bandwidth, speed = subject.bytes_moved / seconds, subject.flops / seconds
    columns = {
        "seconds": float(f"{seconds:.4g}"),
        "seconds_middle_half": [float(f"{x:.4g}") for x in (low, high)],
        "rounds": len(samples),
        "bytes_moved": subject.bytes_moved,
        "flops": subject.flops,
        "gigabytes_per_second": round(bandwidth / 1e9, 2),
        "gigaflops_per_second": round(speed / 1e9, 2),
        "share_of_copy_bandwidth": round(bandwidth / copy_rate(subject.device), 3),
    }
    if isinstance(eager.run, str):
        columns["no_eager"] = eager.run
    else:
        columns.update(ratio_with_spread(eager.seconds, samples))
        columns["eager_rounds"] = len(eager.seconds)
        columns["eager_peak_bytes"] = eager.peak_bytes
    if subject.matmul_dtype is not None:
        peak = matmul_rate(subject.device, subject.matmul_dtype)
        columns["share_of_matmul_rate"] = round(speed / peak, 3)
        columns["matmul_gigaflops_per_second"] = round(peak / 1e9, 1)
    return columns
