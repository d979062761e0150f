# SPDX-License-Identifier: Apache-2.0
"""Launchers of the C++ CPU kernels of attention."""

import os

import torch
from torch import Tensor

from disca_kernels import _ext
from disca_kernels.operands import address, contiguous_rows, dtype_name

Primals = tuple[Tensor, Tensor, Tensor]
Tangents = tuple[Tensor | None, Tensor | None, Tensor | None]
Operand = tuple[int, int, int, int]
"""Address and strides of the first three dimensions of [B, H, N, D], in elements."""
Problem = tuple[tuple[int, ...], int, float, str, int]


def isas() -> list[str]:
    """Return the instruction sets that this build and this processor have, the widest first."""
    names: list[str] = _ext.load().attention_cpu_isas()
    return names


def _isa() -> str:
    """Return the instruction set that `DISCA_CPU_ISA` asks for, "" for the widest."""
    name = os.environ.get("DISCA_CPU_ISA", "")
    if name and name not in isas():
        raise ValueError(f"DISCA_CPU_ISA must be one of {', '.join(isas())} here, got {name!r}")
    return name


def _operand(x: Tensor) -> Operand:
    return (x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def _optional(x: Tensor | None) -> Operand | None:
    return None if x is None else _operand(x)


def _lengths(kv_lengths: Tensor | None) -> Tensor | None:
    """Return the lengths as C++ reads them."""
    return None if kv_lengths is None else kv_lengths.to("cpu", torch.int64).contiguous()


def _problem(q: Tensor, k: Tensor, kv_lengths: Tensor | None, block: int, scale: float) -> Problem:
    """Describe a call; `kv_lengths` must outlive it."""
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    return sizes, block, scale, dtype_name(q), address(kv_lengths)


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else contiguous_rows(x)


def _statistic(q: Tensor) -> Tensor:
    """Return room for a float32 number a row of queries."""
    return torch.empty(q.shape[:3], dtype=torch.float32)


def launch_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lengths: Tensor | None,
    block: int,
    scale: float,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return o of [B, H, Nq, D], the float32 lse of [B, H, Nq], and what o lost to rounding.

    The last is None unless `wide` and o has two bytes an element; it has the dtype of o.
    """
    q, k, v = (contiguous_rows(x) for x in (q, k, v))
    kv_lengths = _lengths(kv_lengths)
    o, lse = torch.empty(q.shape, dtype=q.dtype), _statistic(q)
    rest = torch.empty_like(o) if wide and o.element_size() == 2 else None
    _ext.load().attention_fwd_cpu(
        problem=_problem(q, k, kv_lengths, block, scale),
        primals=(_operand(q), _operand(k), _operand(v)),
        outputs=(o.data_ptr(), lse.data_ptr(), address(rest)),
        isa=_isa(),
        threads=torch.get_num_threads(),
    )
    return o, lse, rest


def launch_bwd(
    do: Tensor,
    dlse: Tensor | None,
    primals: Primals,
    o: Tensor,
    lse: Tensor,
    kv_lengths: Tensor | None,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, recomputing P from lse; the same bits on any number of threads."""
    q, k, v = (contiguous_rows(x) for x in primals)
    do, o, lse = contiguous_rows(do), contiguous_rows(o), lse.contiguous()
    dlse = None if dlse is None else dlse.to(torch.float32).contiguous()
    kv_lengths = _lengths(kv_lengths)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    if not dq.numel():
        return dq, dk.zero_(), dv.zero_()
    _ext.load().attention_bwd_cpu(
        problem=_problem(q, k, kv_lengths, block, scale),
        d_o=_operand(do),
        primals=(_operand(q), _operand(k), _operand(v)),
        known=(_operand(o), lse.data_ptr(), address(dlse)),
        outputs=(dq.data_ptr(), dk.data_ptr(), dv.data_ptr()),
        isa=_isa(),
        threads=torch.get_num_threads(),
    )
    return dq, dk, dv


def launch_jvp(
    primals: Primals,
    tangents: Tangents,
    kv_lengths: Tensor | None,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o, lse, o_dot and lse_dot from one pass over the keys."""
    # The names keep copies alive while the kernel reads them.
    q, k, v = (contiguous_rows(x) for x in primals)
    q_dot, k_dot, v_dot = (_rows(x) for x in tangents)
    kv_lengths = _lengths(kv_lengths)
    o, o_dot = (torch.empty(q.shape, dtype=q.dtype) for _ in range(2))
    lse, lse_dot = _statistic(q), _statistic(q)
    _ext.load().attention_jvp_cpu(
        problem=_problem(q, k, kv_lengths, block, scale),
        primals=(_operand(q), _operand(k), _operand(v)),
        tangents=(_optional(q_dot), _optional(k_dot), _optional(v_dot)),
        outputs=(o.data_ptr(), lse.data_ptr(), o_dot.data_ptr(), lse_dot.data_ptr()),
        isa=_isa(),
        threads=torch.get_num_threads(),
    )
    return o, lse, o_dot, lse_dot


def launch_tangent(
    primals: Primals,
    tangents: Tangents,
    o: Tensor,
    rest: Tensor | None,
    lse: Tensor,
    kv_lengths: Tensor | None,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return o_dot and lse_dot, given o, lse and what o lost to rounding, if that is known.

    An o of two bytes without it is not accurate enough to be subtracted; the value is then computed
    again beside the tangent.
    """
    moving_scores = tangents[0] is not None or tangents[1] is not None
    if moving_scores and rest is None and o.element_size() == 2:
        return launch_jvp(primals, tangents, kv_lengths, block, scale)[2:]
    q, k, v = (contiguous_rows(x) for x in primals)
    q_dot, k_dot, v_dot = (_rows(x) for x in tangents)
    o, rest, lse = contiguous_rows(o), _rows(rest), lse.contiguous()
    kv_lengths = _lengths(kv_lengths)
    o_dot, lse_dot = torch.empty(q.shape, dtype=q.dtype), _statistic(q)
    _ext.load().attention_tangent_cpu(
        problem=_problem(q, k, kv_lengths, block, scale),
        primals=(_operand(q), _operand(k), _operand(v)),
        tangents=(_optional(q_dot), _optional(k_dot), _optional(v_dot)),
        known=(_operand(o), _optional(rest), lse.data_ptr()),
        outputs=(o_dot.data_ptr(), lse_dot.data_ptr()),
        isa=_isa(),
        threads=torch.get_num_threads(),
    )
    return o_dot, lse_dot
