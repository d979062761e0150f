# SPDX-License-Identifier: Apache-2.0
"""What a video DiT carries from its embedders through its blocks to its head."""

from dataclasses import dataclass

import torch
from torch import Tensor

from disca.models.rope import Rope

__all__ = ["State"]


@dataclass
class State:
    """Tokens and everything the blocks read beside them.

    The tokens are one tensor, or the two streams of a double-stream block apart, so that neither
    kind of block joins or cuts what the other made.

    Attributes:
        parts: the tokens: video, then text, then text padding, in one tensor [B, n_video + L, C] or
            in two, [B, n_video, C] and [B, L, C].
        n_video: number of video tokens, f * h * w.
        vec: modulation vector [B, C] made of times, guidance and pooled prompt, after its SiLU.
        rope: cosine and sine of the video tokens' rotation [n_video, head_dim / 2].
        kv_lengths: number of keys that attention may read [B], int64: video tokens plus real text
            tokens.
        grid: token grid (f, h, w).
    """

    parts: tuple[Tensor, ...]
    n_video: int
    vec: Tensor
    rope: Rope
    kv_lengths: Tensor
    grid: tuple[int, int, int]

    def with_tokens(self, tokens: Tensor) -> "State":
        """Return a state with other tokens [B, n_video + L, C] that shares the rest."""
        return State((tokens,), self.n_video, self.vec, self.rope, self.kv_lengths, self.grid)

    def with_streams(self, video: Tensor, text: Tensor) -> "State":
        """Return a state with other video tokens [B, n_video, C] and text tokens [B, L, C]."""
        return State((video, text), self.n_video, self.vec, self.rope, self.kv_lengths, self.grid)

    @property
    def tokens(self) -> Tensor:
        """All tokens [B, n_video + L, C]; joined by a copy if the streams are apart."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=1)

    @property
    def streams(self) -> tuple[Tensor, Tensor]:
        """Video and text tokens, without a copy."""
        if len(self.parts) == 1:
            (tokens,) = self.parts
            return tokens[:, : self.n_video], tokens[:, self.n_video :]
        video, text = self.parts
        return video, text

    @property
    def video(self) -> Tensor:
        """The video tokens [B, n_video, C], without a copy."""
        return self.streams[0]

    @property
    def text(self) -> Tensor:
        """The text tokens with their padding [B, L, C], without a copy."""
        return self.streams[1]

    @property
    def shape(self) -> torch.Size:
        """Shape of the joined tokens, [B, n_video + L, C]."""
        first = self.parts[0].shape
        return torch.Size((first[0], sum(part.shape[1] for part in self.parts), first[2]))
