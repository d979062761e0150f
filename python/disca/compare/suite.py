# SPDX-License-Identifier: Apache-2.0
"""The models that a comparison samples from, with the settings to sample them at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from disca.cache import Resources
from disca.compare.files import write_text
from disca.errors import UserError
from disca.sample.schedule import flow_shift_schedule

if TYPE_CHECKING:
    from torch import Tensor, nn

    from disca.cache.calibration import Calibration
    from disca.data.source import ClipBatch, ClipSource
    from disca.distill.bundle import Bundle
    from disca.eval.classifier import ClipClassifier
    from disca.models.condition import Condition
    from disca.models.dit import DiT
    from disca.models.state import State

__all__ = ["Sampling", "Suite", "load_suite", "shipped_checkpoints"]

SAMPLING_FILE = "sampling.yaml"


class Sampling(BaseModel):
    """How the models of a run are sampled.

    Attributes:
        guidance: guidance scale of the two-pass teacher and of the distilled models.
        shift: flow shift of the schedule.
        predictor: stage of the predictor where none is named.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    guidance: float = Field(4.0, gt=0)
    shift: float = Field(5.0, gt=0)
    predictor: str = "predictor"


@dataclass(frozen=True)
class Suite:
    """Models and settings.

    Attributes:
        source: data source; encodes prompts and draws real clips.
        hosts: the networks by stage.
        predictors: the predictors by stage; call one as ``predictor(state, cache)``.
        classifier: judges clips; None where the data have no labels.
        sampling: guidance, shift, predictor.
    """

    source: ClipSource
    hosts: Mapping[str, DiT]
    predictors: Mapping[str, nn.Module]
    classifier: ClipClassifier | None
    sampling: Sampling

    @classmethod
    def from_bundle(cls, bundle: Bundle, sampling: Sampling) -> Suite:
        """Sort the models of a run by what the comparison uses them for."""
        from disca.eval.classifier import ClipClassifier
        from disca.models import DiT, Predictor

        models = bundle.models
        classifiers = [model for model in models.values() if isinstance(model, ClipClassifier)]
        return cls(
            source=bundle.source,
            hosts={name: model for name, model in models.items() if isinstance(model, DiT)},
            predictors={n: model for n, model in models.items() if isinstance(model, Predictor)},
            classifier=classifiers[0] if classifiers else None,
            sampling=sampling,
        )

    def prompts_of(self, batch: ClipBatch) -> list[str]:
        """Return the prompts that describe a batch's clips; none where the data have no labels."""
        encoder = getattr(self.source, "prompts", None)
        if batch.labels is None or encoder is None:
            return []
        prompts: list[str] = encoder.prompts(batch.labels)
        return prompts

    def condition(self, stage: str, cond: Condition) -> Condition:
        """Return a condition with the guidance scale, if the stage's network takes one."""
        guided = self.host(stage).config.guidance_embed
        return cond.with_guidance(self.sampling.guidance if guided else None)

    def schedule(self, steps: int) -> Tensor:
        """Return the times of a run of so many steps, [steps + 1]."""
        return flow_shift_schedule(steps, self.sampling.shift)

    def resources(self, calibration: Callable[[str], Calibration]) -> Resources:
        """Return what the settings of a policy may name.

        The predictor of :class:`Sampling` comes first.
        """
        first = self.sampling.predictor
        names = sorted(self.predictors, key=lambda name: name != first)
        return Resources(
            {name: self.predictors[name] for name in names},
            calibration,
            self.source.null,
            self.sampling.guidance,
        )

    def host(self, stage: str) -> DiT:
        """Return the network of a stage.

        Raises:
            UserError: the checkpoints do not have it.
        """
        if stage not in self.hosts:
            found = ", ".join(self.hosts) or "none"
            raise UserError(f"the checkpoints have no finished stage {stage!r}; found: {found}")
        return self.hosts[stage]

    def predictor(self, stage: str | None = None) -> Callable[[State, Tensor], Tensor]:
        """Return a predictor; without a name that of :class:`Sampling`.

        Raises:
            UserError: the checkpoints do not have it.
        """
        stage = stage or self.sampling.predictor
        if stage not in self.predictors:
            found = ", ".join(self.predictors) or "none"
            raise UserError(f"the checkpoints have no predictor {stage!r}; found: {found}")
        return self.predictors[stage]


def shipped_checkpoints() -> Path:
    """Return the folder of the checkpoints that come with the package."""
    return Path(str(resources.files("disca") / "assets" / "digits"))


def load_suite(folder: Path | None = None, **changes: object) -> Suite:
    """Load the models of a run.

    Args:
        folder: output folder of ``disca train`` or of an export; the shipped checkpoints by
            default. A file ``sampling.yaml`` in it sets guidance, shift and predictor.
        **changes: fields of :class:`Sampling` to set; None leaves a field as it is.

    Returns:
        The models, in evaluation mode, float32.

    Raises:
        UserError: no run in the folder, a damaged file, or a setting that does not fit.
    """
    from disca.distill.bundle import load_models

    folder = shipped_checkpoints() if folder is None else folder
    sampling = _sampling(folder / SAMPLING_FILE, changes)
    return Suite.from_bundle(load_models(folder), sampling)


def copy_sampling(source: Path, target: Path) -> None:
    """Take the sampling settings of one folder along to another, if it has any.

    Raises:
        UserError: the settings cannot be read or written, or do not fit.
    """
    path = source / SAMPLING_FILE
    if path.is_file():
        _sampling(path, {})
        write_text(target / SAMPLING_FILE, path.read_text(encoding="utf-8"))


def _sampling(path: Path, changes: Mapping[str, object]) -> Sampling:
    values: dict[str, object] = {}
    if path.is_file():
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}: expected a mapping of settings")
    values |= {name: value for name, value in changes.items() if value is not None}
    try:
        return Sampling.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(
            f"sampling setting {name!r}: {first['msg']}, got {first['input']!r}"
        ) from error
