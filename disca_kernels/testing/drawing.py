# SPDX-License-Identifier: Apache-2.0
"""Random operands of the operations on tokens, as slices of larger tensors."""

from typing import NamedTuple

import torch
from torch import Tensor


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype without the package's."""
    return str(dtype).removeprefix("torch.")


class Operands(NamedTuple):
    """What a call of an operation and of its derivatives takes, in the order of its operands.

    Attributes:
        primals: the operands, None for an absent one.
        tangents: a direction for each, None for an absent or constant one.
        cotangents: a gradient for each output.
    """

    primals: tuple[Tensor | None, ...]
    tangents: tuple[Tensor | None, ...]
    cotangents: tuple[Tensor, ...]


class Drawing:
    """Draws normal tensors of [B, N, C] tokens and of what modulates them.

    Args:
        shape: B, N and C.
        seed: of the random numbers, which are the same on every device.
        device: of the tensors.
    """

    def __init__(
        self, shape: tuple[int, int, int], seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        """Start a sequence of random numbers."""
        self._shape, self._device = shape, device
        self._generator = torch.Generator().manual_seed(seed)

    def tokens(self, dtype: torch.dtype) -> Tensor:
        """Return [B, N, C]: some of the rows and channels of a larger tensor."""
        n_batch, n_tokens, n_channels = self._shape
        full = self._normal((n_batch, n_tokens + 3, n_channels + 16), dtype)
        return full[:, 2 : n_tokens + 2, 8 : n_channels + 8]

    def modulations(self, count: int, dtype: torch.dtype, per_token: bool) -> tuple[Tensor, ...]:
        """Return [B, C] chunks of one projection, as in a DiT block, or [B, N, C] slices."""
        if per_token:
            return tuple(self.tokens(dtype) for _ in range(count))
        full = self._normal((self._shape[0], 6 * self._shape[2]), dtype)
        return full.chunk(6, dim=-1)[3 : 3 + count]

    def channels(self, dtype: torch.dtype, offset: float = 0.0) -> Tensor:
        """Return [C], a row of a larger tensor, around `offset`."""
        return self._normal((2, self._shape[2] + 16), dtype, offset)[1, 8 : self._shape[2] + 8]

    def _normal(self, shape: tuple[int, ...], dtype: torch.dtype, offset: float = 0.0) -> Tensor:
        full = torch.randn(shape, generator=self._generator) + offset
        return full.to(self._device, dtype)
