# SPDX-License-Identifier: Apache-2.0
"""Where a cache policy keeps its tensors, so that bytes are counted alike for every policy."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping

from torch import Tensor

__all__ = ["Store"]


class Store(MutableMapping[Hashable, Tensor]):
    """A mapping of tensors that knows how much memory they take.

    Tensors are detached as they come in. Bytes are those of the storages behind the tensors, each
    counted once: a view keeps all of its storage alive.

    Attributes:
        peak: the most bytes seen by :meth:`measure`.
    """

    def __init__(self) -> None:
        self._tensors: dict[Hashable, Tensor] = {}
        self.peak = 0

    def __getitem__(self, key: Hashable) -> Tensor:
        return self._tensors[key]

    def __setitem__(self, key: Hashable, tensor: Tensor) -> None:
        self._tensors[key] = tensor.detach()

    def __delitem__(self, key: Hashable) -> None:
        del self._tensors[key]

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def nbytes(self) -> int:
        """Return the bytes that the tensors keep alive."""
        storages = (tensor.untyped_storage() for tensor in self._tensors.values())
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    def measure(self) -> None:
        """Raise :attr:`peak` to the bytes of now."""
        self.peak = max(self.peak, self.nbytes())
