# SPDX-License-Identifier: Apache-2.0
"""Lay clips out as VBench (arXiv 2311.17982) reads them: file names, prompts, command lines."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from disca.compare.clips import load_clips
from disca.compare.files import output_folder, write_text
from disca.compare.results import load_results
from disca.data.io import to_frames, write_clip
from disca.errors import UserError

__all__ = ["CUSTOM_DIMENSIONS", "Export", "export_clips", "export_comparison"]

CUSTOM_DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
"""The dimensions that VBench offers for prompts that are not its own."""

_VIDEOS, _PROMPTS, _INFO, _SCRIPT = "videos", "prompts.json", "full_info.json", "evaluate.sh"

# The dimension that is scored on the still ones of its videos.
_FLICKERING = "temporal_flickering"

# The longest name that common file systems take, 255 bytes, less "-NN.mp4" and what a file that is
# being written has around its name.
_LONGEST = 230


# What H.264 takes: sides in pixels, and speeds that a fraction of denominator 1000 can be.
_LARGEST_SIDE = 16384
_SPEEDS = (0.001, 1000.0)


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: where.
        methods: the methods, each with a folder of videos.
        videos: number of videos of each method.
        missing: videos of VBench's prompts that a full score needs and that are not there.
        script: runs every command line.
    """

    folder: Path
    methods: list[str]
    videos: int
    missing: int
    script: Path


def export_comparison(
    folder: Path,
    out: Path,
    *,
    full_info: Path | None = None,
    fps: float = 8.0,
    scale: int = 1,
) -> Export:
    """Export the clips that a comparison kept, by :func:`export_clips`.

    Args:
        folder: the folder that ``disca compare --out`` wrote.
        out: folder of the export.
        full_info: VBench's ``VBench_full_info.json``; see :func:`export_clips`.
        fps: frames per second of the videos.
        scale: enlargement in whole pixels.

    Raises:
        UserError: no finished comparison in the folder, or what :func:`export_clips` refuses.
    """
    results, clips = load_results(folder), load_clips(folder)
    count = len(next(iter(clips.values()), ()))
    prompts = list(results.settings.get("prompts") or [""] * count)
    return export_clips(clips, prompts, out, full_info=full_info, fps=fps, scale=scale)


def export_clips(
    clips: Mapping[str, Tensor],
    prompts: Sequence[str],
    out: Path,
    *,
    full_info: Path | None = None,
    fps: float = 8.0,
    scale: int = 1,
) -> Export:
    """Write videos, prompts and command lines for VBench.

    In ``out`` appear

    - ``videos/METHOD/PROMPT-INDEX.mp4``, INDEX counting a prompt's clips from 0. VBench's standard
      mode finds videos by this name. A folder holds nothing else, since VBench takes the suffix of
      all videos from the first file in it;
    - ``prompts.json``, file name to prompt, which ``--prompt_file`` takes;
    - ``full_info.json``, a list of ``{"prompt_en": ..., "dimension": [...]}`` as in VBench's
      ``VBench_full_info.json``, of the prompts that there are clips of;
    - ``evaluate.sh``: one ``vbench evaluate`` for each method and dimension, that of temporal
      flickering behind VBench's filter of still videos.

    Without ``full_info`` the commands use VBench's mode ``custom_input`` and the dimensions that it
    offers there. A character that no file name can have becomes ``_`` in a name, and a name is cut
    where it is too long; ``prompts.json`` has the whole prompt.

    With ``full_info`` they use the standard mode, every prompt must be one of VBench's, and the
    dimensions are those of the prompts. A full score takes 5 videos of each prompt, and 25 of those
    of temporal flickering, of which VBench's static filter keeps some.

    Args:
        clips: clips [n, C, F, H, W] in [-1, 1] by method, C being 1 or 3.
        prompts: the n prompts; several clips may share one.
        out: the folder; it is made if it is not there.
        full_info: VBench's ``VBench_full_info.json``.
        fps: frames per second of the videos, 0.001 to 1000; VBench's own are written with 8.
        scale: enlargement in whole pixels, for clips smaller than VBench's networks take.

    Returns:
        What was written.

    Raises:
        UserError: no clips, another number of prompts than clips, clips, a speed or a scale that no
            video can have, a prompt that VBench does not have, a damaged ``full_info``, videos of
            something else in the folder, or a folder that cannot be written. All of this but a disk
            that fills up is found before anything is written.
    """
    for method, several in clips.items():
        if len(several) != len(prompts):
            raise UserError(
                f"{method!r} has {len(several)} clips for {len(prompts)} prompts; give one prompt "
                "for each clip"
            )
    if not clips or not prompts:
        raise UserError("there are no clips to export; run 'disca compare' to make some")
    _check_videos(clips, fps, scale)
    suite = None if full_info is None else _load_suite(full_info)
    info = _info(prompts, suite)
    names = _names(prompts, exact=suite is not None)
    folders = {method: out / _VIDEOS / _safe(method) for method in clips}
    _check_folders(folders, names)
    output_folder(out)
    for method, several in clips.items():
        for name, clip in zip(names, several, strict=True):
            write_clip(folders[method] / name, clip, fps=fps, scale=scale)
    _write_json(out / _PROMPTS, dict(zip(names, prompts, strict=True)))
    _write_json(out / _INFO, info)
    methods = [folder.name for folder in folders.values()]
    dimensions = list(dict.fromkeys(name for entry in info for name in entry["dimension"]))
    write_text(out / _SCRIPT, _script(methods, dimensions, full_info))
    (out / _SCRIPT).chmod(0o755)
    return Export(out, methods, len(prompts), _missing(prompts, suite), out / _SCRIPT)


