# SPDX-License-Identifier: Apache-2.0
"""Inputs of swiglu and what they cost on paper, for its tests and its benchmark."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from disca_kernels.testing.drawing import Drawing, Operands

FLOPS_PER_ELEMENT = {"fwd": 7, "bwd": 14, "jvp": 16}
"""Operations on each element of y in each mode, a power or a division counted as one."""


@dataclass(frozen=True)
class SwigluCase:
    """One shape of SwiGLU.

    Attributes:
        batch: B.
        n_tokens: N.
        n_columns: M, the width of y and half of that of x.
        dtype: of x.
        gate_first: which half the gate is.
        biased: whether there is a bias.
        wide: whether the bias is float32 whatever the dtype of x.
    """

    batch: int
    n_tokens: int
    n_columns: int
    dtype: torch.dtype = torch.float32
    gate_first: bool = True
    biased: bool = True
    wide: bool = False

    def __str__(self) -> str:
        """Name the case in test and benchmark reports."""
        name = f"b{self.batch}n{self.n_tokens}m{self.n_columns}"
        name += f"-{str(self.dtype).removeprefix('torch.')}" + "-wide" * self.wide
        return name + "-up_first" * (not self.gate_first) + "-unbiased" * (not self.biased)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword options of the call."""
        return {"gate_first": self.gate_first}

    def operands(self, seed: int = 0, device: str | torch.device = "cpu") -> Operands:
        """Draw normal operands, each a slice of a larger tensor."""
        tokens = (self.batch, self.n_tokens)
        packed = Drawing((*tokens, 2 * self.n_columns), seed, device)
        halves = Drawing((*tokens, self.n_columns), seed + 1, device)

        def pair() -> tuple[Tensor, Tensor | None]:
            x = packed.tokens(self.dtype)
            wide = torch.float32 if self.wide else self.dtype
            return x, packed.channels(wide) if self.biased else None

        return Operands(pair(), pair(), (halves.tokens(self.dtype),))

    def flops(self, mode: str) -> int:
        """Count floating-point operations of "fwd", "bwd" or "jvp"."""
        return FLOPS_PER_ELEMENT[mode] * self.batch * self.n_tokens * self.n_columns

    def bytes_moved(self, mode: str) -> int:
        """Count the bytes that `mode` must read and write once."""
        rows, biases = {
            "fwd": (3, 1),  # gate, up, y; bias
            "bwd": (5, 2),  # gate, up, dy and two gradients; bias, dbias
            "jvp": (6, 2),  # gate, up, y and their tangents; bias and its tangent
        }[mode]
        elements = rows * self.batch * self.n_tokens * self.n_columns
        wide = 4 if self.wide else self.dtype.itemsize
        return elements * self.dtype.itemsize + biases * self.biased * 2 * self.n_columns * wide


def swiglu_in_dtype(x: Tensor, bias: Tensor | None = None, *, gate_first: bool = True) -> Tensor:
    """Compute swiglu as a feed-forward layer writes it: three roundings in bfloat16, not one."""
    z = x if bias is None else (x + bias).to(x.dtype)
    first, second = z.chunk(2, dim=-1)
    return F.silu(first) * second if gate_first else F.silu(second) * first
