# SPDX-License-Identifier: Apache-2.0
"""How every benchmark measures: check first, then time ours and eager in alternation.

Speed is reported as a ratio to the eager version timed in the same run, round by round, with the
spread of that ratio; a ratio whose middle half contains 1 is called a tie. Where one eager call
takes seconds there are few rounds, and the record says how many.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.clock import Clock, copy_rate, matmul_rate, middle_half, peak_memory

SECONDS_PER_CASE = 1.0
MIN_ROUNDS, MAX_ROUNDS = 10, 200
WARMUP_ROUNDS = 3
SLOW_SECONDS, SLOW_ROUNDS = 0.5, 3
VERY_SLOW_SECONDS, VERY_SLOW_ROUNDS = 5.0, 2
"""Where ours and eager together take longer than this, they are timed only so many times."""


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
    """Summarise the per-round ratio eager / ours: median, quartiles and an honest verdict."""
    ratios = [e / o for e, o in zip(eager, ours, strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
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
    eager = subject.eager
    eager_seconds: list[float] = []
    our_seconds: list[float] = []

    def time_eager() -> None:
        if not isinstance(eager, str):
            eager_seconds.append(clock.time(eager))

    def time_ours() -> None:
        our_seconds.append(clock.time(subject.run))

    our_peak = peak_memory(time_ours, subject.device)
    eager_peak = None if isinstance(eager, str) else peak_memory(time_eager, subject.device)
    pair = our_seconds[-1] + sum(eager_seconds)
    if pair > SLOW_SECONDS:  # too slow to repeat, and too slow to need warming: the call counts
        rounds = (VERY_SLOW_ROUNDS if pair > VERY_SLOW_SECONDS else SLOW_ROUNDS) - 1
    else:
        for _ in range(WARMUP_ROUNDS):
            time_eager()
            time_ours()
        rounds = min(max(int(SECONDS_PER_CASE / pair), MIN_ROUNDS), MAX_ROUNDS)
        eager_seconds.clear()
        our_seconds.clear()
    benchmark.pedantic(time_ours, setup=time_eager, rounds=rounds)
    low, seconds, high = middle_half(our_seconds)
    bandwidth, speed = subject.bytes_moved / seconds, subject.flops / seconds
    if isinstance(eager, str):
        benchmark.extra_info["no_eager"] = eager
    else:
        benchmark.extra_info.update(
            ratio_with_spread(eager_seconds, our_seconds), eager_peak_bytes=eager_peak
        )
    if subject.matmul_dtype is not None:
        peak = matmul_rate(subject.device, subject.matmul_dtype)
        benchmark.extra_info["share_of_matmul_rate"] = round(speed / peak, 3)
        benchmark.extra_info["matmul_gigaflops_per_second"] = round(peak / 1e9, 1)
    benchmark.extra_info.update(
        seconds=float(f"{seconds:.4g}"),
        seconds_middle_half=[float(f"{x:.4g}") for x in (low, high)],
        rounds=len(our_seconds),
        bytes_moved=subject.bytes_moved,
        flops=subject.flops,
        gigabytes_per_second=round(bandwidth / 1e9, 2),
        gigaflops_per_second=round(speed / 1e9, 2),
        share_of_copy_bandwidth=round(bandwidth / copy_rate(subject.device), 3),
        peak_bytes=our_peak,
    )
