# SPDX-License-Identifier: Apache-2.0
"""What a video DiT carries from its embedders through its blocks to its head."""

from dataclasses import dataclass

from torch import Tensor

from disca.models.rope import Rope

__all__ = ["State"]


@dataclass
class State:
    """Tokens and everything the blocks read beside them.

    Attributes:
        tokens: video tokens, then text tokens, then text padding [B, n_video + L, C].
        n_video: number of video tokens, f * h * w.
        vec: modulation vector [B, C] made of times, guidance and pooled prompt.
        rope: cosine and sine tables [n_video + L, head_dim / 2], neutral for text.
        kv_lengths: number of keys that attention may read [B], int64: video tokens plus real text
            tokens.
        grid: token grid (f, h, w).
    """

    tokens: Tensor
    n_video: int
    vec: Tensor
    rope: Rope
    kv_lengths: Tensor
    grid: tuple[int, int, int]

    def with_tokens(self, tokens: Tensor) -> "State":
        """Return a state with other tokens that shares the rest."""
        return State(tokens, self.n_video, self.vec, self.rope, self.kv_lengths, self.grid)

    @property
    def video(self) -> Tensor:
        """The video tokens [B, n_video, C], a view."""
        return self.tokens[:, : self.n_video]

    @property
    def text(self) -> Tensor:
        """The text tokens with their padding [B, L, C], a view."""
        return self.tokens[:, self.n_video :]
