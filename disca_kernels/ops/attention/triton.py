# SPDX-License-Identifier: Apache-2.0
"""Launchers of attention's Triton kernels.

The kernels take an operand as a tensor descriptor where the device has them and all operands'
strides allow it, as a pointer with strides otherwise (triton_blocks.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from disca_kernels.ops.attention.layout import dense, paired, rows, strides
from disca_kernels.ops.attention.tiles import Tile, padded_dim, tiles
from disca_kernels.ops.attention.triton_backward import (
    _attention_bwd_kernel_dkdv,
    _attention_bwd_kernel_dq,
)
from disca_kernels.ops.attention.triton_forward import _attention_fwd_kernel
from disca_kernels.ops.attention.triton_jvp import _attention_jvp_kernel
from disca_kernels.ops.attention.triton_tangent import _attention_tangent_kernel
from disca_kernels.testing.interpreter import prepare_interpreter
from disca_kernels.triton_common.descriptors import (
    capability,
    descriptor_strides,
    has_descriptors,
)

prepare_interpreter()

Primals = tuple[Tensor, Tensor, Tensor]
Tangents = tuple[Tensor | None, Tensor | None, Tensor | None]


def _described(tensors: Sequence[Tensor | None]) -> list[list[int]] | None:
    """Return the descriptor strides of each tensor, none for an absent one; None means pointers."""
    if not has_descriptors(capability(tensors[0].device), tensors[0].element_size()):
        return None
    found = [[] if x is None else descriptor_strides(x) for x in tensors]
    return None if any(f is None for f in found) else found


def _operands(
    tensors: Sequence[Tensor | None], axes: str, kernel: str
) -> tuple[list[Any], Tile, bool]:
    """Return operands as a kernel takes them, its tile, and whether they are descriptors.

    `axes` says of each tensor whether its rows are queries, "m", or keys, "n".
    """
    q = tensors[0]
    described = _described(tensors)
    tile = getattr(tiles(q.device, q.shape[-1], q.element_size(), described is not None), kernel)
    if described is None:
        return list(tensors), tile, False
    height = {"m": tile.block_m, "n": tile.block_n}
    block_d = padded_dim(q.shape[-1])
    return (
        [
            None
            if x is None
            else TensorDescriptor(x, list(x.shape), steps, [1, 1, height[axis], block_d])
            for x, axis, steps in zip(tensors, axes, described, strict=True)
        ],
        tile,
        True,
    )


def _aligned(primals: Primals, tangents: Tangents) -> tuple[Tensor | None, ...]:
    """Return primals and tangents with contiguous rows, in pairs of equal strides for pointers."""
    primals = tuple(map(rows, primals))
    tangents = tuple(None if x is None else rows(x) for x in tangents)
    if _described((*primals, *tangents)) is None:
        primals, tangents = zip(*map(paired, primals, tangents), strict=True)
    return (*primals, *tangents)


def _sizes(q: Tensor, k: Tensor, block: int, scale: float) -> tuple[int | float, ...]:
    """Return the run-time numbers that every kernel takes last."""
    # Beyond Nk a wider block of causality changes nothing, and could overflow.
    block = min(block, max(k.shape[2], 1))
    group = q.shape[1] // max(k.shape[1], 1)
    return q.shape[1], group, q.shape[2], k.shape[2], block, scale


def _constants(tile: Tile, head_dim: int, block: int, tma: bool) -> dict[str, int | bool]:
    return {
        "D": head_dim,
        "BLOCK_D": padded_dim(head_dim),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "CAUSAL": block > 0,
        "TMA": tma,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        # The exponent's multiplication and subtraction are one instruction, in every version.
        "enable_fp_fusion": True,
    }


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _per_row(q: Tensor) -> Tensor:
    return torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def launch_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lengths: Tensor | None,
    block: int,
    scale: float,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return o [B, H, Nq, D], the float32 log-sum-exp [B, H, Nq], and what o lost to rounding.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hk, Nk, D]; H is a multiple of Hk.
        v: [B, Hk, Nk, D].
        kv_lengths: [B] integers, clamped to 0 .. Nk, or None.
        block: 0, or the tokens per block of a block-causal rule.
        scale: factor of the scores.
        wide: whether to return o's rounding error too, in o's dtype; None for float32.
    """
    q, k, v = rows(q), rows(k), rows(v)
    o, lse = _like(q), _per_row(q)
    rest = _like(q) if wide and q.element_size() == 2 else None
    if o.numel():
        operands, tile, tma = _operands((q, k, v), "mnn", "fwd")
        _attention_fwd_kernel[(triton.cdiv(q.shape[2], tile.block_m) * q.shape[0] * q.shape[1],)](
            *operands, o, rest, lse, dense(kv_lengths),
            *strides(q, k, v), *_sizes(q, k, block, scale),
            NEGATIVE=scale < 0, **_constants(tile, q.shape[3], block, tma),
        )  # fmt: skip
    return o, lse, rest


