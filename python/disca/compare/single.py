# SPDX-License-Identifier: Apache-2.0
"""Sample clips for prompts and write them: the content of ``disca sample``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from disca.compare.methods import Method, run_method
from disca.compare.suite import load_suite
from disca.data.io import clip_grid, write_clip
from disca.errors import UserError
from disca.sample import STEP_LISTS, resolve_full_steps

__all__ = ["sample_clips"]


def sample_clips(
    prompts: Sequence[str],
    out: Path,
    *,
    checkpoints: Path | None,
    method: str,
    steps: int,
    full_steps: str | None,
    seed: int,
    changes: Mapping[str, object],
) -> str:
    """Sample one clip for each prompt and write them side by side.

    Args:
        prompts: one clip each.
        out: a path that ends in .gif or .mp4.
        checkpoints: folder of a run; the shipped checkpoints by default.
        method: a stage to sample, or "disca" or "reuse" to sample rmeanflow with a cache.
        steps: number of steps.
        full_steps: see :func:`disca.sample.resolve_full_steps`; n4 by default where it fits.
        seed: seed of the noise.
        changes: guidance, shift and form; None leaves the run's.

    Returns:
        One line about what was done.

    Raises:
        UserError: anything that does not fit; nothing is written then.
    """
    chosen = _method(method, steps, full_steps)
    if out.suffix.lower() not in (".gif", ".mp4"):
        raise UserError(f"--out must end in .gif or .mp4, got {out}")
    if out.parent.exists() and not out.parent.is_dir():
        raise UserError(f"cannot write {out}: {out.parent} is not a folder")
    if seed < 0:
        raise UserError(f"--seed must be 0 or more, got {seed}")
    suite = load_suite(checkpoints, **changes)
    cond = suite.source.encode(prompts)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), *suite.source.shape, generator=generator)
    result = run_method(suite, chosen, noise, cond)
    write_clip(out, clip_grid([(method, result.x)], prompts, scale=6), fps=6.0)
    return (
        f"wrote {out}: {len(prompts)} clips, {result.full_passes} full and "
        f"{result.predictor_passes} predicted passes, {result.seconds:.2f} s, "
        f"cache {result.cache_bytes / 1024:.1f} KiB"
    )


def _method(name: str, steps: int, full_steps: str | None) -> Method:
    """Check the request as far as it goes without the models."""
    if steps < 1:
        raise UserError(f"--steps must be at least 1, got {steps}")
    if name == "disca" or name == "reuse":
        if full_steps is None and steps != STEP_LISTS["n4"].steps:
            raise UserError(f"--full-steps is needed for {steps} steps, for example every:4")
        spec = full_steps or "n4"
        if len(resolve_full_steps(spec, steps)) == steps:
            raise UserError(f"--full-steps {spec} leaves no step to skip; use --method rmeanflow")
        return Method(name, name, "rmeanflow", steps, "disca" if name == "disca" else "reuse", spec)
    if full_steps is not None:
        raise UserError(f"--full-steps belongs to disca and reuse, not to {name}")
    return Method(name, name, name, steps, "cfg" if name == "teacher" else "none")
