# SPDX-License-Identifier: Apache-2.0
"""Configuration of a training run: pydantic models, presets, readable errors."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from disca.cache.steps import resolve_full_steps
from disca.errors import UserError

__all__ = [
    "CfgStage",
    "ClassifierStage",
    "GuidanceRange",
    "MeanFlowStage",
    "OptimizerConfig",
    "PredictorStage",
    "RunConfig",
    "TeacherStage",
    "TimeConfig",
    "TrainerConfig",
    "load_config",
    "preset_names",
]

_KINDS = ("classifier", "teacher", "cfg", "meanflow", "predictor")

GuidanceRange = float | tuple[float, float] | None
"""A fixed guidance scale, a range to draw it from uniformly, or None for no guidance input."""


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors that name the closest valid key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(_unknown(str(key), cls.model_fields))
        return values


def _unknown(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    hint = _closest(name, list(known)) or f"; valid: {', '.join(known)}"
    return f"unknown key {name!r}{hint}"


class TimeConfig(Settings):
    """Distribution of t (:func:`disca.distill.times.sample_times`)."""

    distribution: Literal["uniform", "shifted", "logit_normal"] = "uniform"
    shift: float = Field(default=1.0, gt=0)
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)


class OptimizerConfig(Settings):
    """AdamW, learning-rate schedule, clipping and weight averaging of one module.

    With `muon_lr` the matrices of the transformer blocks are trained by Muon at that rate, scaled
    to the update size of AdamW, and only the rest by AdamW; both follow one schedule.
    """

    lr: float = Field(default=1e-3, gt=0)
    muon_lr: float | None = Field(default=None, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: int = Field(default=0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: float = Field(
        default=0.0, ge=0, le=1, description="last rate as a share of lr (cosine)"
    )
    clip: float | None = Field(default=1.0, gt=0)
    ema: float | None = Field(default=0.999, gt=0, lt=1)
    ema_warmup: bool = True

    @property
    def rates(self) -> tuple[float, ...]:
        """Peak learning rates, AdamW's first, then Muon's if it is used."""
        return (self.lr,) if self.muon_lr is None else (self.lr, self.muon_lr)

    def lr_factor(self, step: int, total: int) -> float:
        """Return the share of the peak rate at a step: linear warm-up, then constant or cosine.

        Args:
            step: Step, counted from 0.
            total: Steps of the stage.

        Returns:
            ``(step + 1) / warmup`` during warm-up; then 1, or for ``"cosine"``
            ``f + (1 - f) * (1 + cos(pi * p)) / 2`` with p the share done, f = final_lr.
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        share = (step - self.warmup) / max(1, total - self.warmup)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
        return self.final_lr + (1.0 - self.final_lr) * cosine


class TrainerConfig(Settings):
    """What the trainer needs beside the loss; every stage has these fields."""

    steps: int = Field(ge=1)
    batch: int = Field(default=64, ge=1)
    accumulate: int = Field(default=1, ge=1)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    checkpoint_every: int = Field(default=100, ge=1)
    log_every: int = Field(default=1, ge=1)
    time_bins: int = Field(default=8, ge=1, le=64)
    tensorboard: bool = True
    init: str | None = Field(default=None, description="stage whose weights this one starts from")


class ClassifierStage(Settings):
    """The small classifier behind the semantic and quality scores."""

    kind: Literal["classifier"] = "classifier"
    steps: int = Field(default=600, ge=1)
    batch: int = Field(default=64, ge=1)
    lr: float = Field(default=2e-3, gt=0)


class TeacherStage(TrainerConfig):
    """Flow matching with condition dropout."""

    kind: Literal["teacher"] = "teacher"
    optimizer: OptimizerConfig = OptimizerConfig()
    time: TimeConfig = TimeConfig(distribution="logit_normal", mean=0.5)
    dropout: float = Field(default=0.1, ge=0, le=1)


class CfgStage(TrainerConfig):
    """CFG distillation (DisCa Algorithm 1)."""

    kind: Literal["cfg"] = "cfg"
    teacher: str = "teacher"
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-4)
    time: TimeConfig = TimeConfig()
    guidance: GuidanceRange = (1.0, 8.0)


