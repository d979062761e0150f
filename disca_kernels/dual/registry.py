# SPDX-License-Identifier: Apache-2.0
"""How a function gets a rule: the decorator, the kinds of rules, and what they guarantee."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.nn import functional

from disca_kernels.dual.tensor import (
    HANDLERS,
    DualTensor,
    TangentError,
    function_name,
    make_dual,
    primals_of,
    values_of,
)

F = TypeVar("F", bound=Callable[..., Any])

_set_grad_enabled = torch._C._set_grad_enabled
_is_grad_enabled = torch.is_grad_enabled

#: Every function that has a rule which produces a tangent, with the name of its family.
FAMILIES: dict[Any, str] = {}


def rule(*functions: Any, fused: bool = False) -> Callable[[F], F]:
    """Register the tangent rule of one or more functions.

    The default form gives the tangent only. The value is computed first, by the function itself
    on plain values and in the caller's grad mode, so it is the plain forward by construction. The
    rule then runs without gradients as ``rule(out, *args, **kwargs) -> out_dot``, with the
    function's own arguments, in which a :class:`DualTensor` stands for a value with a tangent
    (take it apart with :func:`split`). ``None`` says that the result is a constant,
    ``NotImplemented`` asks for ``torch.func.jvp`` of this one call. The tangent may have fewer
    dimensions or another floating type than the value: it is expanded and cast.

    The fused form is for kernels that compute both at once. It runs in the caller's grad mode as
    ``rule(*args, **kwargs) -> (out, out_dot)`` and must return a tangent that needs no gradient.

    Args:
        *functions: The callables as PyTorch hands them to ``__torch_function__``: ``torch.sin``,
            ``torch.Tensor.sin``, an overridable function of another library, an operator made
            with ``torch.library.custom_op``, or a ``torch.autograd.Function`` class.
        fused: Whether the rule returns value and tangent.

    Returns:
        A decorator that returns the rule unchanged.

    Raises:
        TypeError: If something that is not callable is registered.

    Example:
        >>> @dual.rule(torch.sin, torch.Tensor.sin)
        ... def _sin(out, x):
        ...     value, x_dot = dual.split(x)
        ...     return x_dot * value.cos()
    """
    for func in functions:
        if not callable(func):
            raise TypeError(f"dual.rule takes callables, got {func!r}")

    def register(body: F) -> F:
        for func in functions:
            for target in _targets(func):
                make = fused_handler if fused else tangent_handler
                add_handler(target, make(body), family=_family(func))
        return body

    return register


def tangent_handler(body: Callable[..., Any]) -> Callable[..., Any]:
    """Value by the function itself, then the tangent by ``body`` without gradients."""

    def handle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = values_of(args)
        out = func(*values, **primals_of(kwargs)) if kwargs else func(*values)
        grad = _is_grad_enabled()
        if grad:
            _set_grad_enabled(False)
        try:
            out_dot = body(out, *args, **kwargs)
        finally:
            if grad:
                _set_grad_enabled(True)
        if out_dot is NotImplemented:
            from disca_kernels.dual.fallback import attach_tangents

            return attach_tangents(out, func, args, kwargs)
        return pair(func, out, out_dot)

    return handle


def fused_handler(body: Callable[..., Any]) -> Callable[..., Any]:
    """Value and tangent together by ``body``."""

    def handle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return pair(func, *body(*args, **kwargs))

    return handle


def linear_handler(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply a function that is linear in its first argument to value and tangent alike."""
    if not args:
        args, kwargs = _first_positional(kwargs)
    x = args[0]
    rest = values_of(args[1:])
    if kwargs:
        kwargs = primals_of(kwargs)
    if type(x) is not DualTensor:
        return func(x, *rest, **kwargs)
    out = func(x._primal, *rest, **kwargs)
    grad = _is_grad_enabled()
    if grad:
        _set_grad_enabled(False)
    try:
        out_dot = func(x._tangent, *rest, **kwargs)
    finally:
        if grad:
            _set_grad_enabled(True)
    return pair(func, out, out_dot)


