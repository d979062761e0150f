# SPDX-License-Identifier: Apache-2.0
"""Public `attention`, `attention_jvp` and `attention_tangent`: contract and choice of backend."""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from disca_kernels.backend import Backend, limit, resolve, unprofitable
from disca_kernels.ops.attention import checks, function
from disca_kernels.ops.attention.checks import OP
from disca_kernels.ops.attention.primal import OWN
from disca_kernels.validation import check_operands, check_tangents

_NAMES = ("q", "k", "v")
_KERNEL_MAX_HEAD_DIM = 256
_CPU_MIN_SCORES = 128 * 128
"""Scores per head from which the C++ kernels beat two matrix products and a softmax."""

Primals = tuple[Tensor, Tensor, Tensor]
Tangents = tuple[Tensor | None, Tensor | None, Tensor | None]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    block_causal: int | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    primal: str = "own",
    backend: str | Backend = "auto",
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    block_causal: int | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    primal: str = "own",
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    block_causal: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    primal: str = "own",
    backend: str | Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute softmax attention, `o = softmax(scale * q @ k^T) @ v`, for each sample and head.

    The softmax runs over the keys that a query sees; a query that sees none gives 0, with zero
    gradient and tangent, never NaN. Keys beyond a sample's length have no influence, whatever they
    hold. Scores, softmax and sums are in float32 (float64 inputs: in float64), kernels round the
    operands of a matrix product to the dtype of the inputs, and o is rounded once, when it is
    stored. Under `torch.autocast` the operands are cast as `scaled_dot_product_attention` casts
    them.

    Differentiable in reverse mode on every backend, and in forward mode (`torch.func.jvp`,
    `forward_ad.dual_level`), where PyTorch's own fast attention is not, with a detached tangent.
    With `backend="eager"` outside forward mode it is plain PyTorch.

    Args:
        q: [B, H, Nq, D] queries, float32, bfloat16, float16 or float64 (float64 only on eager). Any
            strides.
        k: [B, Hk, Nk, D] keys. H is a multiple of Hk (grouped heads): query head h reads key head
            h // (H // Hk).
        v: [B, Hk, Nk, D] values.
        kv_lengths: [B] integers, the number of valid keys of each sample, 0 .. Nk; the others,
            at the end, are not seen. None: all are valid. The range is checked only on a CPU;
            elsewhere a length is clamped to it.
        causal: query i sees only keys j <= i + Nk - Nq, so that the last query sees every key
            whatever the lengths (PyTorch aligns the first query instead).
        block_causal: tokens per block (of a chunk of frames, say) of a block-causal mask: query i
            sees all keys of its own block and of those before it,
            j < (floor((i + Nk - Nq) / block_causal) + 1) * block_causal. `causal` is a block of 1.
        scale: factor of the scores, `1 / sqrt(D)` by default.
        return_lse: whether to return the log-sum-exp of the scores, which is differentiable too.
        primal: what computes the value: "own", the kernel of the backend, or another library's
            attention beneath this one's backward and tangent: "sdpa" (PyTorch), "flash_attn" or
            "flash_attn_3". Those take no key lengths and no block-causal mask.
        backend: "auto", "triton", "cpu", "cuda" or "eager"; see `disca_kernels.backend`.

    Returns:
        o [B, H, Nq, D] in the dtype of q; with `return_lse` (o, lse), lse [B, H, Nq] in float32
        (float64 inputs: float64), the natural logarithm of the sum of exp over the visible scores,
        minus infinity if there are none.

    Raises:
        ValueError: wrong rank, shape, device, block or scale, or a length outside 0 .. Nk.
        TypeError: wrong or mixed dtypes, or not a tensor.
        BackendError: the backend or the primal that was asked for cannot run this call.
    """
    if has_torch_function((q, k, v)):
        one_or_two: Tensor | tuple[Tensor, Tensor] = handle_torch_function(
            attention,  # type: ignore[arg-type]
            (q, k, v), q, k, v, kv_lengths=kv_lengths, causal=causal,
            block_causal=block_causal, scale=scale, return_lse=return_lse, primal=primal,
            backend=backend,
        )  # fmt: skip
        return one_or_two
    q, k, v = primals = _autocast(q, k, v)
    options = checks.check_call(primals, kv_lengths, causal, block_causal, scale, return_lse)
    # Beneath another attention's value there have to be kernels, fast or not.
    chosen = resolve(OP, backend, q, k, v, kv_lengths, profitable=primal == OWN)
    checks.check_primal(primal, primals, options, chosen)
    o, lse = function.value(primals, options, return_lse, primal, chosen)
    if not return_lse:
        return o
    assert lse is not None
    return o, lse


@overload
def attention_jvp(
    primals: Primals,
    tangents: Tangents,
    *,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    block_causal: int | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def attention_jvp(
    primals: Primals,
    tangents: Tangents,
    *,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    block_causal: int | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


def attention_jvp(
    primals: Primals,
    tangents: Tangents,
    *,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    block_causal: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | Backend = "auto",
) -> tuple[Tensor, ...]:
    """Compute `attention` and its directional derivative in one pass.

    With P the softmax, S_dot = scale * (q_dot k^T + q k_dot^T) and c = rowsum(P * S_dot),

        o_dot = (P * (S_dot - c)) v + P v_dot        lse_dot = c

    The row mean c is subtracted from the scores' tangent before it is rounded and multiplied, so
    the error does not grow with a drift that all keys have in common; the usual form, which
    subtracts c * o at the end, cancels in half precision (docs/ops/attention.md).

    The values are tracked by autograd; the tangents are not, and nothing of them is kept.

    Args:
        primals: `(q, k, v)` as in `attention`.
        tangents: `(q_dot, k_dot, v_dot)`, each of the shape and dtype of its primal; None stands
            for zero and costs nothing.
        kv_lengths: as in `attention`.
        causal: as in `attention`.
        block_causal: as in `attention`.
        scale: as in `attention`.
        return_lse: whether to return the log-sum-exp of the scores and its tangent too.
        backend: as in `attention`.

    Returns:
        `(o, o_dot)`, both [B, H, Nq, D] in the dtype of q; with `return_lse`
        `(o, o_dot, lse, lse_dot)`, lse as in `attention`.

    Raises:
        ValueError: as `attention`, or a tangent of another shape or device.
        TypeError: as `attention`, or a tangent of another dtype.
        BackendError: the backend that was asked for cannot run this call.
        NotImplementedError: an operand carries a tangent of forward-mode AD itself.
    """
    check_operands(OP, "q, k, v", primals, tangents)
    relevant: tuple[Any, ...] = (*primals, *tangents)
    if has_torch_function(relevant):
        results: tuple[Tensor, ...] = handle_torch_function(
            attention_jvp,  # type: ignore[arg-type]
            relevant, primals, tangents, kv_lengths=kv_lengths, causal=causal,
            block_causal=block_causal, scale=scale, return_lse=return_lse, backend=backend,
        )  # fmt: skip
        return results
    primals, tangents = _autocast(*primals), _autocast(*tangents)
    options = checks.check_call(primals, kv_lengths, causal, block_causal, scale, return_lse)
    check_tangents(OP, _NAMES, primals, tangents)
    chosen = resolve(OP, backend, *primals, kv_lengths, *tangents)
    o, lse, o_dot, lse_dot = function.value_and_tangent(
        primals, tangents, options, return_lse, chosen
    )
    if not return_lse:
        return o, o_dot
    assert lse is not None
    return o, o_dot, lse, lse_dot


def attention_tangent(
    primals: Primals,
    tangents: Tangents,
    o: Tensor,
    lse: Tensor,
    *,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    block_causal: int | None = None,
    scale: float | None = None,
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the tangent alone, on top of any attention that computed the value.

    One matrix product less than `attention_jvp`, no online softmax and one accumulator: P comes
    from the known log-sum-exp. The scores' tangent is centred here too (docs/ops/attention.md).

    Args:
        primals: `(q, k, v)` as in `attention`.
        tangents: `(q_dot, k_dot, v_dot)` as in `attention_jvp`.
        o: [B, H, Nq, D] what attention gave for the primals, in their dtype.
        lse: [B, H, Nq] float32 natural log-sum-exp of its scores, as flash-attn and PyTorch's
            fused attention return it; it must belong to the same mask and scale.
        kv_lengths: as in `attention`.
        causal: as in `attention`.
        block_causal: as in `attention`.
        scale: as in `attention`.
        backend: as in `attention`.

    Returns:
        `(o_dot, lse_dot)`, [B, H, Nq, D] in the dtype of q and [B, H, Nq]; both without a graph.

    Raises:
        ValueError: as `attention_jvp`, or o or lse of another shape or device.
        TypeError: as `attention_jvp`, or o or lse of another dtype.
        BackendError: the backend that was asked for cannot run this call.
        NotImplementedError: an operand carries a tangent of forward-mode AD itself.
    """
    check_operands(OP, "q, k, v", primals, tangents)
    relevant: tuple[Any, ...] = (*primals, *tangents, o, lse)
    if has_torch_function(relevant):
        pair: tuple[Tensor, Tensor] = handle_torch_function(
            attention_tangent, relevant, primals, tangents, o, lse, kv_lengths=kv_lengths,
            causal=causal, block_causal=block_causal, scale=scale, backend=backend,
        )  # fmt: skip
        return pair
    primals, tangents, (o,) = _autocast(*primals), _autocast(*tangents), _autocast(o)
    options = checks.check_call(primals, kv_lengths, causal, block_causal, scale)
    check_tangents(OP, _NAMES, primals, tangents)
    checks.check_value(primals[0], o, lse)
    chosen = resolve(OP, backend, *primals, kv_lengths, *tangents)
    return function.tangent(primals, tangents, o, lse, options, chosen)


