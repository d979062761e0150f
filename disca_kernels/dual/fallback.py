# SPDX-License-Identifier: Apache-2.0
"""What happens to a function without a rule: ``torch.func.jvp`` of that one call, or an error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from disca_kernels.dual.registry import add_handler, constant_handler, refusing_handler
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
    "it writes in place, which would leave a tensor without its tangent. Use the form that "
    "returns a new tensor."
)
_OPAQUE = refusing_handler(
    "an operator from torch.library has no forward-mode derivative, and its tangent would "
    "silently be zero. Give it one with dual.rule."
)


def find_handler(func: Any) -> Callable[..., Any]:
    """Choose, once per function, what a call without a rule does."""
    name = getattr(func, "__name__", "")
    handler: Callable[..., Any]
    if _writes_in_place(func):
        handler = _INPLACE
    elif name == "__get__" or name.startswith("is_"):
        handler = constant_handler  # attributes and queries of the value
    elif _is_opaque(func):
        handler = _OPAQUE
    else:
        handler = call_through_func_jvp
    add_handler(func, handler)
    return HANDLERS[func]


def call_through_func_jvp(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Value by the function itself, tangent by ``torch.func.jvp`` of a second evaluation.

    The second evaluation runs without gradients, so that nothing of it can be kept, and draws the
    same random numbers. One evaluation for both would be cheaper, but what PyTorch then saves for
    the backward pass of the value holds on to the tangent.
    """
    before = _random_states(args, kwargs)
    out = func(*primals_of(args), **primals_of(kwargs))
    with _replayed(before):
        return attach_tangents(out, func, args, kwargs)


def attach_tangents(out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Join the value that a call returned with its tangent by ``torch.func.jvp``."""
    flat, spec = pytree.tree_flatten(out)
    if any(isinstance(leaf, int | float | complex) for leaf in flat):
        raise TangentError(
            f"{function_name(func)} returned a plain number, which cannot carry a tangent. "
            "Keep it a tensor, or call x.detach() first if that is meant."
        )
    if not any(isinstance(leaf, Tensor) and _has_tangent(leaf) for leaf in flat):
        return out
    with torch.no_grad():
        dots = iter(tangents_by_func_jvp(func, args, kwargs))
    joined = []
    for leaf in flat:
        dot = next(dots) if isinstance(leaf, Tensor) else None
        joined.append(leaf if dot is None or not _has_tangent(leaf) else make_dual(leaf, dot))
    return pytree.tree_unflatten(joined, spec)


def tangents_by_func_jvp(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, ...]:
    """The tangents of the tensors that a call returns, in their flattened order."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if type(leaf) is DualTensor]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        replaced = list(leaves)
        for place, value in zip(places, values, strict=True):
            replaced[place] = value
        call_args, call_kwargs = pytree.tree_unflatten(replaced, spec)
        results = pytree.tree_leaves(func(*call_args, **call_kwargs))
        return tuple(leaf for leaf in results if isinstance(leaf, Tensor))

    primals = tuple(leaves[place]._primal.detach() for place in places)
    tangents = tuple(leaves[place]._tangent for place in places)
    try:
        # PyTorch's fast attention kernels have no forward mode; the plain one has.
        with _guard(func), sdpa_kernel(SDPBackend.MATH):
            dots: tuple[Tensor, ...] = torch.func.jvp(call, primals, tangents)[1]
            return dots
    except TangentError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        raise TangentError(
            f"{function_name(func)} has no tangent rule, and torch.func.jvp of it failed: {error}. "
            "Register a rule with dual.rule."
        ) from error


def _has_tangent(out: Tensor) -> bool:
    return out.is_floating_point() or out.is_complex()


def _random_states(args: Any, kwargs: Any) -> dict[torch.device, Tensor]:
    """The state of the random generators that a call may draw from, by device."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.is_cuda and leaf.device not in states:
            states[leaf.device] = torch.cuda.get_rng_state(leaf.device)
    return states


@contextmanager
def _replayed(before: dict[torch.device, Tensor]) -> Iterator[None]:
    """Draw from earlier states of the generators, then go on from where they are now."""
    now = {
        device: torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        for device in before
    }
    moved = [device for device in before if not torch.equal(before[device], now[device])]
    _set_random_states({device: before[device] for device in moved})
    try:
        yield
    finally:
        _set_random_states({device: now[device] for device in moved})


def _set_random_states(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


def _guard(func: Any) -> AbstractContextManager[Any]:
    """Watch calls of other libraries' functions; PyTorch's own use no operators but its own."""
    owner = getattr(func, "__module__", None) or "torch"
    return nullcontext() if owner.split(".")[0] == "torch" else _RefuseOpaque()  # type: ignore[no-untyped-call]


class _RefuseOpaque(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raise when an operator from torch.library runs inside a call that is differentiated.

    Within a ``torch.autograd.Function``, which answers for its own tangent, they are let through.
    """

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if _is_opaque(func) and not _TRUST.depth:
            _OPAQUE(func, args, {})
        return func(*args, **(kwargs or {}))


class _Trust(threading.local):
    depth = 0


_TRUST = _Trust()


@contextmanager
def trusted() -> Iterator[None]:
    """Let operators through for the time of an autograd Function."""
    _TRUST.depth += 1
    try:
        yield
    finally:
        _TRUST.depth -= 1


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
