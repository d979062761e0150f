# SPDX-License-Identifier: Apache-2.0
"""What happens to a function without a rule: ``torch.func.jvp`` of that one call, or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from disca_kernels.dual.registry import add_handler, refusing_handler
from disca_kernels.dual.tensor import (
    HANDLERS,
    DualTensor,
    TangentError,
    function_name,
    make_dual,
    primals_of,
)

_OWN_NAMESPACES = ("aten", "prim", "prims")
_INPLACE = refusing_handler(
    "writes in place, which would leave another tensor without its tangent; use the form that "
    "returns a new tensor"
)
_OPAQUE_REASON = (
    "is an operator from torch.library, which has no forward-mode derivative: its tangent would "
    "silently be zero. Give it one with dual.rule"
)
_OPAQUE = refusing_handler(_OPAQUE_REASON)


def find_handler(func: Any) -> Callable[..., Any]:
    """Choose, once per function, what a call without a rule does."""
    if _writes_in_place(func):
        handler: Callable[..., Any] = _INPLACE
    elif _is_opaque(func):
        handler = _OPAQUE
    else:
        handler = call_through_func_jvp
    add_handler(func, handler)
    return HANDLERS[func]


def call_through_func_jvp(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Value and tangent of one call by ``torch.func.jvp``; the tangent is detached.

    One evaluation gives both, so a random function draws the same numbers for value and tangent.
    """
    if kwargs.get("out") is not None:
        return _INPLACE(func, args, kwargs)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if type(leaf) is DualTensor]
    duals = [leaves[i] for i in places]
    constant: list[Any] = []

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        for place, value in zip(places, values, strict=True):
            leaves[place] = value
        call_args, call_kwargs = pytree.tree_unflatten(leaves, spec)
        flat, out_spec = pytree.tree_flatten(func(*call_args, **call_kwargs))
        constant[:] = [flat, out_spec]
        return tuple(leaf for leaf in flat if isinstance(leaf, Tensor))

    try:
        with _RefuseOpaque():
            outs, dots = torch.func.jvp(
                call, tuple(d._primal for d in duals), tuple(d._tangent for d in duals)
            )
    except TangentError:
        raise
    except (NotImplementedError, RuntimeError, ValueError) as error:
        # The call may be wrong in itself, and then its own error is the useful one.
        func(*primals_of(args), **primals_of(kwargs))
        raise TangentError(
            f"{function_name(func)} has no tangent rule, and torch.func.jvp of it failed: {error}. "
            "Register a rule with dual.rule."
        ) from error
    flat, out_spec = constant
    if any(isinstance(leaf, int | float | complex) for leaf in flat):
        raise TangentError(
            f"{function_name(func)} returned a plain number, which cannot carry a tangent. "
            "Keep it a tensor, or pass x.detach() if that is meant."
        )
    pairs = iter(zip(outs, dots, strict=True))
    joined = [_join(*next(pairs)) if isinstance(leaf, Tensor) else leaf for leaf in flat]
    return pytree.tree_unflatten(joined, out_spec)


def _join(out: Tensor, out_dot: Tensor) -> Tensor:
    if not (out.is_floating_point() or out.is_complex()):
        return out
    return make_dual(out, out_dot.detach())


class _RefuseOpaque(TorchFunctionMode):
    """Raise when an operator from torch.library meets a forward-mode tensor inside a call.

    Within a ``torch.autograd.Function`` that has its own ``jvp`` such operators see plain
    tensors, which is right and is let through.
    """

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if _is_opaque(func) and any(
            isinstance(leaf, Tensor) and torch._C._functorch.is_gradtrackingtensor(leaf)
            for leaf in pytree.tree_leaves((args, kwargs))
        ):
            raise TangentError(f"{function_name(func)} {_OPAQUE_REASON}")
        return func(*args, **(kwargs or {}))


def _is_opaque(func: Any) -> bool:
    if isinstance(func, torch._ops.OpOverload):
        return func.namespace not in _OWN_NAMESPACES
    if isinstance(func, torch._ops.OpOverloadPacket):
        return func._qualified_op_name.split("::")[0] not in _OWN_NAMESPACES
    return False


def _writes_in_place(func: Any) -> bool:
    if isinstance(func, torch._ops.OpOverload):
        return bool(func._schema.is_mutable)
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in ("__setitem__", "__set__", "__delitem__") or name.startswith("__i")
    return name.endswith("_")