def _autocast(*operands: Any) -> Any:
    """Cast as autocast does for PyTorch's attention: floating point, except float64."""
    device = next((x.device.type for x in operands if isinstance(x, Tensor)), "cpu")
    if device == "meta" or not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in operands
    )


@limit(OP, Backend.CPU)
@limit(OP, Backend.TRITON)
def _kernel_limits(q: Tensor, *_: Tensor | None) -> list[str]:
    """Return what keeps the kernels from these shapes."""
    if q.shape[-1] <= _KERNEL_MAX_HEAD_DIM:
        return []
    return [f"head dimension {q.shape[-1]} is above {_KERNEL_MAX_HEAD_DIM}"]


@unprofitable(OP, Backend.CPU)
def _cpu_costs(q: Tensor, k: Tensor | None = None, *_: Tensor | None) -> list[str]:
    """Return why eager is faster with these shapes."""
    if k is None or q.shape[-2] * k.shape[-2] >= _CPU_MIN_SCORES:
        return []
    return [f"{q.shape[-2]} x {k.shape[-2]} scores per head are few: eager is faster"]


@limit(OP, Backend.CUDA)
def _cuda_limits(*operands: Any) -> list[str]:
    """Return what keeps the Hopper kernel from these operands."""
    from disca_kernels.ops.attention import cuda

    return cuda.reasons(*operands)
