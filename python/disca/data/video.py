# SPDX-License-Identifier: Apache-2.0
"""Clips cut from video files, split by source file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disca.data.decode import DecodedVideo, decode_video, list_videos, shots
from disca.data.prompts import NULL
from disca.data.source import (
    SPLITS,
    ClipBatch,
    check_integer,
    check_options,
    check_share,
    check_split,
)
from disca.errors import UserError
from disca.models.condition import Condition

__all__ = ["VideoClips"]

Paths = str | Path | Sequence[str | Path]


class VideoClips:
    """Clips of `frames` frames cut from any video files FFmpeg can decode; no captions.

    Frames are cropped to the centre square and scaled to `size` by area averaging. No clip crosses
    a shot cut. The split is by **source file**: two clips of one file are never on different sides.
    Files are decoded once and kept in memory at the small size.

    The condition is one ``<null>`` token, so a model that was made for prompts runs unchanged.

    Example::

        source = VideoClips("holiday/", frames=8, size=32, stride=2)
        batch = source.sample(16, torch.Generator().manual_seed(0))
        batch.clips.shape            # [16, 3, 8, 32, 32], values in [-1, 1]

    Args:
        paths: a folder or file or a list of them, split by a hash of each file's bytes, so that
            adding a file moves no other. Excludes `train` and `test`.
        train: folders or files of the train split.
        test: folders or files of the test split; without it there is no test split.
        frames: frames of a clip.
        size: side of the square frames in pixels.
        stride: source frames from one clip frame to the next.
        channels: 3 for RGB, 1 for luma.
        cut_threshold: mean absolute difference of neighbouring frames, as a share of full scale,
            above which a shot ends; None ignores cuts.
        test_fraction: expected share of the files in the test split of `paths`; at least one file
            lands on either side.

    Raises:
        UserError: options that contradict each other or are out of range; missing, unreadable,
            broken or too short files; fewer than two different files to split; the same content on
            both sides.
    """

    def __init__(
        self,
        paths: Paths | None = None,
        *,
        train: Paths | None = None,
        test: Paths | None = None,
        frames: int = 8,
        size: int = 32,
        stride: int = 1,
        channels: int = 3,
        cut_threshold: float | None = 0.13,
        test_fraction: float = 0.25,
    ) -> None:
        self.frames = check_integer("frames", frames, 1)
        self.size = check_integer("size", size, 1)
        self.stride = check_integer("stride", stride, 1)
        if channels not in (1, 3):
            raise UserError(f"channels must be 3 (RGB) or 1 (luma), got {channels!r}")
        self.channels = channels
        if cut_threshold is not None:
            check_share("cut_threshold", cut_threshold)
        self.cut_threshold = cut_threshold
        check_share("test_fraction", test_fraction)
        if (paths is None) == (train is None) or (paths is not None and test is not None):
            raise UserError("give either 'paths', or 'train' and perhaps 'test'")
        if paths is not None:
            split = _hash_split(self._decode(paths), test_fraction)
        else:
            split = (self._decode(train or ()), self._decode(test or ()))
            if not split[0]:
                raise UserError("'train' names no video file")
        self._refuse_leaks(*split)
        #: The decoded files of each split, with path, digest and frame rate.
        self.files: dict[str, tuple[DecodedVideo, ...]] = dict(zip(SPLITS, split, strict=True))
        self._pool = {name: self._clips(files) for name, files in self.files.items()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VideoClips:
        """Build from a mapping of the constructor's options; unknown ones raise UserError."""
        check_options("data of kind 'video'", cls, config)
        return cls(**config)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(C, F, H, W)`` of one clip."""
        return self.channels, self.frames, self.size, self.size

    @property
    def text_dim(self) -> int:
        """Width of a text token: the vocabulary is ``<null>``."""
        return 1

    @property
    def text_tokens(self) -> int:
        """Number of text tokens."""
        return 1

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text."""
        return 1

    def clips_in(self, split: str) -> int:
        """Number of different clips in `split`, overlapping ones counted."""
        return len(self._pool[check_split(split)][1])

    def sample(self, n: int, generator: torch.Generator, *, split: str = "train") -> ClipBatch:
        """Draw `n` clips uniformly among all start frames of `split`, with replacement.

        Args:
            n: number of clips.
            generator: CPU generator; the batch is a function of its state and nothing else.
            split: "train" or "test".

        Raises:
            UserError: unknown split, one without files, or negative `n`.
        """
        check_integer("number of clips", n, 0)
        frames, starts = self._pool[check_split(split)]
        if len(starts) == 0:
            raise UserError(f"there are no {split} files: the source was built without {split!r}")
        start = starts[torch.randint(len(starts), (n,), generator=generator)]
        index = start[:, None] + torch.arange(self.frames) * self.stride  # [B, F]
        clips = frames[index].transpose(1, 2).float() / 127.5 - 1.0  # [B, C, F, S, S]
        return ClipBatch(clips, self.null(n))

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode empty prompts; there are no captions, so anything else raises UserError."""
        for prompt in prompts:
            if prompt.strip() not in ("", NULL):
                raise UserError(f'prompt {prompt!r}: video clips have no captions, use ""')
        return self.null(len(prompts))

    def null(self, n: int) -> Condition:
        """`n` empty prompts: one token ``<null>`` each."""
        return Condition(
            text=torch.ones(n, 1, 1),
            text_lengths=torch.ones(n, dtype=torch.int64),
            pooled=torch.ones(n, 1),
        )

    def _decode(self, paths: Paths) -> tuple[DecodedVideo, ...]:
        if isinstance(paths, str | Path):
            paths = [paths]
        files = [file for path in paths for file in list_videos(path)]
        return tuple(decode_video(file, self.size, self.channels) for file in files)

    def _clips(self, files: Sequence[DecodedVideo]) -> tuple[Tensor, Tensor]:
        """All frames ``[T, C, S, S]`` of the files and the start frames ``[clips]`` within them."""
        span = (self.frames - 1) * self.stride + 1
        starts, short, offset = [], [], 0
        for file in files:
            ranges = shots(file.frames, self.cut_threshold)
            longest = max(stop - first for first, stop in ranges)
            if longest < span:
                short.append(f"{str(file.path)!r} ({longest})")
            starts += [
                torch.arange(first, stop - span + 1) + offset
                for first, stop in ranges
                if stop - first >= span
            ]
            offset += len(file.frames)
        if short:
            raise UserError(
                f"too short for clips of {self.frames} frames at stride {self.stride}, which need "
                f"{span} frames in one shot (longest shot in brackets): {', '.join(short)}"
            )
        if not files:
            nothing = torch.empty(0, self.channels, self.size, self.size, dtype=torch.uint8)
            return nothing, torch.empty(0, dtype=torch.int64)
        return torch.cat([file.frames for file in files]), torch.cat(starts)

    @staticmethod
    def _refuse_leaks(train: Sequence[DecodedVideo], test: Sequence[DecodedVideo]) -> None:
        known = {file.sha256: file.path for file in train}
        for file in test:
            if file.sha256 in known:
                raise UserError(
                    f"{str(known[file.sha256])!r} (train) and {str(file.path)!r} (test) have the "
                    "same content; a file may be on one side only"
                )


def _hash_split(
    files: Sequence[DecodedVideo], test_fraction: float
) -> tuple[tuple[DecodedVideo, ...], tuple[DecodedVideo, ...]]:
    """Split by a threshold on each file's digest, so that no split depends on the other files.

    Only when a side would stay empty does the file nearest to the threshold change sides.
    """
    # Copies of one file share a digest, hence a side.
    position = {file.sha256: int(file.sha256[:13], 16) / 16**13 for file in files}
    if len(position) < 2:
        raise UserError(
            f"a split by file needs at least 2 different video files, found {len(position)}; "
            "add files, or give 'train' (and 'test') explicitly"
        )
    ranked = sorted(position, key=lambda digest: position[digest])
    count = sum(position[digest] < test_fraction for digest in ranked)
    test_digests = set(ranked[: min(max(count, 1), len(ranked) - 1)])
    train = tuple(file for file in files if file.sha256 not in test_digests)
    test = tuple(file for file in files if file.sha256 in test_digests)
    return train, test
