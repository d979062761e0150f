# SPDX-License-Identifier: Apache-2.0
"""Inputs on which the tangent of attention loses accuracy, and what to compare it with.

A drift is a part that the tangents of all keys have in common, as after a change of the time
embedding. It adds the same number to all of a row's scores' tangents, which changes nothing in
exact arithmetic and everything in half precision unless the kernel takes it out first.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from disca_kernels.ops.attention.reference import attention_jvp_reference

Triple = tuple[Tensor, Tensor, Tensor]

KINDS = {
    "plain": "normal operands, a common drift of the keys' tangents",
    "offset": "the keys have the offset instead, which drifts through q_dot",
    "text": "128 constant text keys come first: no tangent, no drift",
    "attend": "the same, and the queries attend to the text",
    "peaked": "scores of standard deviation 4: a handful of keys have all the weight",
    "growing": "the drift grows along the keys, from 0 to twice its size",
    "local": "the same, and each query attends to the keys near its own position",
    "underflow": "the first 128 keys weigh 0 in float32, as if masked by a large negative bias",
}
DRIFTS = (0, 1, 4, 16, 64, 256)
_FIRST = 128
"""Keys that are special in "text", "attend" and "underflow"."""


@dataclass(frozen=True)
class DriftCase:
    """One input of the accuracy tables.

    Attributes:
        kind: one of `KINDS`.
        drift: size of the drift of each channel.
        n_q: number of queries.
        n_k: number of keys.
        head_dim: D.
        dtype: of the operands.
        value_mean: mean of the values, with a random sign in each channel.
    """

    kind: str
    drift: float = 0.0
    n_q: int = 64
    n_k: int = 2048
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    value_mean: float = 1.0

    def at(self, drift: float) -> "DriftCase":
        """Return the same case at another drift."""
        return replace(self, drift=drift)

    def operands(self, seed: int = 0, device: str | torch.device = "cpu") -> tuple[Triple, Triple]:
        """Draw primals and tangents of [1, 1, N, D]; two drifts differ in nothing else."""
        draw = _Draw(seed)
        d = self.head_dim
        q, k, v, q_dot, k_dot, v_dot = (draw(n, d) for n in (self.n_q, self.n_k, self.n_k) * 2)
        direction, axis = draw(d), draw(d)
        axis /= axis.norm()
        v += self.value_mean * draw(d).sign()
        # [Nk, 1]: the drift of each key.
        drift = torch.full((self.n_k, 1), float(self.drift), dtype=torch.float64)
        if self.kind in ("growing", "local"):
            drift *= torch.linspace(0, 2, self.n_k, dtype=torch.float64)[:, None]
        if self.kind in ("text", "attend"):
            for x in (k_dot, v_dot, drift):
                x[:_FIRST] = 0
        if self.kind == "offset":
            k += drift * direction
            drift.zero_()
        if self.kind == "peaked":
            q *= 4
        if self.kind == "attend":
            _lean(q, k, axis, bonus=6.0)
        if self.kind == "underflow":
            _lean(q, k, axis, bonus=-200.0)
        if self.kind == "local":
            _localise(q, k, draw)
        k_dot += drift * direction
        tensors = [x.to(device, self.dtype)[None, None] for x in (q, k, v, q_dot, k_dot, v_dot)]
        return (tensors[0], tensors[1], tensors[2]), (tensors[3], tensors[4], tensors[5])


class _Draw:
    """Normal numbers in float64 from a seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)


def _lean(q: Tensor, k: Tensor, axis: Tensor, bonus: float) -> None:
    """Add `bonus` to the scores that all queries give to the first keys."""
    size = math.sqrt(abs(bonus) * math.sqrt(len(axis)))
    for x in (q, k):
        x -= (x @ axis)[:, None] * axis
    q += size * axis
    k[:_FIRST] += math.copysign(size, bonus) * axis


def _localise(q: Tensor, k: Tensor, draw: _Draw) -> None:
    """Replace the first channels by smooth functions of a position, so that near tokens match.

    The queries are a run of positions in the middle of the keys. The deviation of the scores is
    that of the other channels plus 4 from these; a match lasts for about 1 % of the keys.
    """
    width = q.shape[1] // 4
    turns = 40 * 2 * math.pi / k.shape[0] * draw(width)
    phases = 2 * math.pi * draw(width)
    size = math.sqrt(8 * math.sqrt(q.shape[1]) / width)
    keys = torch.arange(k.shape[0], dtype=torch.float64)
    queries = torch.arange(q.shape[0], dtype=torch.float64) + k.shape[0] // 2
    for x, positions in ((q, queries), (k, keys)):
        angles = positions[:, None] * turns + phases
        x[:, : 2 * width] *= 0.5
        x[:, : 2 * width] += size * torch.cat([angles.cos(), angles.sin()], 1)


def exact_tangent(primals: Triple, tangents: Triple, **options: bool | Tensor | None) -> Tensor:
    """Compute o_dot in float64 from operands of any dtype."""
    q, k, v = (x.detach().cpu().double() for x in primals)
    dots = [x.detach().cpu().double() for x in tangents]
    results = attention_jvp_reference(
        (q, k, v),
        (dots[0], dots[1], dots[2]),
        **options,  # type: ignore[arg-type]
    )
    return results[1]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Return |actual - exact| / |exact|, in Frobenius norms."""
    return float((actual.cpu().double() - exact).norm() / exact.norm())


def uncentred_tangent(primals: Triple, tangents: Triple) -> Tensor:
    """Compute o_dot by the usual formula, with the roundings that a kernel makes.

    `(P * S_dot) v - rowsum(P * S_dot) o + P v_dot`, where the operands of every product are
    rounded to their dtype and everything else is float32.
    """
    dtype = primals[0].dtype
    q, k, v = (x.float() for x in primals)
    q_dot, k_dot, v_dot = (x.float() for x in tangents)
    scale = float(q.shape[-1] ** -0.5)
    p = torch.softmax(scale * (q @ k.mT), -1)
    h = p * (scale * (q_dot @ k.mT + q @ k_dot.mT))
    rounded_p, rounded_h = p.to(dtype).float(), h.to(dtype).float()
    c = h.sum(-1, keepdim=True)
    return (rounded_h @ v - c * (rounded_p @ v) + rounded_p @ v_dot).to(dtype)