def launch_jvp(
    primals: Primals, tangents: Tangents, kv_lengths: Tensor | None, block: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o, lse, o_dot and lse_dot from one pass over the keys; arguments as `launch_fwd`.

    A tangent has the shape and dtype of its primal; None stands for zero and costs nothing.
    """
    q, k, v, *dots = _aligned(primals, tangents)
    o, lse, o_dot, lse_dot = _like(q), _per_row(q), _like(q), _per_row(q)
    if o.numel():
        operands, tile, tma = _operands((q, k, v, *dots), "mnnmnn", "jvp")
        _attention_jvp_kernel[(triton.cdiv(q.shape[2], tile.block_m) * q.shape[0] * q.shape[1],)](
            *operands, o, lse, o_dot, lse_dot, dense(kv_lengths),
            *strides(q, k, v), *_sizes(q, k, block, scale),
            NEGATIVE=scale < 0, **_constants(tile, q.shape[3], block, tma),
        )  # fmt: skip
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
    """Return o_dot and lse_dot, given what `launch_fwd` or any other attention computed.

    Without `rest`, half-precision o counts as rounded, and a tile is repeated for that alone if
    its rounding could show in o_dot.
    """
    q, k, v, *dots = _aligned(primals, tangents)
    o_dot, lse_dot = _like(q), _per_row(q)
    if o_dot.numel():
        tensors = (q, k, v, *dots, dense(o), dense(rest))
        operands, tile, tma = _operands(tensors, "mnnmnnmm", "tangent")
        grid = (triton.cdiv(q.shape[2], tile.block_m) * q.shape[0] * q.shape[1],)
        _attention_tangent_kernel[grid](
            *operands, dense(lse), o_dot, lse_dot, dense(kv_lengths),
            *strides(q, k, v), *_sizes(q, k, block, scale),
            EXACT_O=rest is not None or o.element_size() > 2,
            **_constants(tile, q.shape[3], block, tma),
        )  # fmt: skip
    return o_dot, lse_dot


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
    """Return dq, dk and dv, recomputing P from the log-sum-exp; dk and dv sum over the group."""
    q, k, v, do = *map(rows, primals), rows(do)
    o, lse, dlse, kv_lengths = dense(o), dense(lse), dense(dlse), dense(kv_lengths)
    dq, dk, dv = _like(q), _like(k), _like(v)
    if not dq.numel():
        return dq, dk.zero_(), dv.zero_()
    numbers = (*strides(q, k, v, do), *_sizes(q, k, block, scale))
    operands, tile, tma = _operands((q, k, v, do), "mnnm", "dq")
    padded = triton.cdiv(q.shape[2], tile.block_m) * tile.block_m
    per_row = torch.empty((2, *q.shape[:2], padded), dtype=torch.float32, device=q.device)
    delta_offset = per_row[0].numel()
    grid = (triton.cdiv(q.shape[2], tile.block_m) * q.shape[0] * q.shape[1],)
    _attention_bwd_kernel_dq[grid](
        *operands, o, lse, dlse, dq, per_row, kv_lengths, *numbers,
        **_constants(tile, q.shape[3], block, tma),
    )  # fmt: skip
    if dk.numel():
        operands, tile, tma = _operands((q, k, v, do), "mnnm", "dkdv")
        if tma:
            per_row = TensorDescriptor.from_tensor(per_row.flatten(1, 2), [1, 1, tile.block_m])
        grid = (triton.cdiv(k.shape[2], tile.block_n) * k.shape[0] * k.shape[1],)
        _attention_bwd_kernel_dkdv[grid](
            *operands, per_row, dk, dv, kv_lengths,
            *numbers, padded, delta_offset,
            **_constants(tile, q.shape[3], block, tma),
        )  # fmt: skip
    return dq, dk, dv
