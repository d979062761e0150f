# SPDX-License-Identifier: Apache-2.0
"""How much memory a call takes."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

__all__ = ["allocated_peak"]


def allocated_peak(run: Callable[[], object], device: torch.device) -> int:
    """Return the bytes by which PyTorch's allocator rises at the peak of one call.

    On a CPU it counts neither what compiled code allocates for itself nor what the C library keeps
    between allocations.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes: list[tuple[int, int, int]] = []
    pending = [*profiler.profiler.kineto_results.experimental_event_tree()]
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
