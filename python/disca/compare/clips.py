# SPDX-License-Identifier: Apache-2.0
"""The clips that a comparison keeps for the report and for VBench."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from disca.data.io import atomic_path
from disca.errors import UserError

__all__ = ["CLIPS_FILE", "REAL_KEY", "load_clips", "read_clips", "save_clips", "write_clips"]

CLIPS_FILE = "clips.safetensors"
REAL_KEY = "real"
"""Key of the real held-out clips."""


def save_clips(folder: Path, clips: Mapping[str, Tensor]) -> Path:
    """Write clips [n, C, F, H, W] in [-1, 1] by the key of their row, as bytes, atomically."""
    packed = {
        key: (clip.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)).contiguous()
        for key, clip in clips.items()
    }
    path = folder / CLIPS_FILE
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(packed))
    return path


def write_clips(path: Path, clips: Tensor) -> None:
    """Write the clips of one row as they are, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(save({"clips": clips.contiguous()}))


def read_clips(path: Path) -> Tensor | None:
    """Return what :func:`write_clips` wrote, or None if there is none.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            clips: Tensor = file.get_tensor("clips")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged; delete it to make it anew") from error
    return clips


def load_clips(folder: Path) -> dict[str, Tensor]:
    """Return the clips by row, float32 [n, C, F, H, W] in [-1, 1].

    Raises:
        UserError: the folder has none, or the file is damaged.
    """
    path = folder / CLIPS_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {CLIPS_FILE}; run 'disca compare --out {folder}' to make it"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key).float() / 127.5 - 1 for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
