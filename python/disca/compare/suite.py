# SPDX-License-Identifier: Apache-2.0
"""The models that the demo and the evaluation sample from, with the settings to sample them at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from disca.compare.files import write_text
from disca.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from disca.data.source import ClipBatch, ClipSource
    from disca.distill.bundle import Bundle
    from disca.eval.classifier import ClipClassifier
    from disca.models.dit import DiT
    from disca.models.state import State

__all__ = ["HOSTS", "Form", "Sampling", "Suite", "load_suite", "shipped_checkpoints"]

Form = Literal["paper", "residual"]

HOSTS = ("teacher", "cfg", "meanflow", "rmeanflow")
"""The stages that the comparison samples from."""

SAMPLING_FILE = "sampling.yaml"


class Sampling(BaseModel):
    """How the models of a run are sampled.

    Attributes:
        guidance: guidance scale of the two-pass teacher and of the distilled models.
        shift: flow shift of the schedule.
        form: form of the predictor where none is named.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    guidance: float = Field(4.0, gt=0)
    shift: float = Field(5.0, gt=0)
    form: Form = "residual"


@dataclass(frozen=True)
class Suite:
    """Models and settings.

    Attributes:
        source: data source; encodes prompts and draws real clips.
        hosts: the networks by stage.
        predictors: the predictors by form; call one as ``predictor(state, cache)``.
        classifier: judges clips.
        sampling: guidance, shift, form.
    """

    source: ClipSource
    hosts: Mapping[str, DiT]
    predictors: Mapping[Form, nn.Module]
    classifier: ClipClassifier | None
    sampling: Sampling

    @classmethod
    def from_bundle(cls, bundle: Bundle, sampling: Sampling) -> Suite:
        """Sort the models of a run by what the comparison uses them for."""
        from disca.distill.config import PredictorStage
        from disca.eval.classifier import ClipClassifier

        predictors: dict[Form, nn.Module] = {}
        for name, stage in bundle.config.stages.items():
            if isinstance(stage, PredictorStage) and name in bundle.models:
                predictors.setdefault(stage.form, bundle.predictor(name))
        classifiers = [m for m in bundle.models.values() if isinstance(m, ClipClassifier)]
        return cls(
            source=bundle.source,
            hosts={name: bundle.dit(name) for name in HOSTS if name in bundle.models},
            predictors=predictors,
            classifier=classifiers[0] if classifiers else None,
            sampling=sampling,
        )

    def prompts_of(self, batch: ClipBatch) -> list[str]:
        """Return the prompts that describe a batch's clips.

        Raises:
            UserError: the data have no labels, so nothing can be scored.
        """
        encoder = getattr(self.source, "prompts", None)
        if batch.labels is None or encoder is None:
            raise UserError("the comparison needs labelled clips, such as the moving digits")
        prompts: list[str] = encoder.prompts(batch.labels)
        return prompts

    def host(self, stage: str) -> DiT:
        """Return the network of a stage.

        Raises:
            UserError: the checkpoints do not have it.
        """
        if stage not in self.hosts:
            found = ", ".join(self.hosts) or "none"
            raise UserError(f"the checkpoints have no finished stage {stage!r}; found: {found}")
        return self.hosts[stage]

    def predictor(self, form: Form) -> Callable[[State, Tensor], Tensor]:
        """Return the predictor of a form.

        Raises:
            UserError: the checkpoints do not have it.
        """
        if form not in self.predictors:
            found = ", ".join(self.predictors) or "none"
            raise UserError(
                f"the checkpoints have no predictor of the {form!r} form; found: {found}"
            )
        return self.predictors[form]


def shipped_checkpoints() -> Path:
    """Return the folder of the checkpoints that come with the package."""
    return Path(str(resources.files("disca") / "assets" / "digits"))


def load_suite(folder: Path | None = None, **changes: object) -> Suite:
    """Load the models of a run.

    Args:
        folder: output folder of ``disca train`` or of an export; the shipped checkpoints by
            default. A file ``sampling.yaml`` in it sets guidance, shift and form.
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
