# SPDX-License-Identifier: Apache-2.0
"""The tensor type that carries a value and its tangent through one call of a function."""

from __future__ import annotations

import threading
import traceback
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

#: What a call of each function does with dual arguments. Filled by the registry.
HANDLERS: dict[Any, Handler] = {}


_NESTS = frozenset((tuple, list, dict))
_NOWHERE = torch.device("meta")


class TangentError(RuntimeError):
    """A tangent would have been lost silently, or cannot be computed.

    It is not a ``TypeError``: PyTorch's operators turn those into ``NotImplemented`` and the
    message would never be seen.
    """


class _State(threading.local):
    """The duals of the pass that runs in this thread, or None outside of a pass."""

    members: list[weakref.ref[DualTensor]] | None = None


STATE = _State()


class DualTensor(Tensor):
    """A value and its tangent, seen by the function under :func:`disca_kernels.dual.jvp`.

    It has no storage of its own. Every call that PyTorch lets a tensor type intercept goes to a
    rule; every other call ends in ``__torch_dispatch__``, which raises. Shape, data type and
    device are those of the value.
    """

    _primal: Tensor
    _tangent: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the rule of ``func``, or the general path where it has none."""
        handler = HANDLERS.get(func)
        if handler is None:
            from disca_kernels.dual.fallback import find_handler

            handler = find_handler(func)
        if kwargs is None:
            kwargs = {}
        elif kwargs.get("out") is not None:
            raise TangentError(
                f"{function_name(func)} with out= would write a value without its tangent; use "
                "the tensor that it returns"
            )
        return handler(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse: whatever arrives here went past the rules and would drop the tangent."""
        raise TangentError(
            f"{func} was reached by a tensor that carries a tangent, through a call that no rule "
            f"can see (such as torch.tensor, torch.vmap or a TorchScript function): "
            f"{_caller()}. The tangent would be lost. Write it with ordinary tensor functions, or "
            "pass x.detach() if the tangent is meant to end there."
        )

    # The plain queries are answered here because the way through __torch_function__ costs ten
    # times as much, and models ask for shapes in every layer.
    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Shape of the value."""
        return self._primal.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Data type of the value."""
        return self._primal.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Device of the value."""
        return self._primal.device

    @property
    def ndim(self) -> int:  # type: ignore[override]
        """Number of dimensions."""
        return self._primal.ndim

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """Whether autograd tracks the value; it never tracks the tangent."""
        return self._primal.requires_grad

    def dim(self) -> int:
        """Number of dimensions."""
        return self._primal.dim()

    def size(self, *args: Any, **kwargs: Any) -> Any:
        """Shape of the value, or one of its entries."""
        return self._primal.size(*args, **kwargs)

    def numel(self) -> int:
        """Number of elements."""
        return self._primal.numel()

    def __len__(self) -> int:
        return len(self._primal)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(value={self._primal!r})"

    def __format__(self, spec: str) -> str:
        return format(self._primal.detach(), spec)

    def __bool__(self) -> bool:
        return bool(self._primal)


class SpentDualTensor(DualTensor):
    """A dual whose pass is over.

    Activation checkpointing keeps the inputs of a block for the backward pass; there, and only
    there, such a tensor still stands for its value. The tangent is gone.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Stand for the value during a backward pass; refuse everywhere else."""
        if torch._C._current_graph_task_id() == -1:
            raise TangentError(
                f"{function_name(func)} was called on a tensor of a dual.jvp pass that is over. "
                "Return it from the function, or keep x.detach() instead."
            )
        return func(*primals_of(args), **primals_of(kwargs or {}))


def make_dual(primal: Tensor, tangent: Tensor) -> DualTensor:
    """Join a value and a tangent of the same shape and data type."""
    # On the meta device nothing can read it, or swap it into another tensor, behind our back.
    dual: DualTensor = Tensor._make_wrapper_subclass(DualTensor, primal.shape, device=_NOWHERE)
    dual._primal = primal
    dual._tangent = tangent
    members = STATE.members
    if members is not None:
        members.append(weakref.ref(dual))
    return dual


def spend(members: list[weakref.ref[DualTensor]]) -> None:
    """End the duals that outlive their pass, so that no tangent stays alive."""
    for member in members:
        dual = member()
        if dual is not None:
            del dual._tangent
            dual.__class__ = SpentDualTensor


def primal(x: Any) -> Any:
    """The value of a dual; anything else as it is."""
    return x._primal if isinstance(x, DualTensor) else x


def tangent(x: Any) -> Any:
    """The tangent of a dual; None for anything else, which is a constant."""
    return x._tangent if type(x) is DualTensor else None


def split(x: Any) -> tuple[Any, Any]:
    """Value and tangent of an argument; the tangent of a constant is None."""
    return (x._primal, x._tangent) if type(x) is DualTensor else (x, None)


def accumulate(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Add two tangents, either of which may be absent."""
    if left is None or right is None:
        return right if left is None else left
    return left + right


def primals_of(tree: Any) -> Any:
    """Replace every dual in nested lists, tuples and dicts by its value."""
    if isinstance(tree, DualTensor):
        return tree._primal
    kind = type(tree)
    if kind is tuple:
        return tuple([primals_of(item) for item in tree])
    if kind is list:
        return [primals_of(item) for item in tree]
    if kind is dict:
        return {key: primals_of(item) for key, item in tree.items()}
    return tree


def values_of(args: tuple[Any, ...]) -> list[Any]:
    """The arguments of a call with values in place of duals."""
    return [
        arg._primal if type(arg) is DualTensor else primals_of(arg) if type(arg) in _NESTS else arg
        for arg in args
    ]


def has_dual(tree: Any) -> bool:
    """Whether nested lists, tuples and dicts hold a dual."""
    if isinstance(tree, DualTensor):
        return True
    kind = type(tree)
    if kind is tuple or kind is list:
        return any(map(has_dual, tree))
    return kind is dict and any(map(has_dual, tree.values()))


def function_name(func: Any) -> str:
    """A name that a user recognises, such as ``torch.Tensor.item``."""
    name = torch.overrides.resolve_name(func)
    if name:
        return str(name).removesuffix(".__get__")
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return f"torch.ops.{func}"
    owner = getattr(func, "__module__", None) or type(func).__module__
    name = getattr(func, "__qualname__", None) or repr(func)
    return f"{owner}.{name}"


def _caller() -> str:
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(("<", torch.__path__[0], __file__)):
            return f"{frame.filename}:{frame.lineno}, {frame.line!r}"
    return "an unknown place"
