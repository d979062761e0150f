# SPDX-License-Identifier: Apache-2.0
"""Inputs of gated_residual and what they cost on paper, for its tests and its benchmark."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from disca_kernels.testing.drawing import Drawing, Operands, name_of

# Multiplications and additions for each element of x.
_FLOPS = {"fwd": 2, "bwd": 3, "jvp": 6}


@dataclass(frozen=True)
class GatedResidualCase:
    """One shape of the gated residual.

    Attributes:
        batch: B.
        n_tokens: N.
        n_channels: C.
        dtype: of x and y.
        gate_dtype: of the gate; None means that of x.
        per_token: whether every token has a gate of its own.
        options: what the public function takes besides the operands: nothing.
    """

    batch: int
    n_tokens: int
    n_channels: int
    dtype: torch.dtype = torch.float32
    gate_dtype: torch.dtype | None = None
    per_token: bool = False
    options: dict[str, Any] = field(default_factory=dict, init=False, hash=False)

    def __str__(self) -> str:
        """Name the case in test and benchmark reports."""
        name = f"b{self.batch}n{self.n_tokens}c{self.n_channels}-{name_of(self.dtype)}"
        if self.gate_dtype is not None:
            name += f"-gate_{name_of(self.gate_dtype)}"
        return name + "-per_token" * self.per_token

    def operands(self, seed: int = 0, device: str | torch.device = "cpu") -> Operands:
        """Draw normal operands, each a slice of a larger tensor."""
        draw = Drawing((self.batch, self.n_tokens, self.n_channels), seed, device)

        def three() -> tuple[Tensor, Tensor, Tensor]:
            (gate,) = draw.modulations(1, self.gate_dtype or self.dtype, self.per_token)
            return draw.tokens(self.dtype), draw.tokens(self.dtype), gate

        return Operands(three(), three(), (draw.tokens(self.dtype),))

    def flops(self, mode: str) -> int:
        """Count floating-point operations of "fwd", "bwd" or "jvp"."""
        return _FLOPS[mode] * self.batch * self.n_tokens * self.n_channels

    def bytes_moved(self, mode: str) -> int:
        """Count the bytes that `mode` must read and write once; dx is dout and moves nothing."""
        rows = {
            "fwd": 3,  # x, y, out
            "bwd": 3,  # dout, y, dy
            "jvp": 6,  # x, y, out and their tangents
        }[mode]
        gates = 1 if mode == "fwd" else 2  # beside it its gradient or tangent
        n_rows = self.batch * self.n_tokens
        n_gates = gates * (n_rows if self.per_token else self.batch)
        wide = (self.gate_dtype or self.dtype).itemsize
        return (rows * n_rows * self.dtype.itemsize + n_gates * wide) * self.n_channels


def gated_residual_in_dtype(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Compute gated_residual as a DiT block writes it: two roundings in bfloat16, not one."""
    gate = gate.unsqueeze(1) if gate.ndim == 2 else gate
    return (x + gate * y).to(x.dtype)
