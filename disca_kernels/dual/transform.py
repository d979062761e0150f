# SPDX-License-Identifier: Apache-2.0
"""The forward-mode pass itself."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from disca_kernels.dual.functions import interception
from disca_kernels.dual.tensor import STATE, DualTensor, TangentError, make_dual, spend

#: The pass for a process that uses torch.compile, made when one does: loading the compiler takes
#: seconds. A graph would break at every rule, so the compiler is off around the pass, and modules
#: compiled before run in eager mode inside.
_BESIDE_THE_COMPILER: list[Callable[..., Any]] = []


def jvp(func: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """Value and directional derivative of a function in one pass, gradients for the value only.

    Computes ``out = func(*primals)`` and ``out_dot = d/dh func(primals + h * tangents)`` at
    h = 0. ``out`` is tracked by autograd exactly as in a plain call. ``out_dot`` is detached, and
    nothing that belongs to it is kept for the backward pass. ``func`` may be any unchanged
    ``torch.nn.Module``. See docs/dual.md for the rules, the costs and the limits.

    Args:
        func: A function of the primals.
        primals: The arguments: tensors, or lists, tuples, dicts and dataclasses of tensors.
        tangents: One entry for each primal, of the same structure, shapes, data types and
            devices. None, in place of any tensor or of a whole entry, means constant, which
            costs nothing.

    Returns:
        The pair ``(out, out_dot)``. ``out`` is what ``func`` returned: a tensor or a tuple, list,
        dict, named tuple or dataclass of tensors. ``out_dot`` has the same structure; it is zero
        where an output does not depend on the primals, and None in place of what is not a
        floating-point tensor.

    Raises:
        TangentError: If a value would silently lose its tangent, or has no derivative rule; the
            message names the function. Also if passes are nested.
        TypeError: If the arguments do not match each other in number, structure or type.
        ValueError: If a tangent has another shape than its primal.
    """
    if not isinstance(primals, tuple | list) or not isinstance(tangents, tuple | list):
        raise TypeError(
            "dual.jvp expects a tuple of primals and a tuple of tangents, got "
            f"{type(primals).__name__} and {type(tangents).__name__}"
        )
    if len(primals) != len(tangents):
        raise TypeError(
            f"dual.jvp got {len(primals)} primals and {len(tangents)} tangents; give one for "
            "each, None for a constant"
        )
    if STATE.members is not None:
        raise TangentError(
            "dual.jvp was called inside another dual.jvp. It computes first derivatives only; "
            "use torch.func.jvp for nested ones."
        )
    if "torch._dynamo" not in sys.modules:
        return _run(func, primals, tangents)
    if not _BESIDE_THE_COMPILER:
        _BESIDE_THE_COMPILER.append(torch.compiler.disable(_run_eagerly))  # type: ignore[no-untyped-call]
    return _BESIDE_THE_COMPILER[0](func, primals, tangents)


def _run(func: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    members = STATE.members = []
    try:
        with interception():
            inputs = [
                _enter(primal, tangent, f"primals[{i}]")
                for i, (primal, tangent) in enumerate(zip(primals, tangents, strict=True))
            ]
            result = func(*inputs)
            return _map(_value, result), _map(_derivative, result)
    finally:
        STATE.members = None
        spend(members)


def _run_eagerly(*args: Any) -> Any:
    with torch.compiler.set_stance("force_eager"):
        return _run(*args)


def _value(leaf: Any) -> Any:
    return leaf._primal if isinstance(leaf, DualTensor) else leaf


def _derivative(leaf: Any) -> Any:
    if isinstance(leaf, DualTensor):
        return leaf._tangent
    if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
        return torch.zeros_like(leaf, requires_grad=False)
    return None


def _enter(primal: Any, tangent: Any, where: str) -> Any:
    """Join one argument with its tangent, going down into containers."""
    if tangent is None:
        return primal
    if isinstance(primal, Tensor):
        _check(primal, tangent, where)
        return make_dual(primal, tangent.detach())
    if dataclasses.is_dataclass(primal) and not isinstance(primal, type):
        names = [field.name for field in dataclasses.fields(primal)]
        if type(tangent) is not type(primal):
            raise TypeError(f"{where} is a {type(primal).__name__}, its tangent a {tangent!r}")
        return _rebuilt(
            primal,
            {n: _enter(getattr(primal, n), getattr(tangent, n), f"{where}.{n}") for n in names},
        )
    if isinstance(primal, dict) and isinstance(tangent, dict) and primal.keys() == tangent.keys():
        entries = copy.copy(primal)
        for key in primal:
            entries[key] = _enter(primal[key], tangent[key], f"{where}[{key!r}]")
        return entries
    if (
        isinstance(primal, tuple | list)
        and isinstance(tangent, tuple | list)
        and len(primal) == len(tangent)
    ):
        items = [
            _enter(p, t, f"{where}[{i}]")
            for i, (p, t) in enumerate(zip(primal, tangent, strict=True))
        ]
        return type(primal)(*items) if hasattr(primal, "_fields") else type(primal)(items)
    raise TypeError(
        f"{where} is a {type(primal).__name__} and its tangent a {type(tangent).__name__}; "
        "expected tensors or containers of the same structure, or None for a constant"
    )


def _check(primal: Tensor, tangent: Any, where: str) -> None:
    if isinstance(primal, DualTensor) or isinstance(tangent, DualTensor):
        raise TangentError(f"{where} comes from a dual.jvp pass that is over")
    if not isinstance(tangent, Tensor):
        raise TypeError(f"{where} is a tensor; its tangent is a {type(tangent).__name__}")
    if not (primal.is_floating_point() or primal.is_complex()):
        raise TypeError(f"{where} has dtype {primal.dtype}, which has no tangent; pass None for it")
    if tangent.shape != primal.shape:
        raise ValueError(
            f"{where} has shape {tuple(primal.shape)}, its tangent {tuple(tangent.shape)}"
        )
    if tangent.dtype != primal.dtype or tangent.device != primal.device:
        raise TypeError(
            f"{where} is {primal.dtype} on {primal.device}, its tangent {tangent.dtype} on "
            f"{tangent.device}; they must agree"
        )


def _map(leaf_function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to the leaves of containers, among them any dataclass."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree)]
        return _rebuilt(tree, {n: _map(leaf_function, getattr(tree, n)) for n in names})
    return pytree.tree_map(
        lambda leaf: _map(leaf_function, leaf) if _is_dataclass(leaf) else leaf_function(leaf),
        tree,
        is_leaf=_is_dataclass,
    )


def _is_dataclass(tree: Any) -> bool:
    return dataclasses.is_dataclass(tree) and not isinstance(tree, type)


def _rebuilt(instance: Any, fields: dict[str, Any]) -> Any:
    # Neither __init__ nor __post_init__ runs: they may check or change what is only carried here.
    clone = copy.copy(instance)
    for name, value in fields.items():
        object.__setattr__(clone, name, value)
    return clone
