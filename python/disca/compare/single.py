# SPDX-License-Identifier: Apache-2.0
"""Sample clips for prompts and write them: the content of ``disca sample``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from disca.cache import build_policy
from disca.compare.calibrating import make_calibration
from disca.compare.plan import RowPlan
from disca.compare.suite import load_suite
from disca.data.io import clip_grid, write_clip
from disca.errors import UserError
from disca.sample import cached_sample

__all__ = ["sample_clips"]


def sample_clips(
    prompts: Sequence[str],
    out: Path,
    *,
    checkpoints: Path | None,
    row: RowPlan,
    seed: int,
    changes: Mapping[str, object],
) -> str:
    """Sample one clip for each prompt and write them side by side.

    Args:
        prompts: one clip each.
        out: a path that ends in .gif or .mp4.
        checkpoints: folder of a run; the shipped checkpoints by default.
        row: model, steps and cache policy.
        seed: seed of the noise.
        changes: guidance and shift; None leaves the run's.

    Returns:
        One line about what was done.

    Raises:
        UserError: anything that does not fit; nothing is written then.
    """
    if out.suffix.lower() not in (".gif", ".mp4"):
        raise UserError(f"--out must end in .gif or .mp4, got {out}")
    if out.parent.exists() and not out.parent.is_dir():
        raise UserError(f"cannot write {out}: {out.parent} is not a folder")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed must be 0 or more and fit 63 bits, got {seed}")
    suite = load_suite(checkpoints, **changes)
    cond = suite.condition(row.model, suite.source.encode(prompts))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), *suite.source.shape, generator=generator)
    fitted = partial(make_calibration, suite, model=row.model, steps=row.steps)
    policy = build_policy(row.policy, suite.resources(fitted))
    result = cached_sample(suite.host(row.model), policy, noise, suite.schedule(row.steps), cond)
    write_clip(out, clip_grid([(row.policy, result.x)], prompts, scale=6), fps=6.0)
    return (
        f"wrote {out}: {len(prompts)} clips, {result.full_passes} full and "
        f"{result.predictor_passes} skipped steps, {result.seconds:.2f} s, "
        f"cache {result.cache_bytes / 1024:.1f} KiB"
    )
