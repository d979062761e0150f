# SPDX-License-Identifier: Apache-2.0
"""What operations need to know about forward-mode AD so that no tangent is lost without a word."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    maybe_get_level,
)
from torch.autograd import forward_ad


def active() -> bool:
    """Return whether tensors may carry tangents now: inside `dual_level` or `torch.func.jvp`."""
    level: int = forward_ad._current_level
    return level >= 0


def opaque_to_compile(function: Callable[..., Any]) -> Callable[[], None]:
    """Return a call that makes `torch.compile` put `function` into its graph without tracing it.

    Tracing drops the `jvp` of an autograd Function silently; what is put into the graph as it is
    keeps it. `torch.compiler.allow_in_graph` says so, but loading the compiler takes seconds, so
    the returned call does nothing except while a compiler is tracing the caller.

    Raises (the returned call):
        NotImplementedError: the compiler was called inside `forward_ad.dual_level`.
    """

    def register(in_forward_mode: bool) -> bool:
        if in_forward_mode and not _forward_levels():
            raise _refusal_to_compile()
        torch.compiler.allow_in_graph(function)  # type: ignore[no-untyped-call]
        return True

    # What torch.compiler.assume_constant_result sets: run this while tracing, do not trace it.
    register._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def prepare() -> None:
        if torch.compiler.is_compiling():
            # The compiler sees what is read here, so that code that was compiled outside forward
            # mode is not reused inside.
            register(active())

    return prepare


def _refusal_to_compile() -> Exception:
    """Make a NotImplementedError that the compiler reports instead of falling back quietly."""
    from torch._dynamo.exc import TorchRuntimeError

    class LostTangentError(TorchRuntimeError, NotImplementedError):
        """Compiled code would drop a tangent."""

    return LostTangentError(
        "torch.compile inside forward_ad.dual_level: compiled code drops the tangents of its "
        "inputs. Compile a function that contains the torch.func.jvp instead"
    )


def _jvp_levels(tensor: Tensor) -> set[int]:
    """Return the levels of `torch.func.jvp` that track a tensor."""
    levels = set()
    while is_functorch_wrapped_tensor(tensor):
        levels.add(maybe_get_level(tensor))
        tensor = get_unwrapped(tensor)
    return levels & _forward_levels()


def _forward_levels() -> set[int]:
    """Return the levels of the `torch.func.jvp` calls that are being evaluated."""
    return {i.level() for i in get_interpreter_stack() or [] if i.key() == TransformType.Jvp}


def _is_dual(tensor: Tensor) -> bool:
    """Return whether a tensor carries a tangent of `forward_ad.dual_level`."""
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def refuse_second_tangent(op: str, *tensors: Tensor | None) -> None:
    """Raise in a Function's `jvp` if an outer `torch.func.jvp` tracks one of its tensors.

    PyTorch would take the tangent's own tangent for zero.

    Raises:
        NotImplementedError: a tensor is tracked by more than the innermost `jvp`.
    """
    outer = _forward_levels()
    outer.discard(max(outer, default=0))
    if any(_jvp_levels(t) & outer for t in tensors if t is not None):
        raise NotImplementedError(
            f"{op}: its tangent cannot be differentiated in forward mode again (jvp of jvp): the "
            f"second tangent would silently be zero. {op}_reference is differentiable any number "
            "of times"
        )


def refuse_tangents(message: str, *tensors: Tensor | None) -> None:
    """Raise if a tensor carries a tangent that what comes next would lose.

    Args:
        message: what is not possible and what would work.
        *tensors: what an operation without a forward-mode rule is about to get.

    Raises:
        NotImplementedError: with `message`.
    """
    if active() and any(_jvp_levels(t) or _is_dual(t) for t in tensors if t is not None):
        raise NotImplementedError(message)
