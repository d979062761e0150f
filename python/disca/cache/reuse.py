# SPDX-License-Identifier: Apache-2.0
"""Reuse: the cached tokens stand in for the skipped ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disca.cache.policy import OneTensorCache

if TYPE_CHECKING:
    from torch import Tensor

    from disca.models.state import State

__all__ = ["Reuse"]


class Reuse(OneTensorCache):
    """Returns the tokens of the last full step unchanged.

    The order-0 forecast: training-free, and free of cost but for the embedders and the head, which
    see the current time and so still adapt the output. A learned predictor has to beat it.
    """

    name = "reuse"

    def replay(self, state: State, cache: Tensor) -> Tensor:
        """Return ``cache`` [B, N, C] as it is."""
        return cache