class MeanFlowStage(TrainerConfig):
    """MeanFlow (R = 1) and Restricted MeanFlow (R < 1), DisCa Algorithm 2 and options."""

    kind: Literal["meanflow"] = "meanflow"
    teacher: str = "cfg"
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-4)
    time: TimeConfig = TimeConfig()
    restriction: float = Field(default=1.0, gt=0, le=1)
    equal_fraction: float = Field(default=0.0, ge=0, le=1)
    guidance: GuidanceRange = (1.0, 8.0)
    velocity: Literal["teacher", "data"] = "teacher"
    tangent_width: float | Literal["interval"] = 0.05
    tangent_clip: float | None = Field(default=None, gt=0)
    correction_clip: float | None = Field(default=None, gt=0)
    tangent_normalise: float | None = Field(default=None, gt=0)
    tangent_warmup: int = Field(default=0, ge=0)
    adaptive_power: float = Field(default=0.0, ge=0)
    adaptive_constant: float = Field(default=1e-2, gt=0)
    ema_target: bool = False

    @model_validator(mode="after")
    def _width_not_negative(self) -> MeanFlowStage:
        if isinstance(self.tangent_width, float) and self.tangent_width < 0:
            raise ValueError(f"tangent_width must be >= 0 or 'interval', got {self.tangent_width}")
        if self.ema_target and self.optimizer.ema is None:
            raise ValueError("ema_target needs optimizer.ema, which is off")
        return self


class PredictorStage(TrainerConfig):
    """Predictor on a frozen student: regression, then hinge GAN (DisCa Algorithm 3)."""

    kind: Literal["predictor"] = "predictor"
    host: str = "rmeanflow"
    steps: int = Field(default=1500, ge=1)
    mse_steps: int = Field(default=500, ge=0)
    form: Literal["paper", "residual"] = "paper"
    block: Literal["single", "double"] = "single"
    depth: int = Field(default=2, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, ema=None)
    discriminator: OptimizerConfig = OptimizerConfig(lr=1e-2, betas=(0.0, 0.999), ema=None)
    taps: list[int] | None = None
    mse_weight: float = Field(default=1.0, ge=0)
    gan_weight: float = Field(default=1.0, ge=0)
    time: TimeConfig = TimeConfig()
    restriction: float = Field(default=0.2, gt=0, le=1)
    guidance: GuidanceRange = (1.0, 8.0)
    delta: Literal["uniform", "schedule"] = "uniform"
    delta_max: float = Field(default=0.2, gt=0, le=1)
    schedule_lists: list[str] = ["n2", "n3", "n4"]
    schedule_steps: int = Field(default=20, ge=2)
    schedule_shift: float = Field(default=5.0, gt=0)
    points: Literal["line", "student", "trajectory"] = "line"
    step_power: float = Field(default=0.0, ge=0)
    trajectories: int = Field(default=512, ge=1)
    refresh: int = Field(default=300, ge=1)

    @model_validator(mode="after")
    def _lists_fit(self) -> PredictorStage:
        if self.points == "trajectory" and self.delta != "schedule":
            raise ValueError("points 'trajectory' are those of a schedule: set delta: schedule")
        if self.mse_weight == 0 and (self.mse_steps or not self.gan_weight):
            raise ValueError(
                "mse_weight 0 leaves the GAN term alone: set mse_steps: 0 and gan_weight above 0"
            )
        if not self.schedule_lists:
            raise ValueError("schedule_lists needs at least one list of full steps")
        for spec in self.schedule_lists:
            try:
                full = resolve_full_steps(spec, self.schedule_steps)
            except UserError as error:
                raise ValueError(f"schedule_lists: {error}") from error
            if len(full) == self.schedule_steps:
                raise ValueError(f"schedule_lists: {spec!r} predicts no step")
        return self


Stage = Annotated[
    ClassifierStage | TeacherStage | CfgStage | MeanFlowStage | PredictorStage,
    Field(discriminator="kind"),
]


