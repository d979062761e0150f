# SPDX-License-Identifier: Apache-2.0
"""Run the stages of a configuration in one folder, resumable by running the same again."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from disca.data.source import ClipSource, build_source
from disca.distill import checkpoint as ckpt
from disca.distill.bundle import (
    MODEL_FILE,
    Bundle,
    base_config,
    build_stage,
    dit_config,
    export,
    labelled,
    load_models,
    write_config,
)
from disca.distill.cfg import CfgTask
from disca.distill.config import (
    CfgStage,
    ClassifierStage,
    MeanFlowStage,
    PredictorStage,
    RunConfig,
    TeacherStage,
    TrainerConfig,
    load_config,
    sources,
)
from disca.distill.flow import TeacherTask
from disca.distill.meanflow import MeanFlowTask
from disca.distill.predictor import PredictorTask
from disca.distill.trainer import Task, Trainer, require_same_config, step_generator
from disca.errors import UserError
from disca.eval.classifier import train_classifier
from disca.models.configs import DiTConfig
from disca.models.discriminator import Discriminator
from disca.models.dit import DiT
from disca.models.predictor import Predictor

__all__ = ["Bundle", "export", "load_models", "locked", "train"]

_DONE = "done.json"
# What has no influence on the weights may change between two runs of the same command.
_FREE = frozenset({"checkpoint_every", "log_every", "time_bins", "tensorboard"})


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    stages: Sequence[str] | None = None,
    progress: bool = True,
) -> Path:
    """Train the stages of a configuration in order; finished stages are skipped.

    Killed at any moment, the same call goes on from the last checkpoint and ends with the same
    weights, bit for bit, as an undisturbed run with the same number of threads.

    Args:
        config: A checked configuration, or what :func:`disca.distill.config.load_config` takes.
        out: Output folder; one run at a time may use it. Each stage leaves
            ``<stage>/model.safetensors`` (averaged weights), ``log.jsonl`` and ``done.json``.
        stages: Names of the stages to run, all by default; what they start from must be done.
        progress: Whether to draw progress bars.

    Returns:
        The output folder.

    Raises:
        UserError: For a bad configuration, a folder that cannot be written or is in use, a damaged
            checkpoint, or one that another configuration made.
        NonFiniteError: If a loss or gradient is not finite.
        Interrupted: After SIGTERM or SIGINT, with the checkpoint written.
    """
    checked = config if isinstance(config, RunConfig) else load_config(config)
    wanted = list(checked.stages) if stages is None else list(stages)
    for name in wanted:
        if name not in checked.stages:
            raise UserError(f"no stage {name!r} in this run; stages: {', '.join(checked.stages)}")
    folder = Path(out)
    _check_device(checked.device)
    torch.set_num_threads(checked.threads)
    source = build_source(checked.data)
    run = _Run(checked, folder, source, base_config(checked, source), progress)
    with locked(folder):
        for name in checked.stages:
            if name in wanted:
                run.stage(name)
                write_config(folder, checked)
    return folder


def _check_device(name: str) -> None:
    """Raise UserError unless tensors can be put on the device."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device {name!r} cannot be used here ({reason}); cpu always can"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, prove that it can be written, and keep other runs out of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"cannot write to the output folder {folder}: {error.strerror or error}"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another run is writing to {folder}; wait for it or use another folder"
            ) from error
        yield
    finally:
        os.close(handle)


