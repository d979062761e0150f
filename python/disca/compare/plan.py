# SPDX-License-Identifier: Apache-2.0
"""What a comparison runs: rows of model, steps and policy, and how much of each."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from disca.cache.registry import parse_spec
from disca.data.source import closest
from disca.errors import UserError

__all__ = ["Plan", "RowPlan", "load_plan", "plan_names", "row_plan"]


# Characters of a row's name and of the digest behind it.
_LONGEST_NAME, _DIGEST = 80, 8

# torch's generators take 64 bits, and a seed stands for several streams.
_HIGHEST_SEED = 2**32


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RowPlan(_Settings):
    """One way of sampling.

    Attributes:
        model: the stage whose network is sampled.
        steps: number of steps.
        policy: the cache policy with its settings, see :func:`disca.cache.registry.parse_spec`.
        label: name in tables; made of policy, model and steps by default.
        group: the part of the report that it belongs to.
    """

    model: str
    steps: int = Field(ge=1)
    policy: str = "none"
    label: str = ""
    group: str = ""

    @property
    def key(self) -> str:
        """A name that is different for every model, number of steps and policy.

        It names files, so that what a file name cannot hold is left out and stands in a digest.
        """
        text = f"{self.model}-{self.steps}-{self.policy}"
        name = re.sub(r"[^\w.]+", "-", text).strip("-")
        if name == text:
            return name
        digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]
        return f"{name[:_LONGEST_NAME]}-{digest}"

    @property
    def name(self) -> str:
        """The label, or what stands for it."""
        if self.label:
            return self.label
        name, settings = parse_spec(self.policy)
        if name == "none":
            return f"{self.model}, {self.steps} steps"
        shown = ", ".join(f"{key} {value}" for key, value in settings.items())
        return f"{name} ({shown})" if shown else name


class Plan(_Settings):
    """A comparison.

    Attributes:
        title: what is compared.
        seeds: each draws its own prompts, real clips and noise.
        clips: clips of each row and seed.
        batch: clips that are sampled at once; adaptive policies decide once for a batch.
        reference_clips: real held-out clips that distances are taken to.
        timing_batch: clips that are sampled at once where time and memory are measured.
        repeats: timed runs of each row.
        shown: clips of each row that are kept for the report.
        threads: threads of PyTorch; a small model is no faster on several. None leaves them.
        calibration_clips: clips of the uncached run that calibrated policies are fitted on.
        rows: what is compared; the first is the reference of the speed-ups.
        target: the row that ``error_teacher`` is taken to, which need not be among the rows; the
            first by default.
    """

    title: str
    seeds: tuple[int, ...] = (0,)
    clips: int = Field(64, ge=2)
    batch: int = Field(64, ge=1)
    reference_clips: int = Field(512, ge=2)
    timing_batch: int = Field(4, ge=1)
    repeats: int = Field(3, ge=1)
    shown: int = Field(4, ge=1)
    threads: int | None = Field(None, ge=1)
    calibration_clips: int = Field(16, ge=1)
    rows: tuple[RowPlan, ...] = Field(min_length=1)
    target: RowPlan | None = None

    @model_validator(mode="after")
    def _seeds_and_rows_differ(self) -> Plan:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different numbers from 0 up, got {list(self.seeds)}")
        if max(self.seeds) >= _HIGHEST_SEED:
            raise ValueError(f"seeds must be below {_HIGHEST_SEED}, got {max(self.seeds)}")
        keys: dict[tuple[str, str], str] = {}
        for row in self.rows:
            if (row.group, row.key) in keys:
                raise ValueError(f"two rows of the group {row.group!r} are {row.key!r}")
            keys[row.group, row.key] = row.key
        return self


_OWN: tuple[str, dict[str, Any]] = ("plan", {"title": "Cache policies"})


def row_plan(**settings: Any) -> RowPlan:
    """Return a row.

    Raises:
        UserError: a setting that does not fit.
    """
    try:
        return RowPlan(**settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{first['loc'][0]}: {first['msg']}, got {first['input']!r}") from error


def plan_names() -> list[str]:
    """Return the names of the plans that ship with the package."""
    folder = resources.files("disca") / "presets" / "compare"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith("yaml"))


def load_plan(
    source: str | Path | None,
    *,
    quick: bool = False,
    rows: Sequence[Mapping[str, Any]] = (),
    changes: Mapping[str, Any] | None = None,
) -> Plan:
    """Read and check a plan.

    Args:
        source: name of a preset or path of a YAML file; None for a plan of ``rows`` alone.
        quick: apply the file's ``quick`` section, which makes everything small.
        rows: further rows.
        changes: fields of :class:`Plan` to set; None leaves a field as it is.

    Raises:
        UserError: one line that names the source and the field.
    """
    name, values = _read(source) if source is not None else _OWN
    values = dict(values)
    small = values.pop("quick", None)
    if quick:
        if not isinstance(small, Mapping):
            raise UserError(f"{name} has no 'quick' section, so --quick cannot be used with it")
        values |= small
    values |= {key: value for key, value in (changes or {}).items() if value is not None}
    values["rows"] = [*_rows(name, values), *rows]
    values.pop("groups", None)
    try:
        return Plan.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        given = first["input"]
        if where and not isinstance(given, dict):
            message += f", got {given!r}"
        raise UserError(f"{name}: {where + ': ' if where else ''}{message}") from error


def _read(source: str | Path) -> tuple[str, dict[str, Any]]:
    """Return (where it came from, parsed YAML) of a preset name or a file."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{path}: no such plan")
        try:
            name, text = str(path), path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not a text file in UTF-8: {error}") from error
    else:
        if str(source) not in plan_names():
            raise UserError(
                f"unknown preset {str(source)!r}; presets: {', '.join(plan_names())}"
                + closest(str(source), plan_names())
            )
        name = f"preset {source}"
        folder = resources.files("disca") / "presets" / "compare"
        text = (folder / f"{source}.yaml").read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{name}: expected a mapping of settings, got {type(values).__name__}")
    return name, values


def _rows(name: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of all groups; a group gives its rows what they do not say themselves."""
    rows = _list(name, values, "rows")
    for group in _list(name, values, "groups"):
        if not isinstance(group, Mapping) or not {"group", "rows"} <= set(group):
            raise UserError(f"{name}: each of the groups needs 'group' (its name) and 'rows'")
        common = {key: value for key, value in group.items() if key != "rows"}
        for row in _list(name, group, "rows"):
            if not isinstance(row, (str, Mapping)):
                raise UserError(
                    f"{name}: a row is a policy or a mapping with model, steps and policy, got "
                    f"{row!r}"
                )
            own = {"policy": row} if isinstance(row, str) else dict(row)
            rows.append({**common, **own})
    return rows


def _list(name: str, values: Mapping[str, Any], key: str) -> list[Any]:
    found = values.get(key, [])
    if not isinstance(found, list):
        raise UserError(f"{name}: {key!r} must be a list, got {found!r}")
    return list(found)
