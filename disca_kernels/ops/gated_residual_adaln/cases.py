# SPDX-License-Identifier: Apache-2.0
"""Inputs of gated_residual_adaln and what they cost on paper, for its tests and its benchmark."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from disca_kernels.testing.drawing import Drawing, Operands, name_of

# Multiplications and additions for each element of x; what is done once a row or a sample is free.
_FLOPS = {
    "layer": {"fwd": 9, "bwd": 20, "jvp": 24},
    "rms": {"fwd": 7, "bwd": 16, "jvp": 20},
    "weight": {"fwd": 1, "bwd": 1, "jvp": 4},
    "bias": {"fwd": 1, "bwd": 0, "jvp": 2},
}


@dataclass(frozen=True)
class GatedResidualAdalnCase:
    """One shape of the gated residual with modulation.

    Attributes:
        batch: B.
        n_tokens: N.
        n_channels: C.
        dtype: of x and y.
        modulation_dtype: of gate, shift, scale, weight and bias; None means that of x.
        per_token: whether every token has a shift and a scale of its own.
        gate_per_token: whether every token has a gate of its own.
        affine: whether the norm has a weight, and a bias if it is a layer norm.
        norm: "layer" or "rms".
        offset: added to x, so that the mean of a row is not small beside its deviation.
    """

    batch: int
    n_tokens: int
    n_channels: int
    dtype: torch.dtype = torch.float32
    modulation_dtype: torch.dtype | None = None
    per_token: bool = False
    gate_per_token: bool = False
    affine: bool = False
    norm: str = "layer"
    offset: float = 0.5

    def __str__(self) -> str:
        """Name the case in test and benchmark reports."""
        name = f"b{self.batch}n{self.n_tokens}c{self.n_channels}-{name_of(self.dtype)}"
        if self.modulation_dtype is not None:
            name += f"-modulation_{name_of(self.modulation_dtype)}"
        name += "-per_token" * self.per_token + "-gate_per_token" * self.gate_per_token
        return name + "-affine" * self.affine + "-rms" * (self.norm == "rms")

    @property
    def options(self) -> dict[str, Any]:
        """What the public function takes besides the operands."""
        return {"norm": self.norm}

    def operands(self, seed: int = 0, device: str | torch.device = "cpu") -> Operands:
        """Draw normal operands, each a slice of a larger tensor."""
        draw = Drawing((self.batch, self.n_tokens, self.n_channels), seed, device)
        wide = self.modulation_dtype or self.dtype

        def primals_or_tangents(offset: float, mean_weight: float) -> tuple[Tensor | None, ...]:
            x, y = draw.tokens(self.dtype), draw.tokens(self.dtype)
            (gate,) = draw.modulations(1, wide, self.gate_per_token)
            modulations = draw.modulations(2, wide, self.per_token)
            weight = draw.channels(wide, mean_weight) if self.affine else None
            bias = draw.channels(wide) if self.affine and self.norm == "layer" else None
            return (x + offset if offset else x), y, gate, *modulations, weight, bias

        primals = primals_or_tangents(self.offset, 1.0)
        cotangents = draw.tokens(self.dtype), draw.tokens(self.dtype)
        return Operands(primals, primals_or_tangents(0.0, 0.0), cotangents)

    def flops(self, mode: str) -> int:
        """Count floating-point operations of "fwd", "bwd" or "jvp"."""
        parts = [self.norm, *("weight", "bias")[: self._n_vectors]]
        per_element = sum(_FLOPS[part][mode] for part in parts)
        return per_element * self.batch * self.n_tokens * self.n_channels

    def bytes_moved(self, mode: str) -> int:
        """Count the bytes that `mode` must read and write once."""
        rows = {
            "fwd": 4,  # x, y, x_new, h
            "bwd": 6,  # dx_new, dh, x_new, y, dx, dy
            "jvp": 8,  # x, y, x_new, h and their tangents
        }[mode]
        gates = 1 if mode == "fwd" else 2  # beside it its gradient or tangent
        modulation_rows = {
            "fwd": 2,  # shift, scale
            "bwd": 3,  # scale, dshift, dscale
            "jvp": 4,  # shift, scale and their tangents
        }[mode]
        # weight and bias, beside them their gradients or tangents
        vectors = self._n_vectors * (1 if mode == "fwd" else 2)
        n_rows = self.batch * self.n_tokens
        wide_rows = (
            gates * (n_rows if self.gate_per_token else self.batch)
            + modulation_rows * (n_rows if self.per_token else self.batch)
            + vectors
        )
        wide = (self.modulation_dtype or self.dtype).itemsize
        return (rows * n_rows * self.dtype.itemsize + wide_rows * wide) * self.n_channels

    @property
    def _n_vectors(self) -> int:
        """How many vectors the affine part has."""
        return (2 if self.norm == "layer" else 1) if self.affine else 0


def gated_residual_adaln_in_dtype(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Compute gated_residual_adaln as a DiT block writes it, rounding after every step."""
    gate, shift, scale = (t.unsqueeze(1) if t.ndim == 2 else t for t in (gate, shift, scale))
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    x_new = (x + gate * y).to(x.dtype)
    if norm == "rms":
        normal = torch.nn.functional.rms_norm(x_new, x.shape[-1:], weight, eps)
    else:
        normal = torch.nn.functional.layer_norm(x_new, x.shape[-1:], weight, bias, eps)
    return x_new, (normal * (1 + scale) + shift).to(x.dtype)