def _load_suite(path: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of VBench's list by prompt."""
    expected = 'a list of {"prompt_en": ..., "dimension": [...]}'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        suite = {str(entry["prompt_en"]): dict(entry) for entry in content}
        if not suite or not all(isinstance(e["dimension"], list) for e in suite.values()):
            raise UserError(f"{path} does not hold VBench's prompts: expected {expected}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} does not hold VBench's prompts: expected {expected}") from error
    return suite


def _info(
    prompts: Sequence[str], suite: Mapping[str, Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Return the entries of full_info.json, one for each different prompt."""
    different = dict.fromkeys(prompts)
    if suite is None:
        return [{"prompt_en": p, "dimension": list(CUSTOM_DIMENSIONS)} for p in different]
    for prompt in different:
        if prompt not in suite:
            raise UserError(
                f"{prompt!r} is none of VBench's {len(suite)} prompts; sample its prompts, or "
                "leave the list away to score other prompts in the mode custom_input"
            )
    return [dict(suite[prompt]) for prompt in different]


def _names(prompts: Sequence[str], *, exact: bool) -> list[str]:
    """Return a file name for each clip: its prompt and the number of those before it."""
    stems = [prompt if exact else _safe(prompt) for prompt in prompts]
    for prompt, stem in zip(prompts, stems, strict=True):
        if "/" in stem or len(stem.encode()) > _LONGEST:
            raise UserError(
                f"the prompt {prompt!r} cannot be a file name, which VBench finds it by"
            )
    seen: Counter[str] = Counter()
    names = []
    for stem in stems:
        names.append(f"{stem}-{seen[stem]}.mp4")
        seen[stem] += 1
    return names


def _check_videos(clips: Mapping[str, Tensor], fps: float, scale: int) -> None:
    """Raise UserError where a clip cannot be written as a video of this speed and scale."""
    slowest, fastest = _SPEEDS
    if not slowest <= fps <= fastest:
        raise UserError(f"fps must be from {slowest:g} to {fastest:g} frames a second, got {fps:g}")
    if scale < 1:
        raise UserError(f"scale must be at least 1, got {scale}")
    for method, several in clips.items():
        for clip in several:
            to_frames(clip)
        side = scale * max(several.shape[-2:])
        if side > _LARGEST_SIDE:
            raise UserError(
                f"clips of {method!r} would be {side} pixels large at scale {scale}; a video takes "
                f"{_LARGEST_SIDE}"
            )


def _check_folders(folders: Mapping[str, Path], names: Sequence[str]) -> None:
    """Raise UserError where VBench would score videos that do not belong to a method."""
    for method, folder in folders.items():
        if list(folders.values()).count(folder) > 1:
            raise UserError(f"{method!r} and another method would both be {folder.name!r}")
        if folder.is_dir() and not set(names) >= {path.name for path in folder.iterdir()}:
            raise UserError(f"{folder} holds other files, which VBench would score too; empty it")


def _safe(text: str) -> str:
    """Return a text that can be a file name and that a shell does not read anything into."""
    name = re.sub(r"[^\w ,.()+=-]", "_", text).strip(" .") or "clip"
    return name.encode()[:_LONGEST].decode(errors="ignore")


def _missing(prompts: Sequence[str], suite: Mapping[str, Mapping[str, Any]] | None) -> int:
    """Return how many videos a full score needs beyond these."""
    have = Counter(prompts)
    need = {
        prompt: 25 if _FLICKERING in entry["dimension"] else 5
        for prompt, entry in (suite or {}).items()
    }
    return sum(max(0, count - have[prompt]) for prompt, count in need.items())


def _script(methods: Sequence[str], dimensions: Sequence[str], full_info: Path | None) -> str:
    """Return a shell script with a command line for each method and dimension."""
    lines = [
        "#!/usr/bin/env bash",
        "# Scores the videos beside this file. Needs: pip install vbench, and a GPU.",
        "set -euo pipefail",
        'cd "$(dirname "${BASH_SOURCE[0]}")"',
    ]
    if full_info is None:
        mode = ["--mode", "custom_input", "--prompt_file", _PROMPTS]
    else:
        mode = ["--mode", "vbench_standard", "--full_json_dir", str(full_info.resolve())]
    for method in methods:
        for dimension in dimensions:
            videos = f"{_VIDEOS}/{method}"
            if dimension == _FLICKERING:
                still = f"still/{method}"
                command = ["vbench", "static_filter", "--videos_path", videos]
                lines.append(shlex.join([*command, "--result_path", still]))
                videos = f"{still}/filtered_videos"
            command = ["vbench", "evaluate", "--videos_path", videos, "--dimension", dimension]
            command += [*mode, "--output_path", f"scores/{method}"]
            lines.append(shlex.join(command))
    return "\n".join(lines) + "\n"


def _write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
