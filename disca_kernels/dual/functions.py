# SPDX-License-Identifier: Apache-2.0
"""``torch.autograd.Function`` during a pass.

``Function.apply`` is the one public entry of PyTorch that ``__torch_function__`` cannot see: it
would run ``forward`` on duals with gradients off and so cut the value from autograd. While a pass
runs, a version that looks for duals stands before PyTorch's own, in a place that also serves
code which took ``MyFunction.apply`` long before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import Function, _SingleLevelFunction
from torch.nn.modules._functions import BackwardHookFunction

from disca_kernels.dual.fallback import call_through_func_jvp, trusted
from disca_kernels.dual.tensor import HANDLERS, TangentError, has_dual, make_dual, primals_of, split

_lock = threading.Lock()
_passes = 0


@contextmanager
def interception() -> Iterator[None]:
    """Let ``Function.apply`` see duals while at least one pass runs."""
    global _passes
    with _lock:
        _passes += 1
        if _passes == 1:
            _SingleLevelFunction.apply = classmethod(_apply)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with _lock:
            _passes -= 1
            if _passes == 0:
                del _SingleLevelFunction.apply  # type: ignore[attr-defined]


def _apply(cls: Any, *args: Any) -> Any:
    if not has_dual(args):
        with trusted():
            return super(_SingleLevelFunction, cls).apply(*args)
    handler = HANDLERS.get(cls)
    if handler is not None:
        return handler(cls.apply, args, {})
    if not (_overrides(cls, "jvp") and _overrides(cls, "setup_context")):
        hint = (
            " Pass use_reentrant=False to torch.utils.checkpoint."
            if cls is torch.utils.checkpoint.CheckpointFunction
            else ""
        )
        raise TangentError(
            f"{cls.__module__}.{cls.__qualname__}.apply met a tensor that carries a tangent, but "
            "it has no jvp with a separate setup_context. Add both, or register a rule with "
            f"dual.rule({cls.__qualname__}).{hint}"
        )
    return call_through_func_jvp(cls.apply, args, {})


def _overrides(cls: Any, name: str) -> bool:
    return getattr(cls, name) is not getattr(Function, name)


def pass_through(plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Identity functions that only watch the backward pass keep the tangents as they are."""
    outs = plain(*primals_of(args), **primals_of(kwargs))
    dots = [split(arg)[1] for arg in args if isinstance(arg, torch.Tensor)]
    if isinstance(outs, torch.Tensor):
        return outs if dots[0] is None else make_dual(outs, dots[0])
    return tuple(
        out if dot is None else make_dual(out, dot) for out, dot in zip(outs, dots, strict=True)
    )


HANDLERS[BackwardHookFunction] = pass_through
