# SPDX-License-Identifier: Apache-2.0
"""Inputs of qk_norm_rope and what they cost on paper, for its tests and its benchmark."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Operand = Tensor | None

FLOPS_PER_ELEMENT = {"fwd": 7, "bwd": 15, "jvp": 18}
"""Multiplications and additions of each element of queries and keys in each mode, rounded up."""


class Operands(NamedTuple):
    """What a call of qk_norm_rope and of its derivatives takes, in the order of its operands."""

    primals: tuple[Operand, ...]
    tangents: tuple[Operand, ...]
    cotangents: tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class QkNormRopeCase:
    """One shape of query-key normalisation with rotary embedding.

    Attributes:
        batch: B.
        n_tokens: N.
        heads: H.
        head_dim: D.
        dtype: of qkv.
        rope_tokens: tokens that are turned; None for all of them, 0 for a call without tables.
        interleaved: which channels are turned together.
        n_context: M, tokens of the second stream; 0 for a call without one.
        wide: whether weights and tables are float32 whatever the dtype of qkv.
        weighted: whether the norms have weights.
    """

    batch: int
    n_tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    rope_tokens: int | None = None
    interleaved: bool = True
    n_context: int = 0
    wide: bool = False
    weighted: bool = True

    def __str__(self) -> str:
        """Name the case in test and benchmark reports."""
        name = f"b{self.batch}n{self.n_tokens}h{self.heads}d{self.head_dim}"
        name += "" if self.rope_tokens is None else f"r{self.rope_tokens}"
        name += f"m{self.n_context}" if self.n_context else ""
        name += f"-{str(self.dtype).removeprefix('torch.')}"
        name += "-wide" * self.wide + "-half_split" * (not self.interleaved)
        return name + "-unweighted" * (not self.weighted)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword options of the call."""
        return {"heads": self.heads, "interleaved": self.interleaved}

    @property
    def _turned(self) -> int:
        return self.n_tokens if self.rope_tokens is None else self.rope_tokens

    @property
    def _wide_dtype(self) -> torch.dtype:
        return torch.float32 if self.wide else self.dtype

    def operands(self, seed: int = 0, device: str | torch.device = "cpu") -> Operands:
        """Draw normal operands and uniform angles, each tensor a slice of a larger one.

        qkv is the front of a wider projection, as in a single-stream block.
        """
        generator = torch.Generator().manual_seed(seed)
        channels = 3 * self.heads * self.head_dim

        def normal(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        def stream(n: int) -> list[Operand]:
            qkv = normal(self.batch, n + 3, channels + 32, dtype=self.dtype)[
                :, 1 : n + 1, :channels
            ]
            weights = normal(2, self.head_dim + 8, dtype=self._wide_dtype)[:, : self.head_dim]
            return [qkv, *(weights if self.weighted else (None, None))]

        def all_operands(tables: list[Operand]) -> tuple[Operand, ...]:
            first = stream(self.n_tokens)
            return (*first, *tables, *(stream(self.n_context) if self.n_context else [None] * 3))

        angles = 6.3 * torch.rand(self._turned, self.head_dim // 2, generator=generator).to(device)
        tables: list[Operand] = [t.to(self._wide_dtype) for t in (angles.cos(), angles.sin())]
        primals = all_operands(tables if self._turned else [None, None])
        tangents = all_operands([None, None])
        total = self.n_tokens + self.n_context
        shape = (self.batch, total + 2, self.heads, self.head_dim)
        dq, dk, dv = (
            normal(*shape, dtype=self.dtype).transpose(1, 2)[:, :, :total] for _ in range(3)
        )
        return Operands(primals, tangents, (dq, dk, dv))

    @property
    def _elements(self) -> int:
        """Elements of the queries of both streams."""
        return self.batch * (self.n_tokens + self.n_context) * self.heads * self.head_dim

    def flops(self, mode: str) -> int:
        """Count floating-point operations of "fwd", "bwd" or "jvp"; values are only copied."""
        return FLOPS_PER_ELEMENT[mode] * 2 * self._elements

    def bytes_moved(self, mode: str) -> int:
        """Count the bytes that `mode` must read and write once."""
        parts = {
            "fwd": 6,  # queries, keys and values in and out
            "bwd": 8,  # three cotangents, queries and keys, three gradients
            "jvp": 12,  # values and tangents in and out
        }[mode]
        streams = 2 if self.n_context else 1
        weight_rows = 0
        if self.weighted:
            weight_rows = 2 * streams * {"fwd": 1, "bwd": 2, "jvp": 2}[mode]
        small = weight_rows * self.head_dim + self._turned * self.head_dim  # weights, both tables
        return parts * self._elements * self.dtype.itemsize + small * self._wide_dtype.itemsize


def qk_norm_rope_in_dtype(
    qkv: Tensor,
    q_weight: Operand,
    k_weight: Operand,
    cos: Operand,
    sin: Operand,
    context_qkv: Operand = None,
    context_q_weight: Operand = None,
    context_k_weight: Operand = None,
    *,
    heads: int,
    interleaved: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute qk_norm_rope as a DiT block writes it, with views where they are enough.

    In bfloat16 it rounds after the norm, after the rotation and, where the weight is not wider, in
    between. Heads come before tokens without a copy.
    """
    q, k, v = torch.unflatten(qkv, -1, (3, heads, -1)).unbind(2)
    q, k = (
        _turned_in_float32(_normal(x, weight, eps), cos, sin, interleaved)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    if context_qkv is not None:
        context_q, context_k, context_v = torch.unflatten(context_qkv, -1, (3, heads, -1)).unbind(2)
        q = torch.cat((q, _normal(context_q, context_q_weight, eps)), 1)
        k = torch.cat((k, _normal(context_k, context_k_weight, eps)), 1)
        v = torch.cat((v, context_v), 1)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _normal(x: Tensor, weight: Operand, eps: float) -> Tensor:
    y = F.rms_norm(x, x.shape[-1:], None, eps)
    return y if weight is None else (y * weight).to(x.dtype)


def _turned_in_float32(x: Tensor, cos: Operand, sin: Operand, interleaved: bool) -> Tensor:
    if cos is None or sin is None:
        return x
    n = cos.shape[0]
    wide = x[:, :n].to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = (table.to(wide.dtype).unsqueeze(1) for table in (cos, sin))
    a, b = torch.unflatten(wide, -1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, -1)
    pairs = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return turned.to(x.dtype) if n == x.shape[1] else torch.cat((turned.to(x.dtype), x[:, n:]), 1)
