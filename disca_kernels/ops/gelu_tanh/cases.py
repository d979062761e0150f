# SPDX-License-Identifier: Apache-2.0
"""Inputs of gelu_tanh and what they cost on paper, for its tests and its benchmark."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from disca_kernels.testing.drawing import Drawing, Operands

FLOPS_PER_ELEMENT = {"fwd": 12, "bwd": 18, "jvp": 20}
"""Operations on each element of x in each mode, a power or a division counted as one."""


@dataclass(frozen=True)
class GeluTanhCase:
    """One shape of GELU with bias and prefix.

    Attributes:
        batch: B.
        n_tokens: N.
        n_columns: M.
        dtype: of x.
        heads: H of the prefix; 0 for a call without one.
        head_dim: D of the prefix.
        joined: whether the prefix comes as [B, N, P].
        biased: whether there is a bias.
        wide: whether the bias is float32 whatever the dtype of x.
        spread: standard deviation of x.
    """

    batch: int
    n_tokens: int
    n_columns: int
    dtype: torch.dtype = torch.float32
    heads: int = 0
    head_dim: int = 0
    joined: bool = False
    biased: bool = True
    wide: bool = False
    spread: float = 1.5

    def __str__(self) -> str:
        """Name the case in test and benchmark reports."""
        name = f"b{self.batch}n{self.n_tokens}m{self.n_columns}"
        if self.heads:
            name += f"p{self.heads}x{self.head_dim}" + "joined" * self.joined
        name += f"-{str(self.dtype).removeprefix('torch.')}" + "-wide" * self.wide
        return name + "-unbiased" * (not self.biased)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword options of the call: there are none."""
        return {}

    @property
    def _width(self) -> int:
        return self.heads * self.head_dim

    def operands(self, seed: int = 0, device: str | torch.device = "cpu") -> Operands:
        """Draw normal operands, each a slice of a larger tensor."""
        tokens = (self.batch, self.n_tokens)
        drawing = Drawing((*tokens, self.n_columns), seed, device)
        front = Drawing((self.batch * self.heads, self.n_tokens, self.head_dim), seed + 1, device)
        whole = Drawing((*tokens, self._width + self.n_columns), seed + 2, device)

        def prefix() -> Tensor | None:
            if not self.heads:
                return None
            shape = (self.batch, self.heads, self.n_tokens, self.head_dim)
            drawn = front.tokens(self.dtype).reshape(shape)
            return drawn.transpose(1, 2).flatten(2) if self.joined else drawn

        def bias() -> Tensor | None:
            wide = torch.float32 if self.wide else self.dtype
            return drawing.channels(wide) if self.biased else None

        primals = (self.spread * drawing.tokens(self.dtype), bias(), prefix())
        tangents = (drawing.tokens(self.dtype), bias(), prefix())
        return Operands(primals, tangents, (whole.tokens(self.dtype),))

    def flops(self, mode: str) -> int:
        """Count floating-point operations of "fwd", "bwd" or "jvp"."""
        return FLOPS_PER_ELEMENT[mode] * self.batch * self.n_tokens * self.n_columns

    def bytes_moved(self, mode: str) -> int:
        """Count the bytes that `mode` must read and write once."""
        rows, prefixes, biases = {
            "fwd": (2, 2, 1),  # x and prefix in and out, bias
            "bwd": (3, 0, 2),  # x, dy, dx; the prefix's gradient is a part of dy; bias, dbias
            "jvp": (4, 4, 2),
        }[mode]
        n_rows = self.batch * self.n_tokens
        elements = n_rows * (rows * self.n_columns + prefixes * self._width)
        wide = 4 if self.wide else self.dtype.itemsize
        return elements * self.dtype.itemsize + biases * self.biased * self.n_columns * wide


def gelu_tanh_in_dtype(
    x: Tensor, bias: Tensor | None = None, prefix: Tensor | None = None
) -> Tensor:
    """Compute gelu_tanh as a DiT block writes it: the sum with the bias is rounded too."""
    y = F.gelu(x if bias is None else (x + bias).to(x.dtype), approximate="tanh")
    if prefix is None:
        return y
    return torch.cat((prefix.transpose(1, 2).flatten(2) if prefix.ndim == 4 else prefix, y), -1)
