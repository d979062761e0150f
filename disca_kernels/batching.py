# SPDX-License-Identifier: Apache-2.0
"""Rules for `torch.vmap`: the mapped dimension becomes part of the batch."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor


def fold(size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Fold the mapped dimension of each tensor into its batch: [V, B, ...] to [V * B, ...].

    An unmapped tensor is repeated; a copy is made only where strides cannot express that. A list of
    tensors is folded one by one. What is not a tensor passes through.

    Args:
        size: V, the size of the mapped dimension.
        in_dims: for each argument the mapped dimension, or None.
        args: the arguments, each tensor with the batch as its first unmapped dimension.
    """
    folded: list[Any] = []
    for argument, dim in zip(args, in_dims, strict=True):
        if isinstance(argument, Tensor):
            mapped = argument.expand(size, *argument.shape)
            if dim is not None:
                mapped = argument.movedim(dim, 0)
            folded.append(mapped.flatten(0, 1))
        elif isinstance(argument, (list, tuple)):
            dims = [None] * len(argument) if dim is None else dim
            folded.append(fold(size, dims, argument))
        else:
            folded.append(argument)
    return folded


def unfold(size: int, tensor: Tensor) -> Tensor:
    """Undo the folding of a result: [V * B, ...] to [V, B, ...]."""
    return tensor.reshape(size, tensor.shape[0] // size, *tensor.shape[1:])


def folding_rule(operator: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """Make the vmap rule of an operator whose tensors all have the batch dimension first."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        result = operator(*fold(info.batch_size, in_dims, args))
        if isinstance(result, Tensor):
            return unfold(info.batch_size, result), 0
        return tuple(unfold(info.batch_size, r) for r in result), (0,) * len(result)

    return rule


def fold_named(
    size: int,
    in_dims: Sequence[int | None],
    tensors: Sequence[Tensor | None],
    names: Sequence[str],
    unbatched: Collection[str],
) -> list[Tensor | None] | None:
    """Fold the mapped dimension of each tensor into its batch, but for those without a batch.

    Args:
        size: size of the mapped dimension.
        in_dims: for each tensor the mapped dimension, or None.
        tensors: the tensors, None for an absent one.
        names: their names.
        unbatched: names of tensors whose first dimension is not the batch.

    Returns:
        The folded tensors; None if one without a batch is mapped, which no single call can serve.
    """
    folded: list[Tensor | None] = []
    for tensor, dim, name in zip(tensors, in_dims, names, strict=True):
        if name in unbatched:
            if dim is not None:
                return None
            folded.append(tensor)
        else:
            folded += fold(size, [dim], [tensor])
    return folded


def in_a_loop(
    size: int,
    in_dims: Sequence[Sequence[int | None]],
    lists: Sequence[Sequence[Tensor | None]],
    operator: Callable[..., Sequence[Tensor]],
    rest: Sequence[Any],
) -> list[Tensor]:
    """Call an operator of lists of tensors once for each index of the mapped dimension."""
    results = []
    for i in range(size):
        at_index = [
            [
                x if x is None or dim is None else x.select(dim, i)
                for x, dim in zip(xs, dims, strict=True)
            ]
            for xs, dims in zip(lists, in_dims, strict=True)
        ]
        results.append(operator(*at_index, *rest))
    return [torch.stack(column) for column in zip(*results, strict=True)]


def _at(index: int, tensor: Tensor | None, dim: int | None) -> Tensor | None:
    """Take one index of a mapped tensor; anything else as it is."""
    return tensor if tensor is None or dim is None else tensor.select(dim, index)
