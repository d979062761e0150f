# SPDX-License-Identifier: Apache-2.0
"""One trainer for every stage: optimisers, EMA, precision, checkpoints, logs, exact resume.

A stage is a :class:`Task`: named trainable modules and a loss. All randomness of a micro-batch
comes from a generator seeded by (seed, stage, step, micro-batch), so that a step depends on the
checkpointed state only and a resumed run is bit-equal to an undisturbed one.
"""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from disca.distill import checkpoint as ckpt
from disca.distill.config import OptimizerConfig, TrainerConfig
from disca.distill.group import ParameterGroup
from disca.distill.logs import StepLog
from disca.errors import UserError

__all__ = ["Interrupted", "NonFiniteError", "StepOutput", "Task", "Trainer", "step_generator"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; the message names step, stage, samples and culprit."""


class Interrupted(SystemExit):
    """Training was asked to stop (SIGTERM, SIGINT); the checkpoint is written."""


@dataclass
class StepOutput:
    """What one micro-batch gives back to the trainer.

    Attributes:
        loss: Scalar to differentiate.
        per_sample: Detached loss of each sample ``[B]``.
        t: Interval starts ``[B]``, for the loss per time bin.
        r: Interval ends ``[B]``.
        logs: Further scalars to log (averaged over micro-batches).
        tensors: Detached intermediates by name, in order of computation; searched for the culprit
            when the loss is not finite.
    """

    loss: Tensor
    per_sample: Tensor
    t: Tensor
    r: Tensor
    logs: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Task(Protocol):
    """What a stage must offer to be trained."""

    name: str
    modules: Mapping[str, nn.Module]
    """Trainable modules by group; each has its own optimiser."""

    def use_averaged(self, averaged: Mapping[str, nn.Module]) -> None:
        """Take the averaged copies of the modules, for tasks that use them in the loss."""
        ...

    def phases(self, step: int) -> tuple[str, ...]:
        """Return the groups to update in this step (counted from 0), in order."""
        ...

    def compute(self, phase: str, step: int, micro: int, generator: torch.Generator) -> StepOutput:
        """Return the loss of a group on one micro-batch; called under autocast."""
        ...


def step_generator(seed: int, stage: str, step: int, micro: int) -> torch.Generator:
    """Return the CPU generator of one micro-batch, a pure function of the arguments."""
    text = f"{seed}/{stage}/{step}/{micro}".encode()
    value = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
    return torch.Generator().manual_seed(value)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying from them; yields the list of what came."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    old = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Trainer:
    """Trains one stage in its folder and leaves a checkpoint to resume from.

    Args:
        task: The stage.
        settings: Steps, precision, accumulation, intervals.
        optimizers: Optimiser settings by group of the task.
        folder: Folder of the stage, existing and writable.
        seed: Seed of the run.
        identity: Everything that decides the stage's result, JSON-able; a checkpoint with another
            identity is refused, naming the field.
        progress: Whether to draw a progress bar.
    """

    def __init__(
        self,
        task: Task,
        settings: TrainerConfig,
        optimizers: Mapping[str, OptimizerConfig],
        folder: Path,
        *,
        seed: int,
        identity: Mapping[str, Any],
        progress: bool = True,
    ) -> None:
        self.task = task
        self.settings = settings
        self.folder = folder
        self.seed = seed
        self.identity = dict(identity)
        self.progress = progress
        self.groups = {
            name: ParameterGroup(module, optimizers[name], settings.steps)
            for name, module in task.modules.items()
        }
        averaged = {n: g.averaged.module for n, g in self.groups.items() if g.averaged is not None}
        task.use_averaged(averaged)
        self.device = next(next(iter(task.modules.values())).parameters()).device
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=settings.precision == "float16"
        )
        self.path = folder / "checkpoint.safetensors"

    def fit(self) -> dict[str, nn.Module]:
        """Train to the end, from the checkpoint if there is one; return the modules to ship.

        Raises:
            UserError: If the checkpoint is damaged or belongs to another configuration.
            NonFiniteError: If a loss or gradient is not finite.
            Interrupted: After SIGTERM or SIGINT, once the checkpoint is written.
        """
        start, offset = self._resume()
        steps = self.settings.steps
        with (
            _stop_requests() as stop,
            StepLog(
                self.folder,
                self.task.name,
                steps,
                start=start,
                offset=offset,
                progress=self.progress,
                tensorboard=self.settings.tensorboard,
            ) as log,
        ):
            for step in range(start, steps):
                values = self._step(step)
                log.advance(values["loss"])
                if (step + 1) % self.settings.log_every == 0 or step + 1 == steps:
                    log.write(step + 1, values)
                if stop or (step + 1) % self.settings.checkpoint_every == 0 or step + 1 == steps:
                    self._save(step + 1, log.sync())
                if stop:
                    raise Interrupted(128 + stop[0])
        return {name: group.final() for name, group in self.groups.items()}

    def _step(self, step: int) -> dict[str, Any]:
        """Do one step: every phase, every micro-batch; return what to log."""
        began = time.perf_counter()
        values: dict[str, Any] = {}
        outputs: list[StepOutput] = []
        for phase in self.task.phases(step):
            group = self.groups[phase]
            prefix = "" if not outputs else f"{phase}/"
            outputs = [self._backward(phase, step, m) for m in range(self.settings.accumulate)]
            loss = sum(float(o.loss) for o in outputs) / len(outputs)
            values[f"{prefix}loss"] = loss
            values[f"{prefix}lr"] = group.set_lr(step)
            values[f"{prefix}grad_norm"] = self._update(phase, step)
            for key in outputs[0].logs:
                values[prefix + key] = sum(o.logs[key] for o in outputs) / len(outputs)
            if not prefix:
                values["loss_bins"] = self._bins(outputs)
        values["seconds"] = round(time.perf_counter() - began, 4)
        return values

    def _backward(self, phase: str, step: int, micro: int) -> StepOutput:
        generator = step_generator(self.seed, self.task.name, step, micro)
        precision = self.settings.precision
        with torch.autocast(
            self.device.type,
            dtype=_DTYPES.get(precision, torch.bfloat16),
            enabled=precision != "float32",
        ):
            output = self.task.compute(phase, step, micro, generator)
        if not torch.isfinite(output.loss):
            raise NonFiniteError(self._explain_loss(phase, step, output))
        torch.autograd.backward(self.scaler.scale(output.loss / self.settings.accumulate))
        output.loss = output.loss.detach()
        output.tensors = {}
        return output

    def _update(self, phase: str, step: int) -> float:
        """Clip, check and apply the gradients of a group; return the norm before clipping."""
        group = self.groups[phase]
        for optimizer in group.optimizers:
            self.scaler.unscale_(optimizer)
        limit = group.settings.clip
        norm = nn.utils.clip_grad_norm_(
            group.parameters, float("inf") if limit is None else limit, foreach=True
        )
        if not torch.isfinite(norm) and not self.scaler.is_enabled():
            raise NonFiniteError(self._explain_gradient(phase, step))
        for optimizer in group.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        group.module.zero_grad(set_to_none=True)
        if group.averaged is not None:
            group.averaged.update_parameters(group.module)
        return float(norm)

    def _bins(self, outputs: list[StepOutput]) -> list[float | None]:
        """Mean loss per bin of t, None for a bin without samples."""
        count = self.settings.time_bins
        t = torch.cat([o.t for o in outputs])
        losses = torch.cat([o.per_sample for o in outputs]).float()
        index = (t * count).long().clamp_(0, count - 1)
        sums = torch.zeros(count, device=t.device).index_add_(0, index, losses)
        counts = torch.bincount(index, minlength=count)
        pairs = zip(sums.tolist(), counts.tolist(), strict=True)
        return [s / n if n else None for s, n in pairs]

    def _explain_loss(self, phase: str, step: int, output: StepOutput) -> str:
        bad = (~torch.isfinite(output.per_sample)).nonzero().flatten().tolist()[:4]
        samples = ", ".join(
            f"sample {i} (t={float(output.t[i]):.4f}, r={float(output.r[i]):.4f})" for i in bad
        )
        culprit = next(
            (
                f"parameter {name!r}"
                for name, p in self.groups[phase].module.named_parameters()
                if not bool(torch.isfinite(p).all())
            ),
            next(
                (
                    f"tensor {name!r}"
                    for name, value in output.tensors.items()
                    if not bool(torch.isfinite(value).all())
                ),
                "the loss itself",
            ),
        )
        return (
            f"stage {self.task.name!r}, step {step + 1}: the {phase} loss is "
            f"{float(output.loss.detach())}; {samples or 'no single sample'}; first not finite: "
            f"{culprit}. Lower the learning rate or use precision 'float32'; rerunning resumes "
            f"from the last checkpoint"
        )

    def _explain_gradient(self, phase: str, step: int) -> str:
        names = [
            name
            for name, p in self.groups[phase].module.named_parameters()
            if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        ]
        return (
            f"stage {self.task.name!r}, step {step + 1}: the gradient norm of {phase!r} is not "
            f"finite; parameters concerned: {', '.join(names[:4]) or 'none alone'}"
            f"{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        )

    def _save(self, step: int, offset: int) -> None:
        tensors: dict[str, Tensor] = {}
        for name, group in self.groups.items():
            tensors |= group.tensors(name)
        metadata = {
            "step": step,
            "log_offset": offset,
            "config": self.identity,
            "config_hash": ckpt.config_hash(self.identity),
            "scaler": self.scaler.state_dict(),
        }
        ckpt.write_tensors(self.path, tensors, metadata)

    def _resume(self) -> tuple[int, int]:
        """Load the checkpoint if there is one; return the steps done and the log's size then."""
        if not self.path.exists():
            return 0, 0
        saved = ckpt.load_tensors(self.path)
        require_same_config(saved.metadata.get("config", {}), self.identity, self.path)
        for name, group in self.groups.items():
            group.restore(name, saved, self.path)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(saved.metadata["scaler"])
        return int(saved.metadata["step"]), int(saved.metadata["log_offset"])


def require_same_config(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with what another configuration made.

    Raises:
        UserError: Naming the fields that changed and what to do.
    """
    changes = ckpt.differing_fields(old, new)
    if changes:
        raise UserError(
            f"{path} was made with another configuration ({'; '.join(changes[:3])}"
            f"{'; ...' if len(changes) > 3 else ''}): restore the old value, "
            f"use another output folder, or delete {path.parent}"
        )
