# SPDX-License-Identifier: Apache-2.0
"""How much memory PyTorch's allocator hands out."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

__all__ = ["AllocatedPeak", "allocated_peak"]


def allocated_peak(run: Callable[[], object], device: torch.device) -> int:
    """Return the bytes by which PyTorch's allocator rises at the peak of one call.

    On a CPU it counts neither what compiled code allocates for itself nor what the C library keeps
    between allocations.
    """
    gc.collect()
    watch = AllocatedPeak(device)
    watch.start()
    try:
        run()
    finally:
        peak = watch.stop()
    return peak


class AllocatedPeak:
    """Watches PyTorch's allocator from :meth:`start` to :meth:`stop`.

    On a CPU a tensor that was there before is not missed when it is freed: what replaces it counts
    as a rise.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def start(self) -> None:
        """Begin to watch."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return
        freed = torch.empty(1)
        with _quiet():
            self._profiler.start()
            # The library warns once of a tensor that it has not seen come.
            del freed

    def stop(self) -> int:
        """Return the bytes by which the allocator rose at most."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self._before
        with _quiet():
            self._profiler.stop()
        recorded = self._profiler.profiler
        if recorded is None or recorded.kineto_results is None:
            return 0
        changes: list[tuple[int, int, int]] = []
        pending: list[Any] = [*recorded.kineto_results.experimental_event_tree()]
        while pending:
            event = pending.pop()
            pending += event.children
            if event.tag == _EventType.Allocation:
                change = event.extra_fields
                changes.append((event.start_time_ns, change.total_allocated, change.alloc_size))
        if not changes:
            return 0
        _, total, size = min(changes)
        return max(change[1] for change in changes) - (total - size)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the profiler's library from reporting on the terminal that it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
