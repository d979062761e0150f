# SPDX-License-Identifier: Apache-2.0
"""The networks of a run, from a training folder or from exported weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

import torch
import yaml
from torch import nn

from disca.data.source import ClipSource, build_source
from disca.distill import checkpoint as ckpt
from disca.distill.config import (
    CfgStage,
    ClassifierStage,
    MeanFlowStage,
    PredictorStage,
    RunConfig,
    Stage,
    TrainerConfig,
    load_config,
)
from disca.errors import UserError
from disca.eval.classifier import ClipClassifier, LabelledSource
from disca.models.configs import DiTConfig
from disca.models.dit import DiT
from disca.models.predictor import Predictor

__all__ = [
    "MODEL_FILE",
    "Bundle",
    "base_config",
    "build_stage",
    "dit_config",
    "export",
    "labelled",
    "load_models",
]

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.yaml"

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Bundle:
    """The trained networks of a run, in evaluation mode.

    Attributes:
        config: Configuration of the run.
        source: Its data source, which also encodes prompts.
        models: Network of each finished stage, by the stage's name.
    """

    config: RunConfig
    source: ClipSource
    models: dict[str, nn.Module]

    def dit(self, stage: str) -> DiT:
        """Return the DiT of a stage.

        Raises:
            UserError: If the bundle has no such stage or it holds another kind of network.
        """
        return self._get(stage, DiT)

    def predictor(self, stage: str = "predictor") -> Predictor:
        """Return the predictor of a stage; see :meth:`dit`."""
        return self._get(stage, Predictor)

    def classifier(self, stage: str = "classifier") -> ClipClassifier:
        """Return the classifier of a stage; see :meth:`dit`."""
        return self._get(stage, ClipClassifier)

    def _get(self, stage: str, kind: type[M]) -> M:
        model = self.models.get(stage)
        if not isinstance(model, kind):
            names = ", ".join(n for n, m in self.models.items() if isinstance(m, kind))
            raise UserError(
                f"no {kind.__name__} of a stage {stage!r}; there are: {names or 'none'}"
            )
        return model


def base_config(config: RunConfig, source: ClipSource) -> DiTConfig:
    """Return the DiT's configuration; what the data decides is filled in and may be left out.

    Raises:
        UserError: If a model key is unknown or contradicts the data.
    """
    channels = source.shape[0]
    from_data = {
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": source.text_dim,
        "pooled_dim": source.pooled_dim or None,
    }
    for key, value in from_data.items():
        if key in config.model and config.model[key] != value:
            raise UserError(f"model.{key} is {config.model[key]}, but the data needs {value}")
    return DiTConfig.from_dict({**from_data, **config.model})


def labelled(source: ClipSource) -> LabelledSource:
    """Return the source as one that has labels.

    Raises:
        UserError: If it has none, so that no classifier can be trained on it.
    """
    if not hasattr(source, "label_sizes"):
        raise UserError("a classifier stage needs data with labels, such as moving digits")
    return cast(LabelledSource, source)


def dit_config(base: DiTConfig, config: RunConfig, name: str) -> DiTConfig:
    """Return the configuration of the DiT that a stage trains, from what it starts from."""
    stage = config.stages[name]
    start = getattr(stage, "init", None) or getattr(stage, "teacher", None)
    before = base if start is None else dit_config(base, config, start)
    if isinstance(stage, CfgStage):
        return replace(before, guidance_embed=True)
    if isinstance(stage, MeanFlowStage):
        return replace(before, mean_flow=True)
    return before


def build_stage(base: DiTConfig, config: RunConfig, name: str, source: ClipSource) -> nn.Module:
    """Build the network that a stage trains, with fresh weights."""
    stage: Stage = config.stages[name]
    if isinstance(stage, ClassifierStage):
        return ClipClassifier(source.shape[0], labelled(source).label_sizes)
    if isinstance(stage, PredictorStage):
        host = dit_config(base, config, stage.host)
        return Predictor(host, depth=stage.depth, form=stage.form, block=stage.block)
    if not isinstance(stage, TrainerConfig):
        raise TypeError(f"stage {name!r} has settings of unknown type {type(stage).__name__}")
    return DiT(dit_config(base, config, name))


def _weights(folder: Path, name: str) -> Path | None:
    """Return the weights of a stage in a training folder or among exported files."""
    trained, exported = folder / name / MODEL_FILE, folder / f"{name}.safetensors"
    if exported.is_file():
        return exported
    return trained if (folder / name / "done.json").is_file() else None


def load_models(folder: str | Path, *, device: str = "cpu") -> Bundle:
    """Load the networks of a training folder or of exported weights, as float32.

    Args:
        folder: Output folder of :func:`disca.distill.run.train`, or of :func:`export`.
        device: Where the networks are put.

    Returns:
        The networks of all stages that are there, in evaluation mode, without gradients.

    Raises:
        UserError: If the folder holds no run, or a file is damaged or of another model.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no trained run: {CONFIG_FILE} is missing")
    config = load_config(path)
    source = build_source(config.data)
    base = base_config(config, source)
    models: dict[str, nn.Module] = {}
    for name in config.stages:
        weights = _weights(folder, name)
        if weights is None:
            continue
        with torch.random.fork_rng():
            model = build_stage(base, config, name, source)
        ckpt.load_module(model, ckpt.load_tensors(weights).tensors, weights)
        models[name] = model.to(device).eval().requires_grad_(False)
    if not models:
        raise UserError(f"{folder} holds no finished stage yet")
    return Bundle(config, source, models)


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the configuration of a run to its folder, atomically, unless it is there already."""
    path = folder / CONFIG_FILE
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    if not path.is_file() or path.read_text() != text:
        ckpt.write_text(path, text)


def export(
    out: str | Path, dest: str | Path, *, dtype: torch.dtype = torch.float16
) -> dict[str, int]:
    """Write the weights of a training folder as they are shipped: one small file a stage.

    Args:
        out: Output folder of :func:`disca.distill.run.train`.
        dest: Folder for ``<stage>.safetensors`` and ``config.yaml``; made if missing.
        dtype: Type in which floating-point tensors are stored.

    Returns:
        Size in bytes of each file by stage.

    Raises:
        UserError: If the folder holds no finished stage or ``dest`` cannot be written.
    """
    bundle = load_models(out)
    folder = Path(dest)
    sizes = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, model in bundle.models.items():
            path = folder / f"{name}.safetensors"
            tensors = {
                key: value.to(dtype) if value.is_floating_point() else value
                for key, value in model.state_dict().items()
            }
            ckpt.write_tensors(path, tensors, {"stage": name})
            sizes[name] = path.stat().st_size
        write_config(folder, bundle.config)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    return sizes