def list_handler(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply a function that is linear in a list of tensors to values and tangents alike."""
    if not args:
        args, kwargs = _first_positional(kwargs)
    parts = args[0] if isinstance(args[0], list | tuple) else args
    rest = primals_of(args[1:]) if isinstance(args[0], list | tuple) else ()
    out = func(primals_of(list(parts)), *rest, **kwargs)
    grad = _is_grad_enabled()
    if grad:
        _set_grad_enabled(False)
    try:
        dots = [
            part._tangent if type(part) is DualTensor else torch.zeros_like(part) for part in parts
        ]
        out_dot = func(dots, *rest, **kwargs)
    finally:
        if grad:
            _set_grad_enabled(True)
    return pair(func, out, out_dot)


def constant_handler(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer from the value: queries, comparisons and functions whose derivative is zero."""
    return func(*primals_of(args), **primals_of(kwargs))


def refusing_handler(reason: str) -> Callable[..., Any]:
    """Raise an error that names the function and says what to do instead."""

    def handle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise TangentError(
            f"{function_name(func)} cannot take a tensor that carries a tangent: {reason}"
        )

    return handle


def add_handler(func: Any, handler: Callable[..., Any], *, family: str | None = None) -> None:
    """Enter a handler in the table, guarding the ``inplace`` argument of functions that have it."""
    position = _inplace_position(func)
    HANDLERS[func] = handler if position is None else _guard_inplace(handler, position)
    if family is not None:
        FAMILIES[func] = family


def spellings(*names: str) -> list[Any]:
    """Every callable that PyTorch offers under a name: torch.x, Tensor.x, functional.x."""
    found: dict[Any, None] = {}
    for name in names:
        for owner in (torch, Tensor, functional):
            func = getattr(owner, name, None)
            if callable(func) and func not in found:
                found[func] = None
    if not found:
        raise AttributeError(f"PyTorch {torch.__version__} has no function named {names}")
    return list(found)


def pair(func: Any, out: Any, out_dot: Any) -> Any:
    """Join the value and the tangent that a rule gave, leaf by leaf."""
    if out_dot is None:
        return out
    if isinstance(out, Tensor):
        if out_dot.shape != out.shape:
            out_dot = out_dot.expand(out.shape)
        if not (out.is_floating_point() or out.is_complex()):
            raise TangentError(
                f"{function_name(func)} to {out.dtype} would drop the tangent. Call x.detach() "
                "first if that is meant."
            )
        if out_dot.dtype != out.dtype:
            out_dot = out_dot.to(out.dtype)
        if out_dot.requires_grad:
            raise TangentError(
                f"the rule of {function_name(func)} returned a tangent that requires grad; "
                "compute it under torch.no_grad()"
            )
        return make_dual(out, out_dot)
    if isinstance(out, tuple | list):
        items = [pair(func, item, dot) for item, dot in zip(out, out_dot, strict=True)]
        if type(out) in (tuple, list):
            return type(out)(items)
        # PyTorch's own result types take one sequence, named tuples take the fields.
        return type(out)(*items) if hasattr(out, "_fields") else type(out)(items)
    raise TangentError(
        f"{function_name(func)} returned {type(out).__name__}, which cannot carry a tangent"
    )


def _first_positional(kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Move the tensor of a call that was written with keywords only to the front."""
    key = next(name for name in ("input", "tensors", "tensor", "self") if name in kwargs)
    return (kwargs[key],), {name: arg for name, arg in kwargs.items() if name != key}


def _family(func: Any) -> str:
    return getattr(func, "__name__", None) or str(func)


def _targets(func: Any) -> list[Any]:
    """The objects that PyTorch hands to ``__torch_function__`` when ``func`` is called."""
    if isinstance(func, CustomOpDef):
        func = func._opoverload
    if isinstance(func, torch._ops.OpOverload):
        return [func, func.overloadpacket]
    if isinstance(func, torch._ops.OpOverloadPacket):
        return [func, *[getattr(func, name) for name in func.overloads()]]  # type: ignore[no-untyped-call]
    return [func]


def _inplace_position(func: Any) -> int | None:
    if not inspect.isfunction(func):
        return None
    names = func.__code__.co_varnames[: func.__code__.co_argcount]
    return names.index("inplace") if "inplace" in names else None


def _guard_inplace(handler: Callable[..., Any], position: int) -> Callable[..., Any]:
    def handle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("inplace") or (len(args) > position and args[position]):
            raise TangentError(
                f"{function_name(func)} with inplace=True cannot take a tensor that carries a "
                "tangent; use inplace=False"
            )
        return handler(func, args, kwargs)

    return handle
