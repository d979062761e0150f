# SPDX-License-Identifier: Apache-2.0
"""Training logs: JSON lines that survive a kill, TensorBoard events, a progress bar."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["StepLog"]


class StepLog:
    """Logs of one stage: ``log.jsonl``, TensorBoard events and a progress bar.

    On resume the JSON-lines file is cut back to the byte at which the checkpoint found it, so that
    lines are neither lost nor doubled.

    Args:
        folder: Folder of the stage.
        stage: Name shown in the progress bar.
        total: Number of steps of the stage.
        start: Steps already done.
        offset: Size of the JSON-lines file at the checkpoint that training resumes from.
        progress: Whether to draw the bar.
        tensorboard: Whether to write TensorBoard events.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        total: int,
        *,
        start: int = 0,
        offset: int = 0,
        progress: bool = True,
        tensorboard: bool = True,
    ) -> None:
        path = folder / "log.jsonl"
        # The file stays open for as long as the log does; close() ends it.
        self._file = path.open("ab")
        if path.stat().st_size > offset:
            self._file.truncate(offset)
            self._file.seek(0, os.SEEK_END)
        self._writer: SummaryWriter | None = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(folder / "tensorboard"), purge_step=start + 1, flush_secs=30
            )
        interval = 0.5 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=stage,
            unit="step",
            disable=not progress,
            mininterval=interval,
            maxinterval=interval,
        )

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line for a step (counted from 1)."""
        self._file.write(json.dumps({"step": step, **values}).encode() + b"\n")
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, step)

    def advance(self, loss: float) -> None:
        """Move the progress bar by one step; it shows the loss and the time left."""
        self._bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
        self._bar.update(1)

    def sync(self) -> int:
        """Make every line durable and return the file's size in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close files and bar; harmless when called twice."""
        if not self._file.closed:
            self.sync()
            self._file.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._bar.close()
