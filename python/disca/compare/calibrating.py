# SPDX-License-Identifier: Apache-2.0
"""Calibrations of the models of a suite, made once and kept in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from disca.cache.calibration import Calibration, calibrate, calibrated_class
from disca.compare.files import output_folder
from disca.compare.suite import load_suite
from disca.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from disca.compare.suite import Suite
    from disca.models.condition import Condition

__all__ = ["calibrate_command", "calibration_for", "calibration_path", "make_calibration"]

_AT_ONCE = 4
"""Clips of one run: several runs show how much the measurements differ from clip to clip."""


def calibration_path(folder: Path, policy: str, model: str, steps: int) -> Path:
    """Return where a calibration is kept: ``<policy>-<model>-<steps>.safetensors``."""
    return folder / f"{policy}-{model}-{steps}.safetensors"


def make_calibration(
    suite: Suite,
    policy: str,
    model: str,
    steps: int,
    *,
    clips: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """Calibrate a policy on uncached runs over training prompts.

    Args:
        suite: the models and their sampling settings.
        policy: name of a calibrated policy.
        model: stage whose network is measured.
        steps: number of steps.
        clips: number of clips.
        seed: draws prompts and noise.
        progress: whether to draw a progress bar.

    Raises:
        UserError: a setting out of range, an unknown stage or policy, or what
            :func:`disca.cache.calibration.calibrate` raises.
    """
    for name, value, least in (("steps", steps, 1), ("clips", clips, 1), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"a calibration needs {name} of at least {least}, got {value}")
    batches = _batches(suite, model, clips, seed)
    runs = tqdm(
        batches, desc=policy, total=-(-clips // _AT_ONCE), disable=not progress, leave=False
    )
    return calibrate(
        policy,
        suite.host(model),
        suite.schedule(steps),
        runs,
        _settings(suite, model, clips, seed),
    )


def calibration_for(
    suite: Suite,
    policy: str,
    model: str,
    steps: int,
    folder: Path,
    *,
    clips: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """Return the calibration of ``folder`` that fits, or make it and keep it there.

    A file fits if its model, steps, times, resolution, weights, clips, seed and guidance are those
    that are asked for; one that does not is made again.

    Args:
        suite: the models and their sampling settings.
        policy: name of a calibrated policy.
        model: stage whose network is measured.
        steps: number of steps.
        folder: where calibrations are kept.
        clips: number of clips.
        seed: draws prompts and noise.
        progress: whether to draw a progress bar while a calibration is made.

    Raises:
        UserError: a damaged file, one of another version, or what :func:`make_calibration` raises.
    """
    path = calibration_path(folder, policy, model, steps)
    if path.is_file():
        found = Calibration.load(path)
        if found.settings == _settings(suite, model, clips, seed) and _fits(found, suite, steps):
            return found
    made = make_calibration(suite, policy, model, steps, clips=clips, seed=seed, progress=progress)
    made.save(path)
    return made


def calibrate_command(
    policy: str,
    model: str,
    steps: int,
    out: Path,
    *,
    checkpoints: Path | None,
    clips: int,
    seed: int,
    changes: dict[str, Any],
) -> list[str]:
    """Make a calibration, write it and say what was fitted: the content of ``disca calibrate``.

    Args:
        policy: name of a calibrated policy.
        model: stage whose network is measured.
        steps: number of steps.
        out: folder of the file.
        checkpoints: folder of a run; the shipped checkpoints by default.
        clips: number of clips.
        seed: draws prompts and noise.
        changes: sampling settings to set; None leaves one as it is.

    Returns:
        Lines to print.

    Raises:
        UserError: anything that does not fit; nothing is written then.
    """
    cls = calibrated_class(policy)
    suite = load_suite(checkpoints, **changes)
    output_folder(out)
    made = make_calibration(suite, policy, model, steps, clips=clips, seed=seed, progress=True)
    path = made.save(calibration_path(out, policy, model, steps))
    return [*cls.summary(made.tensors), f"wrote {path}"]


def _settings(suite: Suite, model: str, clips: int, seed: int) -> dict[str, Any]:
    return {"model": model, "clips": clips, "seed": seed, "guidance": suite.sampling.guidance}


def _fits(found: Calibration, suite: Suite, steps: int) -> bool:
    try:
        model = found.settings["model"]
        found.check(suite.schedule(steps).tolist(), suite.source.shape, suite.host(model))
    except UserError:
        return False
    return True


def _batches(suite: Suite, model: str, clips: int, seed: int) -> Iterator[tuple[Tensor, Condition]]:
    """Draw prompts of the training split and noise, a few clips at a time."""
    generator = torch.Generator().manual_seed(seed)
    cond = suite.condition(model, suite.source.sample(clips, generator).condition)
    noise = torch.randn(clips, *suite.source.shape, generator=generator)
    for start in range(0, clips, _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        yield noise[rows], cond.select(rows)
