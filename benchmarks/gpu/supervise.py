# SPDX-License-Identifier: Apache-2.0
"""Processes under a time limit: a crash or a hang costs the one step in which it happens."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.batch import FAILED, Batch

_POLL_SECONDS = 0.05
_START_SECONDS = 90.0
_GRACE_SECONDS = 15.0
_TAIL_CHARACTERS = 600


@dataclass
class Workplace:
    """Where steps run and what they see.

    Attributes:
        root: of the sources.
        scratch: temporary folder; steps run in it, so that only `path` decides what is imported.
        path: PYTHONPATH of every step.
        environment: further variables.
        log: file that gets everything the steps print.
    """

    root: Path
    scratch: Path
    path: list[Path]
    environment: dict[str, str]
    log: Path

    def variables(self) -> dict[str, str]:
        """Return the environment of a step."""
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        path = os.pathsep.join([*map(str, self.path), *filter(None, inherited)])
        # A step's pytest is no worker of a pytest that may have called this.
        outer = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
        return {**outer, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **self.environment}

    def start(self, command: Sequence[str | Path]) -> "subprocess.Popen[bytes]":
        """Start a step in a process group of its own."""
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(map(str, command))}\n".encode())
            log.flush()
            return subprocess.Popen(
                [str(part) for part in command],
                cwd=self.scratch,
                env=self.variables(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_own_group,
            )

    def run(self, command: Sequence[str | Path], limit: float) -> str | None:
        """Run a step to its end; return what went wrong, None if nothing did."""
        before = self.log.stat().st_size if self.log.exists() else 0
        process = self.start(command)
        try:
            status = process.wait(timeout=max(limit, 0.1))
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            end(process)
        return None if status == 0 else f"{ending(status)}: {self.tail(before)}"

    def tail(self, start: int) -> str:
        """Return the last lines that were printed since the log had `start` bytes."""
        with self.log.open("rb") as log:
            log.seek(start)
            text = log.read().decode(errors="replace").strip()
        if text.startswith("$"):  # the command itself
            text = text.partition("\n")[2]
        return text[-_TAIL_CHARACTERS:]


def _own_group() -> None:
    """Lead a group that can be ended as a whole, in the session that ends with the terminal."""
    os.setpgrp()


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of a process and of the group that it leads."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ending(status: int) -> str:
    """Say how a process ended."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


class Supervisor:
    """Runs batches of measurements, each in as many processes as its failures need."""

    def __init__(self, place: Workplace, deadline: float) -> None:
        self._place, self._deadline = place, deadline
        self._count = 0

    def run(
        self, batch: Batch, limit: float, record: Callable[[dict[str, Any]], None]
    ) -> str | None:
        """Run a batch, each measurement for at most `limit` seconds.

        `record` gets every result at once. Return why the batch ended early, or None.
        """
        idle = 0
        while True:
            finished = len(batch.done)
            reason, over = self._one_process(batch, limit, record)
            if over:
                return reason
            idle = 0 if len(batch.done) > finished else idle + 1
            if idle == 2:
                return reason

    def _one_process(
        self, batch: Batch, limit: float, record: Callable[[dict[str, Any]], None]
    ) -> tuple[str | None, bool]:
        """Return what went wrong and whether the batch is over."""
        self._count += 1
        scratch, place = self._place.scratch, self._place
        batch_file = scratch / f"batch{self._count}.json"
        events = Events(scratch / f"events{self._count}.jsonl", batch, record)
        batch.save(batch_file)
        printed = place.log.stat().st_size if place.log.exists() else 0
        process = place.start(
            [sys.executable, "-m", "benchmarks.gpu.worker", batch_file, events.path]
        )
        try:
            problem = self._watch(process, events, limit)
        finally:
            end(process)
        events.read()
        if problem is None and process.returncode == 0:
            return None, True
        over_time = time.time() > self._deadline
        if problem is None and process.returncode != FAILED:
            problem = f"{ending(process.returncode)}: {place.tail(printed)}"
        if events.running is not None and problem is not None:
            status = "skipped" if over_time else "failed"
            record({**events.running[1], "status": status, "reason": problem})
            batch.done.append(events.running[0])
            problem = None
        return problem, over_time

    def _watch(
        self, process: "subprocess.Popen[bytes]", events: "Events", limit: float
    ) -> str | None:
        """Wait for the process; return why it has to be killed, None if it ended."""
        since = time.time()
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            if events.read():
                since = time.time()
            now = time.time()
            allowed = _START_SECONDS if events.fresh else limit
            if now - since > allowed:
                return f"no result after {allowed:.0f} s"
            if now > self._deadline + _GRACE_SECONDS:
                return "the time budget was used up while it ran"
        return None


class Events:
    """What a worker has written so far."""

    def __init__(self, path: Path, batch: Batch, record: Callable[[dict[str, Any]], None]) -> None:
        self.path = path
        self.fresh = True
        self.running: tuple[str, dict[str, str]] | None = None
        self._batch, self._record = batch, record
        self._read = 0

    def read(self) -> bool:
        """Take in the lines that are new and whole; return whether there were any."""
        if not self.path.exists():
            return False
        data = self.path.read_bytes()[self._read :]
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            event = json.loads(line)
            self.fresh = False
            if event["event"] == "start":
                self.running = (event["key"], event["label"])
            else:
                self.running = None
                self._batch.done.append(event["key"])
                self._record(event["result"])
        return bool(whole)