class RunConfig(Settings):
    """A whole run: data, model and the stages in the order in which they are trained."""

    seed: int = Field(default=0, ge=0)
    threads: int = Field(default=2, ge=1)
    device: str = "cpu"
    data: dict[str, Any]
    model: dict[str, Any]
    stages: dict[str, Stage]

    @model_validator(mode="before")
    @classmethod
    def _kind_from_name(cls, values: Any) -> Any:
        """Let a stage that is called like its kind leave the kind out."""
        if isinstance(values, Mapping) and isinstance(values.get("stages"), Mapping):
            stages = {
                name: {"kind": name, **stage}
                if isinstance(stage, Mapping) and name in _KINDS
                else stage
                for name, stage in values["stages"].items()
            }
            return {**values, "stages": stages}
        return values

    @model_validator(mode="after")
    def _sources_come_first(self) -> RunConfig:
        seen: list[str] = []
        for name, stage in self.stages.items():
            for field, source in sources(stage).items():
                fits = [s for s in seen if _can_start_from(stage, field, self.stages[s])]
                if source not in fits:
                    raise ValueError(
                        f"stage {name!r}: {field} is {source!r}, which is no earlier stage that "
                        f"fits; those are: {', '.join(fits) or 'none'}{_closest(source, fits)}"
                    )
            seen.append(name)
        return self


def sources(stage: Stage) -> dict[str, str]:
    """Return the stages whose weights a stage uses, by field: init, teacher, host."""
    values = {field: getattr(stage, field, None) for field in ("init", "teacher", "host")}
    return {field: name for field, name in values.items() if name is not None}


def _can_start_from(stage: Stage, field: str, other: Stage) -> bool:
    if isinstance(stage, PredictorStage) and field == "init":
        return isinstance(other, PredictorStage)
    return isinstance(other, (TeacherStage, CfgStage, MeanFlowStage))


def _closest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def preset_names() -> list[str]:
    """Return the names of the presets that ship with the package."""
    folder = resources.files("disca") / "presets"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _read(source: str | Path) -> tuple[str, Any]:
    """Return (where it came from, parsed YAML) of a preset name or a file."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{path}: no such configuration file")
        name, text = str(path), path.read_text()
    else:
        if str(source) not in preset_names():
            known = preset_names()
            hint = _closest(str(source), known)
            raise UserError(f"unknown preset {str(source)!r}; presets: {', '.join(known)}{hint}")
        name = f"preset {source}"
        text = (resources.files("disca") / "presets" / f"{source}.yaml").read_text()
    try:
        return name, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error


def load_config(
    source: str | Path | Mapping[str, Any],
    *,
    smoke: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Read and check a run configuration.

    Args:
        source: Name of a preset, path of a YAML file, or a mapping.
        smoke: Apply the file's ``smoke`` section, a nested mapping of changes that makes every
            stage tiny.
        changes: Further nested changes, applied last.

    Returns:
        The checked configuration.

    Raises:
        UserError: One line that names the source, the field, and the closest valid name of a typo.
    """
    name, values = _read(source) if isinstance(source, (str, Path)) else ("config", source)
    if not isinstance(values, Mapping):
        raise UserError(f"{name}: expected a mapping of settings, got {type(values).__name__}")
    values = dict(values)
    small = values.pop("smoke", None)
    if smoke:
        if not isinstance(small, Mapping):
            raise UserError(f"{name} has no 'smoke' section, so --smoke cannot be used with it")
        values = _merge(values, small)
    if changes:
        values = _merge(values, changes)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{name}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    """Tell the first problem of a validation error in one line."""
    first = error.errors(include_url=False)[0]
    # Pydantic puts the tag of a tagged union into the location, after the name of the field.
    path = list(first["loc"])
    shown = [
        str(part)
        for i, part in enumerate(path)
        if not (part in _KINDS and i == 2 and path[0] == "stages")
    ]
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    context = first.get("ctx", {})
    if first["type"] == "missing":
        message = "this setting is required"
    elif first["type"] == "union_tag_invalid":
        shown.append("kind")
        tag = str(context["tag"])
        message = f"unknown kind {tag!r}; kinds: {', '.join(_KINDS)}{_closest(tag, _KINDS)}"
    elif first["type"] == "union_tag_not_found":
        shown.append("kind")
        message = f"needed, because the stage is called otherwise; kinds: {', '.join(_KINDS)}"
    elif isinstance(given, (str, int, float)):
        message += f", got {given!r}"
        if "expected" in context:
            message += _closest(str(given), str(context["expected"]).split("'")[1::2])
    return f"{'.'.join(shown)}: {message}" if shown else message
