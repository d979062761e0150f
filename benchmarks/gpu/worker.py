# SPDX-License-Identifier: Apache-2.0
"""The process that measures: it takes a batch of cases and writes a line before and after each.

It ends after the first failure, because a failed kernel may have left the device or the memory
of the others in any state; the parent starts a new one for the rest.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import clock, describe
from benchmarks.gpu.batch import FAILED, Batch, RivalFile
from benchmarks.gpu.model import Implementation, Op, Unavailable
from benchmarks.gpu.ops import OPS
from benchmarks.gpu.rivals import FileRival
from benchmarks.slices import Part, check_parts

_WARM_SECONDS = 0.1
_POISON_BYTES = 1 << 30


@dataclass(frozen=True)
class Task:
    """One measurement."""

    case: Any
    mode: str
    implementation: Implementation

    def label(self, op: str) -> dict[str, str]:
        """Return what identifies it in the results."""
        names = {"op": op, "case": str(self.case), "mode": self.mode}
        return {**names, "impl": self.implementation.name}


class Report:
    """Lines of JSON that the parent reads while they are written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, **content: Any) -> None:
        """Append one line and let it reach the disk: the next thing may end the process."""
        self._file.write(json.dumps({"event": event, **content}) + "\n")
        self._file.flush()


def tasks(op: Op, batch: Batch) -> Iterator[Task]:
    """Yield the measurements of a batch, those of one case and mode together."""
    if batch.who == "rivals":
        files = [RivalFile.parse(text) for text in batch.rivals]
        every = [FileRival(file, Path(batch.choices)).implementation() for file in files]
    else:
        compiled = batch.who == "compiled"
        every = [each for each in op.implementations() if each.compiled == compiled]
    for case in op.cases.get(batch.tier, []):
        for mode in op.modes:
            for implementation in every:
                tiers = implementation.tiers
                if mode in implementation.modes and (tiers is None or batch.tier in tiers):
                    yield Task(case, mode, implementation)


class Inputs:
    """Operands and expected results of the case and mode at hand, and of no other."""

    def __init__(self, op: Op, device: torch.device, seed: int) -> None:
        self._op, self._device, self._seed = op, device, seed
        self._case: Any = None
        self._operands: Any = None
        self._parts: dict[str, list[Part]] = {}

    def of(self, case: Any, mode: str) -> tuple[Any, list[Part]]:
        """Return (operands, expected results)."""
        if case != self._case:
            self._operands, self._parts = None, {}
            self._operands = self._op.draw(case, self._device, self._seed)
            self._case = case
        if mode not in self._parts:
            self._parts = {mode: self._op.expected(case, mode, self._operands)}
        return self._operands, self._parts[mode]


def measure(task: Task, inputs: Inputs, batch: Batch) -> dict[str, Any]:
    """Check one implementation, time it, check it again; raises if it is wrong either time."""
    device = torch.device(batch.device)
    operands, parts = inputs.of(task.case, task.mode)
    run = task.implementation.prepare(task.case, task.mode, operands)
    _poison(device)
    error = check_parts(run(), parts, task.case.dtype)
    timer = clock.Clock(device)
    samples = _rounds(lambda: timer.time(run), batch)
    error = max(error, check_parts(run(), parts, task.case.dtype))
    low, median, high = clock.middle_half(samples)
    return {
        "ms": 1e3 * median,
        "ms_middle_half": [1e3 * low, 1e3 * high],
        "rounds": len(samples),
        "flops": task.case.flops(task.mode),
        "bytes": task.case.bytes_moved(task.mode),
        "dtype": str(task.case.dtype).removeprefix("torch."),
        "peak_bytes": clock.peak_memory(run, device),
        "relative_error": error,
        "ours": task.implementation.ours,
    }


def _rounds(once: Callable[[], float], batch: Batch) -> list[float]:
    fewest, most = batch.rounds
    first = once()
    for _ in range(min(int(_WARM_SECONDS / first), most)):
        once()
    wanted = int(batch.seconds / first)
    return [once() for _ in range(min(max(wanted, fewest), most))]


def _poison(device: torch.device) -> None:
    """Leave NaN in the memory that the allocator hands out next: an unwritten result shows."""
    if device.type == "cuda":
        torch.full((_POISON_BYTES // 4,), float("nan"), device=device)


def ceilings(batch: Batch) -> dict[str, Any]:
    """Measure what the device can do: a large copy and a large bfloat16 matrix product."""
    device = torch.device(batch.device)
    large = device.type == "cuda"
    rounds = 20 if large else 3
    free = torch.cuda.mem_get_info(device)[0] if large else 1 << 26
    copies = clock.copy_samples(device, min(1 << 32, free // 16), rounds)
    size = 8192 if large else 256
    products = clock.matmul_samples(device, torch.bfloat16, size, rounds)
    copy, product = clock.middle_half(copies), clock.middle_half(products)
    return {
        "copy_bytes_per_second": copy[1],
        "copy_middle_half": [copy[0], copy[2]],
        "matmul_flops": product[1],
        "matmul_middle_half": [product[0], product[2]],
        "matmul_size": size,
        "matmul_dtype": "bfloat16",
    }


def machine(batch: Batch) -> dict[str, Any]:
    """Describe the device, the processor and every version that a speed depends on."""
    found: dict[str, Any] = {"machine": describe.machine(), "versions": describe.versions()}
    found["device_name"] = describe.file_name()
    return found


_SINGLE: dict[str, Callable[[Batch], dict[str, Any]]] = {"machine": machine, "ceilings": ceilings}


def _attempt(label: dict[str, str], ours: bool, work: Callable[[], dict[str, Any]]) -> dict:
    try:
        return {**label, "status": "ok", **work()}
    except Unavailable as reason:
        return {**label, "status": "unavailable", "reason": str(reason)}
    except torch.OutOfMemoryError as error:
        status = "failed" if ours else "skipped"
        reason = str(error).partition(". GPU")[0]
        return {**label, "status": status, "reason": f"does not fit in the memory: {reason}"}
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        return {**label, "status": "failed", "reason": reason[:2000]}


def main(batch_file: str, events_file: str) -> NoReturn:
    """Run a batch; exit with 0 when nothing is left to do and FAILED after a failure."""
    batch = Batch(**json.loads(Path(batch_file).read_text(encoding="utf-8")))
    report = Report(Path(events_file))
    if batch.op in _SINGLE:
        label = {"op": batch.op}
        report.write("start", key=batch.op, label=label)
        result = _attempt(label, True, lambda: _SINGLE[batch.op](batch))
        report.write("done", key=batch.op, result=result)
        sys.exit(0 if result["status"] == "ok" else FAILED)
    op = OPS[batch.op]
    inputs = Inputs(op, torch.device(batch.device), batch.seed)
    for task in tasks(op, batch):
        label = task.label(op.name)
        key = "/".join(label.values())
        if key in batch.done:
            continue
        if time.time() > batch.deadline:
            skipped = {**label, "status": "skipped", "reason": "the time budget was used up"}
            report.write("done", key=key, result=skipped)
            continue
        report.write("start", key=key, label=label)
        ours = task.implementation.ours
        result = _attempt(label, ours, lambda task=task: measure(task, inputs, batch))
        report.write("done", key=key, result=result)
        if result["status"] in ("failed", "skipped"):
            sys.exit(FAILED)
        if batch.device == "cuda":
            torch.cuda.empty_cache()
    sys.exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
