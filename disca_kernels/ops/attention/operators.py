# SPDX-License-Identifier: Apache-2.0
"""Operators that run the kernels of attention.

A kernel runs inside a `torch.library` operator, which `torch.compile` and `torch.func` transforms
know how to call. Such an operator has no forward mode and loses a tangent without a word, so it
is called only by the rules of a Function (`function.py`), and those refuse a tangent that it would
lose. `block` is the number of tokens per block of the causal mask, 0 without one.
"""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from disca_kernels.backend import Backend
from disca_kernels.batching import folding_rule
from disca_kernels.operands import resolved
from disca_kernels.ops.attention import primal as primals


def _launchers(backend: str, fused: bool = False) -> ModuleType:
    """Import the module whose kernels `backend` names; only now, since it may load a compiler.

    "cuda" has a kernel for value and tangent together, `fused`; the rest is Triton's.
    """
    room = "triton" if backend == Backend.CUDA and not fused else backend
    return import_module(f"disca_kernels.ops.attention.{room}")


def _resolved(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.resolve_neg() for x in tensors)


@torch.library.custom_op("disca_kernels::attention_fwd", mutates_args=())
def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lengths: Tensor | None,
    block: int,
    scale: float,
    wide: bool,
    primal: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute o, lse and, if `wide`, what o lost to rounding; without it an empty tensor."""
    rest = None
    q, k, v = _resolved(q, k, v)
    if primal == primals.OWN:
        launch = _launchers(backend).launch_fwd
        o, lse, rest = launch(q, k, v, kv_lengths, block, scale, wide)
    else:
        o, lse = primals.run(primal, q, k, v, block, scale)
    return o, lse, o.new_empty((*o.shape[:3], 0)) if rest is None else rest


@torch.library.custom_op("disca_kernels::attention_bwd", mutates_args=())
def bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    kv_lengths: Tensor | None,
    block: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk and dv."""
    launch = _launchers(backend).launch_bwd
    do, q, k, v = _resolved(do, q, k, v)
    dq, dk, dv = launch(do, dlse, (q, k, v), o, lse, kv_lengths, block, scale)
    return dq, dk, dv


@torch.library.custom_op("disca_kernels::attention_dual", mutates_args=())
def dual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    kv_lengths: Tensor | None,
    block: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute o, lse, o_dot and lse_dot in one pass."""
    launch = _launchers(backend, fused=True).launch_jvp
    dots = resolved((q_dot, k_dot, v_dot))
    o, lse, o_dot, lse_dot = launch(_resolved(q, k, v), dots, kv_lengths, block, scale)
    return o, lse, o_dot, lse_dot


@torch.library.custom_op("disca_kernels::attention_tangent", mutates_args=())
def tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    value: Sequence[Tensor],
    kv_lengths: Tensor | None,
    block: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Compute o_dot and lse_dot, given (o, lse) or (o, lse, rest); an empty rest counts as none."""
    o, lse, *more = value
    rest = more[0] if more and more[0].shape[-1] else None
    dots = resolved((q_dot, k_dot, v_dot))
    launch = _launchers(backend).launch_tangent
    q, k, v, o, lse = _resolved(q, k, v, o, lse)
    o_dot, lse_dot = launch((q, k, v), dots, o, rest, lse, kv_lengths, block, scale)
    return o_dot, lse_dot


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def lse_like(q: Tensor) -> Tensor:
    """Return an uninitialised log-sum-exp for queries [B, H, Nq, D]."""
    return torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


@fwd.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, lengths: Any, block: Any, scale: Any, wide: bool, primal: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kept = wide and primal == primals.OWN and q.element_size() == 2
    return _like(q), lse_like(q), _like(q) if kept else q.new_empty((*q.shape[:3], 0))


@bwd.register_fake
def _(do: Any, dlse: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _like(q), _like(k), _like(v)


@dual.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _like(q), lse_like(q), _like(q), lse_like(q)


@tangent.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _like(q), lse_like(q)


for _operator in (fwd, bwd, dual, tangent):
    _operator.register_vmap(folding_rule(_operator))
