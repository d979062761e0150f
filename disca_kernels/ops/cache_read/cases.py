# SPDX-License-Identifier: Apache-2.0
"""Inputs of cache_read and what they cost on paper, for its tests and its benchmark."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu


class Operands(NamedTuple):
    """What a call of cache_read and of its derivatives takes, in the order of its operands."""

    primals: tuple[Tensor | None, ...]
    tangents: tuple[Tensor | None, ...]
    cotangents: tuple[Tensor, ...]


@dataclass(frozen=True)
class CacheReadCase:
    """One shape of cache_read.

    Attributes:
        batch: B.
        n_tokens: N.
        n_channels: C.
        n_outputs: O, the rows of the weight; 0 means C.
        dtype: of every operand.
        has_bias: whether there is a bias.
        moving: operands that have a tangent: the first letters of current, cache, weight and bias
            ("c" for current, "h" for cache, its history). In a predictor's training only
            "c" moves.
    """

    batch: int
    n_tokens: int
    n_channels: int
    n_outputs: int = 0
    dtype: torch.dtype = torch.float32
    has_bias: bool = True
    moving: str = "chwb"

    def __str__(self) -> str:
        """Name the case in test and benchmark reports."""
        dtype = str(self.dtype).removeprefix("torch.")
        name = f"b{self.batch}n{self.n_tokens}c{self.n_channels}o{self._width}-{dtype}"
        name += "" if self.has_bias else "-no_bias"
        return name if self.moving == "chwb" else f"{name}-moving_{self.moving}"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword options of the public function: there are none."""
        return {}

    @property
    def _width(self) -> int:
        return self.n_outputs or self.n_channels

    def operands(self, seed: int = 0, device: str | torch.device = "cpu") -> Operands:
        """Draw normal operands, each a slice of a larger tensor.

        Tokens are those of one stream in the middle of a joint sequence; the weight is scaled to
        give the argument of SiLU a deviation of about 1.
        """
        generator = torch.Generator().manual_seed(seed)
        rows, width = 2 * self.n_channels, self._width

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        def tokens(channels: int) -> Tensor:
            full = normal(self.batch, self.n_tokens + 3, channels + 16)
            return full[:, 2 : self.n_tokens + 2, 8 : channels + 8]

        def weight() -> Tensor:
            full = normal(width + 1, rows + 16) / math.sqrt(rows)
            return full[1:, 8 : rows + 8]

        def one_of_each() -> tuple[Tensor | None, ...]:
            first, second, matrix = tokens(self.n_channels), tokens(self.n_channels), weight()
            return first, second, matrix, normal(3 * width)[width:][:width]

        primals, tangents = one_of_each(), one_of_each()
        present = [True, True, True, self.has_bias]
        return Operands(
            tuple(x if there else None for x, there in zip(primals, present, strict=True)),
            tuple(
                t if there and letter in self.moving else None
                for t, there, letter in zip(tangents, present, "chwb", strict=True)
            ),
            (tokens(width),),
        )

    def flops(self, mode: str) -> int:
        """Count floating-point operations of the matrix products of "fwd", "bwd" or "jvp".

        Gradients are those of the operands that move.
        """
        half = 2 * self.batch * self.n_tokens * self.n_channels * self._width
        moving = ("c" in self.moving) + ("h" in self.moving) + 2 * ("w" in self.moving)
        return half * {"fwd": 2, "jvp": 2 + moving, "bwd": moving}[mode]

    def bytes_moved(self, mode: str) -> int:
        """Count the bytes that `mode` must read and write once."""
        n_rows, width = self.batch * self.n_tokens, self._width
        one = {
            "c": n_rows * self.n_channels,
            "h": n_rows * self.n_channels,
            "w": 2 * width * self.n_channels,
            "b": width * self.has_bias,
        }
        primals, y = sum(one.values()), n_rows * width
        moving = sum(one[letter] for letter in self.moving)
        # dy and z; the weight's halves for the gradients of tokens, and tokens for the weight's.
        read = 2 * y + sum(one["w"] // 2 for letter in "ch" if letter in self.moving)
        read += (one["c"] + one["h"]) * ("w" in self.moving)
        elements = {
            "fwd": primals + y,
            "jvp": primals + moving + 2 * y,
            "bwd": read + moving,
        }[mode]
        return elements * self.dtype.itemsize


def cache_read_in_dtype(
    current: Tensor, cache: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Compute cache_read as a model writes it, which makes a tensor of 2C channels."""
    return silu(linear(torch.cat((current, cache), dim=-1), weight, bias))