@dataclass
class _Run:
    """One call of :func:`train`."""

    config: RunConfig
    folder: Path
    source: ClipSource
    model: DiTConfig
    progress: bool

    def stage(self, name: str) -> None:
        """Skip, continue or start one stage."""
        settings = self.config.stages[name]
        folder = self.folder / name
        identity = self._identity(name)
        done = folder / _DONE
        if done.is_file():
            record = ckpt.read_json(done)
            require_same_config(record.get("config", {}), identity, done)
            weights = folder / MODEL_FILE
            if not weights.is_file() or ckpt.file_digest(weights) != record.get("weights"):
                raise UserError(
                    f"{weights} is missing or not what the stage wrote; delete {folder} to train "
                    f"it anew"
                )
            return
        folder.mkdir(exist_ok=True)
        if isinstance(settings, ClassifierStage):
            module = self._classifier(name, settings)
        else:
            module = self._train(name, settings, folder, identity)
        ckpt.write_tensors(
            folder / MODEL_FILE, module.state_dict(), {"stage": name, "config": identity}
        )
        ckpt.write_json(
            done, {"config": identity, "weights": ckpt.file_digest(folder / MODEL_FILE)}
        )
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)

    def _identity(self, name: str) -> dict[str, Any]:
        """Return everything that decides a stage's result, the weights it starts from included."""
        settings = self.config.stages[name]
        values = {k: v for k, v in settings.model_dump(mode="json").items() if k not in _FREE}
        identity: dict[str, Any] = {
            "seed": self.config.seed,
            "data": self.config.data,
            "stage": values,
        }
        if not isinstance(settings, ClassifierStage):
            identity["model"] = self.model.to_dict()
        for other in sources(settings).values():
            identity[f"weights of {other}"] = self._digest(name, other)
        return identity

    def _digest(self, name: str, other: str) -> str:
        done = self.folder / other / _DONE
        if not done.is_file():
            raise UserError(
                f"stage {name!r} starts from stage {other!r}, which is not done in {self.folder}; "
                f"run that first"
            )
        return str(ckpt.read_json(done).get("weights", ""))

    def _classifier(self, name: str, settings: ClassifierStage) -> nn.Module:
        with tqdm(total=settings.steps, desc=name, unit="step", disable=not self.progress) as bar:

            def show(step: int, loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
                bar.update(step - bar.n)

            return train_classifier(
                labelled(self.source),
                steps=settings.steps,
                batch=settings.batch,
                seed=self.config.seed,
                learning_rate=settings.lr,
                progress=show,
            )

    def _train(
        self, name: str, settings: TrainerConfig, folder: Path, identity: Mapping[str, Any]
    ) -> nn.Module:
        generator = step_generator(self.config.seed, name, -1, 0)
        with torch.random.fork_rng():
            # Initial weights come from torch's global generator.
            torch.manual_seed(generator.initial_seed())
            task = self._task(name, settings)
        optimizers = {"model": getattr(settings, "optimizer", None)}
        if isinstance(settings, PredictorStage):
            optimizers = {
                "predictor": settings.optimizer,
                "discriminator": settings.discriminator,
            }
        trainer = Trainer(
            task,
            settings,
            {key: value for key, value in optimizers.items() if value is not None},
            folder,
            seed=self.config.seed,
            identity=identity,
            progress=self.progress,
        )
        final = trainer.fit()
        return next(iter(final.values()))

    def _task(self, name: str, settings: TrainerConfig) -> Task:
        device = self.config.device
        if isinstance(settings, TeacherStage):
            model = DiT(self.model) if settings.init is None else self._load(settings.init)
            return TeacherTask(name, model.to(device), self.source, settings)
        if isinstance(settings, CfgStage):
            return CfgTask(
                name, self._student(name), self._load(settings.teacher), self.source, settings
            )
        if isinstance(settings, MeanFlowStage):
            return MeanFlowTask(
                name, self._student(name), self._load(settings.teacher), self.source, settings
            )
        if isinstance(settings, PredictorStage):
            return self._predictor_task(name, settings)
        raise TypeError(f"no task for settings of type {type(settings).__name__}")

    def _student(self, name: str) -> DiT:
        """Return the network that a stage starts from, with the embedders that the stage adds."""
        settings = self.config.stages[name]
        names = sources(settings)
        start = self._load(names.get("init", names["teacher"]))
        wanted = dit_config(self.model, self.config, name)
        if start.config == wanted:
            return start
        student = DiT.from_teacher(
            start, guidance_embed=wanted.guidance_embed, mean_flow=wanted.mean_flow
        )
        return student.to(self.config.device)

    def _predictor_task(self, name: str, settings: PredictorStage) -> PredictorTask:
        host = self._load(settings.host)
        predictor = build_stage(self.model, self.config, name, self.source)
        if not isinstance(predictor, Predictor):
            raise TypeError(f"stage {name!r} builds a {type(predictor).__name__}")
        if settings.init is not None:
            path = self.folder / settings.init / MODEL_FILE
            ckpt.load_module(predictor, ckpt.load_tensors(path).tensors, path)
        discriminator = None
        if settings.steps > settings.mse_steps:
            discriminator = Discriminator(host.config, taps=settings.taps).to(self.config.device)
        return PredictorTask(
            name,
            predictor.to(self.config.device),
            discriminator,
            host,
            self.source,
            settings,
            seed=self.config.seed,
        )

    def _load(self, name: str) -> DiT:
        """Build the network of a finished stage and load its weights."""
        model = DiT(dit_config(self.model, self.config, name))
        path = self.folder / name / MODEL_FILE
        ckpt.load_module(model, ckpt.load_tensors(path).tensors, path)
        return model.to(self.config.device)
