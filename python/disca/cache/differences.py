# SPDX-License-Identifier: Apache-2.0
"""Finite differences of what a policy saw at its full steps, for forecasting it at the others."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate, chain
from math import factorial

from torch import Tensor

from disca.cache.store import Store

__all__ = ["Differences"]


class Differences:
    """Polynomials through values that a policy kept at its full steps.

    A full step begins with :meth:`start`, which takes its position s_0; every tensor of it goes in
    through :meth:`put`. Difference 0 is the tensor, and difference i + 1 is difference i less the
    one kept before, over a gap. The gap, and what a difference is worth at a later position s, make
    two kinds:

    - equal steps, as in TaylorSeer's code: the gap is s_0 - s_1, of the last two full steps, and
      the value at s is ``sum_i d_i (s - s_0)^i / i!``. Exact for order 1; order 2 takes a backward
      difference for the derivative at s_0 and is off by a term of the gap even on equal steps;
    - divided: the gap is s_0 - s_{i+1}, and the value at s is Newton's polynomial ``d_0 + d_1 (s -
      s_0) + d_2 (s - s_0)(s - s_1)``. Exact for polynomials of the order, whatever the gaps.

    Args:
        store: where the tensors are kept, under the keys ``(key, 0)`` to ``(key, order)``.
        order: the highest difference.
        divided: the kind.
    """

    def __init__(self, store: Store, order: int, *, divided: bool) -> None:
        self.store, self.order, self.divided = store, order, divided
        self._positions: tuple[float, ...] = ()
        self._depth = 0

    def start(self, position: float, *, differentiate: bool = True) -> None:
        """Begin a full step.

        Args:
            position: where it lies: its time or its number.
            differentiate: form differences with what was kept before; otherwise the values of this
                step are a new start.
        """
        before = self._positions[: self.order] if differentiate else ()
        self._positions = (position, *before)
        self._depth = len(before)

    def put(self, key: Hashable, value: Tensor) -> None:
        """Keep a tensor of the step that began last."""
        for i in range(self._depth):
            higher = (value - self.store[key, i]) / self._gap(i)
            self.store[key, i] = value
            value = higher
        self.store[key, self._depth] = value

    def weights(self, position: float) -> list[float]:
        """Return what each difference is worth at a position, for :meth:`combine`."""
        if not self.divided:
            ahead = position - self._positions[0]
            return [ahead**i / factorial(i) for i in range(self._depth + 1)]
        distances = (position - node for node in self._positions[: self._depth])
        return list(accumulate(chain((1.0,), distances), lambda product, step: product * step))

    def combine(self, key: Hashable, weights: Sequence[float]) -> Tensor:
        """Return the sum of a key's differences with these weights."""
        total = weights[0] * self.store[key, 0]
        for i, weight in enumerate(weights[1:], start=1):
            total = total + weight * self.store[key, i]
        return total

    def forecast(self, key: Hashable, position: float) -> Tensor:
        """Return the value of a key at a position."""
        return self.combine(key, self.weights(position))

    def _gap(self, order: int) -> float:
        last = order + 1 if self.divided else 1
        return self._positions[0] - self._positions[last]
