# SPDX-License-Identifier: Apache-2.0
"""Moving digits: clips made from real handwritten digits that drift over a torus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from disca.data.prompts import DIAGONALS, DIRECTIONS, SPEEDS, PromptEncoder
from disca.data.source import ClipBatch, check_integer, check_options, check_split
from disca.errors import UserError
from disca.models.condition import Condition

__all__ = ["GLYPH", "STARTS", "MovingDigits"]

#: Side of a handwritten digit in pixels.
GLYPH = 8
STARTS = ("centre", "grid", "free")
_TEST_FRACTION = 0.2
_SPLIT_SEED = 0


class MovingDigits:
    """Handwritten digits of scikit-learn (1,797 real 8x8 images) that move over a wrapping canvas.

    The glyph's top left corner in frame f is ``(start + f * speed * direction) mod size``, so
    frame f is frame 0 rolled by ``f * speed * direction``, and everything is exact to the pixel.
    Prompts read "digit direction speed", for example "7 left fast"; with ``digits=2`` two glyphs
    side by side move together ("37 left fast"). The *images* are split 80 : 20 into train and test,
    stratified by digit, with a fixed seed: no handwriting of the test split is ever trained on.

    Example::

        source = MovingDigits(frames=8, size=16, starts="free")
        batch = source.sample(64, torch.Generator().manual_seed(0))
        batch.clips.shape            # [64, 1, 8, 16, 16], values in [-1, 1]
        condition = source.encode(["7 left fast", ""])

    Args:
        frames: frames of a clip, at least 2 (one frame shows no direction).
        size: side of the canvas in pixels, at least 8, or 20 with two digits (so that the gap
            across the border tells the left digit from the right one).
        starts: "centre" starts every clip in the centre, "grid" uniformly on multiples of
            `grid_step` in both axes, "free" uniformly on all positions.
        grid_step: step of the "grid" starts in pixels; must divide `size`.
        digits: digits in a clip, 1 or 2.
        diagonals: adds the directions up-left, up-right, down-left and down-right.

    Raises:
        UserError: an option has the wrong type or is out of range.
    """

    def __init__(
        self,
        frames: int = 8,
        size: int = 16,
        starts: str = "grid",
        grid_step: int = 4,
        digits: int = 1,
        diagonals: bool = False,
    ) -> None:
        self.frames = check_integer("frames", frames, 2)
        if isinstance(digits, bool) or digits not in (1, 2):
            raise UserError(f"digits must be 1 or 2, got {digits!r}")
        self.size = check_integer("size", size, GLYPH if digits == 1 else 2 * GLYPH + 4)
        if starts not in STARTS:
            raise UserError(f"starts must be one of {', '.join(STARTS)}, got {starts!r}")
        self.grid_step = check_integer("grid_step", grid_step, 1)
        if starts == "grid" and size % grid_step:
            raise UserError(f"grid_step must divide the size {size}, got {grid_step}")
        if not isinstance(diagonals, bool):
            raise UserError(f"diagonals must be true or false, got {diagonals!r}")
        self.starts = starts
        self.digits = digits
        self.diagonals = diagonals
        self.prompts = PromptEncoder(digits, diagonals)
        vectors = [(DIRECTIONS | DIAGONALS)[word] for word in self.prompts.directions]
        self._directions = torch.tensor(vectors)  # [directions, 2]
        self._speeds = torch.tensor(list(SPEEDS.values()))  # [speeds]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MovingDigits:
        """Build from a mapping of the constructor's options; unknown ones raise UserError."""
        check_options("data of kind 'digits'", cls, config)
        return cls(**config)

    @property
    def config(self) -> dict[str, Any]:
        """The options that rebuild this source through `disca.data.build_source`."""
        names = ("frames", "size", "starts", "grid_step", "digits", "diagonals")
        return {"kind": "digits", **{name: getattr(self, name) for name in names}}

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(C, F, H, W)`` of one clip."""
        return 1, self.frames, self.size, self.size

    @property
    def text_dim(self) -> int:
        """Width of a text token: the size of the vocabulary."""
        return len(self.prompts.vocabulary)

    @property
    def text_tokens(self) -> int:
        """Padded number of text tokens."""
        return self.prompts.tokens

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text: the size of the vocabulary."""
        return len(self.prompts.vocabulary)

    @property
    def label_sizes(self) -> tuple[int, int, int]:
        """Number of classes of digit, direction and speed."""
        return self.prompts.label_sizes

    def all_prompts(self) -> list[str]:
        """Every prompt of the vocabulary, digits slowest and speeds fastest."""
        return self.prompts.all_prompts()

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts such as "7 left fast"; see `PromptEncoder.encode`."""
        return self.prompts.encode(prompts)

    def null(self, n: int) -> Condition:
        """`n` empty prompts."""
        return self.prompts.null(n)

    def labels(self, prompts: Sequence[str]) -> Tensor:
        """int64 labels ``[B, 3]`` of prompts; see `PromptEncoder.labels`."""
        return self.prompts.labels(prompts)

    def sample(self, n: int, generator: torch.Generator, *, split: str = "train") -> ClipBatch:
        """Draw `n` clips with uniform digits, directions, speeds and handwritings.

        Args:
            n: number of clips.
            generator: CPU generator; the batch is a function of its state and nothing else.
            split: "train" or "test", the handwritings to draw from.

        Raises:
            UserError: unknown split or negative `n`.
        """
        check_integer("number of clips", n, 0)
        columns = [torch.randint(k, (n,), generator=generator) for k in self.label_sizes]
        labels = torch.stack(columns, 1)
        clips = self.render(labels, generator, split=split)
        return ClipBatch(clips, self.prompts.encode_labels(labels), labels)

    def render(self, labels: Tensor, generator: torch.Generator, *, split: str = "train") -> Tensor:
        """Draw one clip for each row of int64 `labels` ``[B, 3]``: ``[B, 1, F, S, S]``.

        Handwriting and start position come from `generator`.
        """
        glyphs, first, count = _handwritings(check_split(split))
        n, size = len(labels), self.size
        if n == 0:
            return torch.empty(0, *self.shape)
        number, direction, speed = labels.unbind(1)
        canvas = torch.full((n, size, size), -1.0)
        for place in range(self.digits):
            digit = number // 10 ** (self.digits - 1 - place) % 10
            pick = (torch.rand(n, generator=generator) * count[digit]).long()
            columns = slice(place * GLYPH, (place + 1) * GLYPH)
            canvas[:, :GLYPH, columns] = glyphs[first[digit] + pick.clamp(max=count[digit] - 1)]
        step = self._directions[direction] * self._speeds[speed, None]  # [B, 2]
        frame = torch.arange(self.frames)
        corner = self._start(n, generator)[:, None] + frame[:, None] * step[:, None]  # [B, F, 2]
        rows = (torch.arange(size) - corner[..., :1]) % size  # [B, F, S]
        columns_at = (torch.arange(size) - corner[..., 1:]) % size  # [B, F, S]
        index = rows[..., :, None] * size + columns_at[..., None, :]  # [B, F, S, S]
        clips = canvas.view(n, -1).gather(1, index.view(n, -1))
        return clips.view(n, *self.shape)

    def _start(self, n: int, generator: torch.Generator) -> Tensor:
        """Top left corners ``[B, 2]`` of frame 0."""
        if self.starts == "centre":
            height, width = self.size - GLYPH, self.size - GLYPH * self.digits
            return torch.tensor([height // 2, width // 2]).expand(n, 2)
        step = self.grid_step if self.starts == "grid" else 1
        return torch.randint(self.size // step, (n, 2), generator=generator) * step


@lru_cache(maxsize=2)
def _handwritings(split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``[N, 8, 8]`` of a split sorted by digit, and each digit's first index and count."""
    # scikit-learn takes a second to import, and sources are also built only to encode prompts.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    parts = train_test_split(
        np.arange(len(data.target)),
        test_size=_TEST_FRACTION,
        random_state=_SPLIT_SEED,
        stratify=data.target,
    )
    chosen = np.sort(parts[0] if split == "train" else parts[1])
    chosen = chosen[np.argsort(data.target[chosen], kind="stable")]
    images = torch.from_numpy(data.images[chosen]).float() / 8.0 - 1.0
    count = torch.from_numpy(np.bincount(data.target[chosen], minlength=10))
    return images, count.cumsum(0) - count, count
