# SPDX-License-Identifier: Apache-2.0
"""Inputs of adaln_modulate and what they cost on paper, for its tests and its benchmark."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FLOPS_PER_ELEMENT = {"fwd": 7, "bwd": 15, "jvp": 17}
"""Multiplications and additions of each element of x in each mode, rounded to the next integer."""


class Operands(NamedTuple):
    """What a call of adaln_modulate and of its derivatives takes."""

    primals: tuple[Tensor, Tensor, Tensor]
    tangents: tuple[Tensor, Tensor, Tensor]
    cotangent: Tensor


@dataclass(frozen=True)
class AdalnModulateCase:
    """One shape of adaptive layer-norm modulation.

    Attributes:
        batch: B.
        n_tokens: N.
        n_channels: C.
        dtype: of x.
        modulation_dtype: of shift and scale; None means that of x.
        per_token: whether every token has a modulation of its own.
        offset: added to x, so that the mean of a row is not small beside its deviation.
    """

    batch: int
    n_tokens: int
    n_channels: int
    dtype: torch.dtype = torch.float32
    modulation_dtype: torch.dtype | None = None
    per_token: bool = False
    offset: float = 0.5

    def __str__(self) -> str:
        """Name the case in test and benchmark reports."""
        name = f"b{self.batch}n{self.n_tokens}c{self.n_channels}-{_name(self.dtype)}"
        if self.modulation_dtype is not None:
            name += f"-modulation_{_name(self.modulation_dtype)}"
        return name + "-per_token" * self.per_token

    def operands(self, seed: int = 0, device: str | torch.device = "cpu") -> Operands:
        """Draw normal operands, each a slice of a larger tensor.

        Per-sample shift and scale are two of six chunks of one projection, as in a DiT block.
        """
        generator = torch.Generator().manual_seed(seed)
        wide = self.modulation_dtype or self.dtype

        def tokens(dtype: torch.dtype) -> Tensor:
            shape = (self.batch, self.n_tokens + 3, self.n_channels + 16)
            full = torch.randn(shape, generator=generator).to(device, dtype)
            return full[:, 2 : self.n_tokens + 2, 8 : self.n_channels + 8]

        def modulation() -> tuple[Tensor, Tensor]:
            if self.per_token:
                return tokens(wide), tokens(wide)
            full = torch.randn((self.batch, 6 * self.n_channels), generator=generator)
            chunks = full.to(device, wide).chunk(6, dim=-1)
            return chunks[3], chunks[4]

        x = tokens(self.dtype) + self.offset
        primals = (x, *modulation())
        return Operands(primals, (tokens(self.dtype), *modulation()), tokens(self.dtype))

    def flops(self, mode: str) -> int:
        """Count floating-point operations of "fwd", "bwd" or "jvp"."""
        return FLOPS_PER_ELEMENT[mode] * self.batch * self.n_tokens * self.n_channels

    def bytes_moved(self, mode: str) -> int:
        """Count the bytes that `mode` must read and write once."""
        rows = {
            "fwd": 2,  # x, y
            "bwd": 3,  # x, dy, dx
            "jvp": 4,  # x, x_dot, y, y_dot
        }[mode]
        modulation_rows = {
            "fwd": 2,  # shift, scale
            "bwd": 3,  # scale, dshift, dscale
            "jvp": 4,  # shift, scale and their tangents
        }[mode]
        n_rows = self.batch * self.n_tokens
        n_modulations = n_rows if self.per_token else self.batch
        wide = (self.modulation_dtype or self.dtype).itemsize
        per_channel = rows * n_rows * self.dtype.itemsize + modulation_rows * n_modulations * wide
        return per_channel * self.n_channels


def adaln_modulate_in_dtype(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute adaln_modulate as a DiT block writes it: three roundings in bfloat16, not one."""
    if scale.ndim == 2:
        shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
    normal = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return (normal * (1 + scale) + shift).to(x.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
