# SPDX-License-Identifier: Apache-2.0
"""Rules for `torch.vmap`: the mapped dimension becomes part of the batch."""

from collections.abc import Callable, Sequence
from typing import Any

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
