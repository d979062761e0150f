# SPDX-License-Identifier: Apache-2.0
"""Sample the shipped checkpoints with DisCa: 8 of 20 steps run the network.

python examples/disca_sampling.py [FOLDER OF A RUN]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from disca.cache import NoCache
from disca.compare.suite import load_suite
from disca.data.io import clip_grid, write_clip
from disca.sample import cached_sample, disca_sample, flow_shift_schedule


def main(folder: Path | None = None, out: Path = Path("disca_sampling.gif")) -> None:
    """Sample three prompts with and without the cache and write both as a GIF."""
    suite = load_suite(folder)  # the checkpoints of the package by default
    host, predictor = suite.host("rmeanflow"), suite.predictor()

    prompts = ["7 left fast", "3 up slow", "0 right fast"]
    cond = suite.source.encode(prompts).with_guidance(suite.sampling.guidance)
    noise = torch.randn(3, *suite.source.shape, generator=torch.Generator().manual_seed(0))
    schedule = flow_shift_schedule(20, suite.sampling.shift)

    plain = cached_sample(host, NoCache(), noise, schedule, cond)
    fast = disca_sample(host, predictor, noise, schedule, cond, full_steps="n4")
    for name, result in (("plain", plain), ("DisCa n4", fast)):
        print(
            f"{name}: {result.full_passes} full and {result.predictor_passes} predicted passes, "
            f"{result.seconds:.2f} s, cache {result.cache_bytes / 1024:.1f} KiB"
        )
    write_clip(out, clip_grid([("plain", plain.x), ("DisCa n4", fast.x)], prompts), fps=6.0)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
