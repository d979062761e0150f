# SPDX-License-Identifier: Apache-2.0
"""Inputs of attention and what they cost on paper, for its tests and its benchmark."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

PRODUCTS = {"fwd": 2, "bwd": 5, "jvp": 6, "tangent": 5}
"""Matrix products of B * H * Nq * Nk * D multiply-adds that each mode needs."""

MODES = tuple(PRODUCTS)


class Operands(NamedTuple):
    """What a call of attention and of its derivatives takes."""

    primals: tuple[Tensor, Tensor, Tensor]
    tangents: tuple[Tensor, Tensor, Tensor]
    cotangent: Tensor
    kv_lengths: Tensor | None


@dataclass(frozen=True)
class AttentionCase:
    """One shape of attention.

    Attributes:
        batch: B.
        heads: H.
        n_q: number of queries.
        n_k: number of keys.
        head_dim: D.
        dtype: of every operand.
        causal: as in `attention`.
        lengths: valid keys of each sample, or None for all.
        key_heads: Hk, None for as many as queries have.
        block_causal: as in `attention`.
    """

    batch: int
    heads: int
    n_q: int
    n_k: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    causal: bool = False
    lengths: tuple[int, ...] | None = None
    key_heads: int | None = None
    block_causal: int | None = None

    def __str__(self) -> str:
        """Name the case in test and benchmark reports."""
        name = f"b{self.batch}h{self.heads}q{self.n_q}k{self.n_k}d{self.head_dim}"
        name += f"-{str(self.dtype).removeprefix('torch.')}"
        name += "-causal" * self.causal
        if self.block_causal is not None:
            name += f"-block{self.block_causal}"
        if self.key_heads is not None:
            name += f"-kv{self.key_heads}"
        return name + "-lengths" * (self.lengths is not None)

    @property
    def masks(self) -> dict[str, Any]:
        """The options of `attention` that do not need a device."""
        return {"causal": self.causal, "block_causal": self.block_causal}

    def operands(self, seed: int = 0, device: str | torch.device = "cpu") -> Operands:
        """Draw normal operands, each a slice of a larger tensor laid out as [B, N, H, D]."""
        generator = torch.Generator().manual_seed(seed)

        def draw(n: int, heads: int) -> Tensor:
            shape = (self.batch, n, heads + 1, self.head_dim + 8)
            full = torch.randn(shape, generator=generator).to(device, self.dtype)
            return full[:, :, 1:, : self.head_dim].transpose(1, 2)

        queries, keys = (self.n_q, self.heads), (self.n_k, self._key_heads)
        q, k, v, q_dot, k_dot, v_dot = (draw(*size) for size in (queries, keys, keys) * 2)
        lengths = None if self.lengths is None else torch.tensor(self.lengths, device=device)
        return Operands((q, k, v), (q_dot, k_dot, v_dot), draw(*queries), lengths)

    @property
    def _key_heads(self) -> int:
        return self.heads if self.key_heads is None else self.key_heads

    def flops(self, mode: str) -> int:
        """Count floating-point operations of "fwd", "bwd", "jvp" or "tangent", masks ignored."""
        scores = self.batch * self.heads * self.n_q * self.n_k
        return 2 * PRODUCTS[mode] * scores * self.head_dim

    def bytes_moved(self, mode: str) -> int:
        """Count the bytes that `mode` must read and write once, lse and lengths left out."""
        queries = self.heads * self.n_q * self.head_dim
        keys = self._key_heads * self.n_k * self.head_dim
        elements = {
            "fwd": 2 * queries + 2 * keys,  # q, o; k, v
            "bwd": 4 * queries + 4 * keys,  # q, o, do, dq; k, v, dk, dv
            "jvp": 4 * queries + 4 * keys,  # q, o and tangents; k, v and tangents
            "tangent": 4 * queries + 4 * keys,  # q, q_dot, o, o_dot; k, v and tangents
        }[mode]
        return self.batch * elements * self.dtype.itemsize


def attention_in_dtype(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    block_causal: int | None = None,
) -> Tensor:
    """Compute attention as one writes it in eager PyTorch, every step rounded to the dtype.

    The yardstick of the error budgets. A row that sees no key is 0 as in `attention`.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    visible = _visible(q, k, kv_lengths, 1 if causal else block_causal)
    scores = _scores(q, k, visible)
    o: Tensor = scores.softmax(-1) @ v
    return o.masked_fill(~visible.any(-1, keepdim=True), 0.0)


def attention_gradient_in_dtype(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    block_causal: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk and dv in eager PyTorch as memory in O(N) allows it.

    The yardstick of the backward kernels: P is computed again from a float32 log-sum-exp, whose
    rounding, |lse| 2^-24 relative in P, no backward pass that does not keep P can avoid.
    """
    groups = q.shape[1] // k.shape[1]
    repeated = [x.repeat_interleave(groups, 1) for x in (k, v)]
    visible = _visible(q, k, kv_lengths, 1 if causal else block_causal)
    scores = _scores(q, repeated[0], visible).float()
    lse = scores.logsumexp(-1, keepdim=True)
    p = (scores - lse).exp().masked_fill(~visible, 0.0).to(q.dtype)
    dp = do @ repeated[1].mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (ds.mT @ q, p.mT @ do))
    return ds @ repeated[0], dk, dv


def _visible(q: Tensor, k: Tensor, kv_lengths: Tensor | None, block: int | None) -> Tensor:
    """Return which keys a query sees, [B, 1, Nq, Nk]."""
    n_q, n_k = q.shape[-2], k.shape[-2]
    o_k = torch.arange(n_k, device=q.device)
    visible = torch.ones((q.shape[0], 1, n_q, n_k), dtype=torch.bool, device=q.device)
    if kv_lengths is not None:
        visible = visible & (o_k < kv_lengths[:, None, None, None])
    if block is not None:
        o_q = torch.arange(n_k - n_q, n_k, device=q.device)[:, None]
        visible = visible & (o_k // block <= o_q.div(block, rounding_mode="floor"))
    return visible


def _scores(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    scores: Tensor = (q @ k.mT) * q.shape[-1] ** -0.5
    return scores.masked_fill(~visible, torch.finfo(q.dtype).min)
