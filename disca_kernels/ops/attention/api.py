# SPDX-License-Identifier: Apache-2.0
"""Public `attention` and `attention_jvp`: contract, validation, choice of backend."""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import handle_torch_function, has_torch_function

from disca_kernels.backend import Backend, limit, resolve
from disca_kernels.ops.attention import function
from disca_kernels.ops.attention.reference import resolve_scale
from disca_kernels.validation import check_operands, check_tangents

_OP = "attention"
_NAMES = ("q", "k", "v")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_TRITON_MAX_HEAD_DIM = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str | Backend = "auto",
) -> Tensor:
    """Compute softmax attention, `o = softmax(scale * q @ k^T) @ v`, for each sample and head.

    The softmax runs over the keys that a query sees; a query that sees none gives 0, with zero
    gradient and tangent, never NaN. Scores, softmax and sums are in float32 (float64 inputs: in
    float64), kernels round the operands of a matrix product to the dtype of the inputs, and o is
    rounded once, when it is stored. Under `torch.autocast` the operands are cast as
    `scaled_dot_product_attention` casts them.

    Differentiable in reverse mode on every backend, and in forward mode (`torch.func.jvp`,
    `forward_ad.dual_level`), where PyTorch's own fast attention is not, with a detached tangent.
    With `backend="eager"` outside forward mode it is plain PyTorch.

    Args:
        q: [B, H, Nq, D] queries, float32, bfloat16, float16 or float64 (float64 only on eager). Any
            strides.
        k: [B, H, Nk, D] keys.
        v: [B, H, Nk, D] values.
        kv_lengths: [B] integers, the number of valid keys of each sample, 0 .. Nk; the others,
            at the end, are not seen. None: all are valid. The range is checked only on a CPU;
            elsewhere a length is clamped to it.
        causal: query i sees only keys j <= i + Nk - Nq, so that the last query sees every key
            whatever the lengths (PyTorch aligns the first query instead).
        scale: factor of the scores, `1 / sqrt(D)` by default.
        backend: "auto", "triton" (D up to 256) or "eager"; see `disca_kernels.backend`.

    Returns:
        o [B, H, Nq, D] in the dtype of q.

    Raises:
        ValueError: wrong rank, shape or device, or a length outside 0 .. Nk.
        TypeError: wrong or mixed dtypes, or not a tensor.
        BackendError: the backend that was asked for cannot run this call.
    """
    if has_torch_function((q, k, v)):
        result: Tensor = handle_torch_function(
            attention, (q, k, v), q, k, v,
            kv_lengths=kv_lengths, causal=causal, scale=scale, backend=backend,
        )  # fmt: skip
        return result
    primals = _autocast(q, k, v)
    _check_primals(primals, kv_lengths)
    chosen = resolve(_OP, backend, *primals, kv_lengths)
    scale = resolve_scale(scale, q.shape[-1])
    return function.value(primals, kv_lengths, bool(causal), scale, chosen)


def attention_jvp(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `attention` and its directional derivative in one pass.

    With P the softmax, S_dot = scale * (q_dot k^T + q k_dot^T) and c = rowsum(P * S_dot),

        o_dot = (P * (S_dot - c)) v + P v_dot

    The row mean c is subtracted from the scores' tangent before it is rounded and multiplied, so
    the error does not grow with a drift that all keys have in common; the usual form, which
    subtracts c * o at the end, cancels in half precision (docs/ops/attention.md).

    The value is tracked by autograd; the tangent is not, and nothing of it is kept.

    Args:
        primals: `(q, k, v)` as in `attention`.
        tangents: `(q_dot, k_dot, v_dot)`, each of the shape and dtype of its primal; None stands
            for zero and costs nothing.
        kv_lengths: as in `attention`.
        causal: as in `attention`.
        scale: as in `attention`.
        backend: as in `attention`.

    Returns:
        `(o, o_dot)`, both [B, H, Nq, D] in the dtype of q.

    Raises:
        ValueError: as `attention`, or a tangent of another shape or device.
        TypeError: as `attention`, or a tangent of another dtype.
        BackendError: the backend that was asked for cannot run this call.
        NotImplementedError: an operand carries a tangent of forward-mode AD itself.
    """
    check_operands(_OP, "q, k, v", primals, tangents)
    relevant: tuple[Any, ...] = (*primals, *tangents)
    if has_torch_function(relevant):
        pair: tuple[Tensor, Tensor] = handle_torch_function(
            attention_jvp, relevant, primals, tangents,
            kv_lengths=kv_lengths, causal=causal, scale=scale, backend=backend,
        )  # fmt: skip
        return pair
    primals, tangents = _autocast(*primals), _autocast(*tangents)
    _check_primals(primals, kv_lengths)
    check_tangents(_OP, _NAMES, primals, tangents)
    chosen = resolve(_OP, backend, *primals, *tangents, kv_lengths)
    scale = resolve_scale(scale, primals[0].shape[-1])
    return function.value_and_tangent(primals, tangents, kv_lengths, bool(causal), scale, chosen)


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


@limit(_OP, Backend.TRITON)
def _triton_limits(q: Tensor, *_: Tensor | None) -> list[str]:
    """Return what keeps the Triton kernels from these shapes."""
    if q.shape[-1] <= _TRITON_MAX_HEAD_DIM:
        return []
    return [f"head dimension {q.shape[-1]} is above {_TRITON_MAX_HEAD_DIM}"]


def _check_primals(primals: tuple[Tensor, ...], kv_lengths: Tensor | None) -> None:
    """Validate what every backend takes for granted."""
    for name, tensor in zip(_NAMES, primals, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{_OP}: {name} must be a tensor, got {type(tensor).__name__}")
    q, k, v = primals
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"{_OP}: q, k and v must be [B, H, N, D], got {shapes}")
    if q.dtype not in _DTYPES:
        raise TypeError(f"{_OP}: q must be one of {_DTYPES}, got {q.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"{_OP}: one dtype is needed, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"{_OP}: one device is needed, got {q.device}, {k.device}, {v.device}")
    if k.shape != v.shape or q.shape[3] != k.shape[3] or q.shape[3] == 0:
        raise ValueError(
            f"{_OP}: q must be [B, H, Nq, D], k and v both [B, H, Nk, D] with the same D > 0, "
            f"got {shapes}"
        )
    if q.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"{_OP}: q, k and v need the same batch and number of heads, got {shapes}; grouped "
            "heads must be repeated (repeat_interleave)"
        )
    if kv_lengths is not None:
        _check_lengths(kv_lengths, q, k.shape[2])


def _check_lengths(kv_lengths: Tensor, q: Tensor, n_keys: int) -> None:
    """Validate the key lengths, their values only where looking at them is cheap."""
    if not isinstance(kv_lengths, Tensor) or kv_lengths.dtype not in _INTEGERS:
        got = getattr(kv_lengths, "dtype", type(kv_lengths).__name__)
        raise TypeError(f"{_OP}: kv_lengths must be a tensor of integers, got {got}")
    if kv_lengths.shape != q.shape[:1]:
        raise ValueError(
            f"{_OP}: kv_lengths must be [B] = [{q.shape[0]}], got {list(kv_lengths.shape)}"
        )
    if kv_lengths.device != q.device:
        raise ValueError(f"{_OP}: kv_lengths is on {kv_lengths.device}, q is on {q.device}")
    opaque = torch.compiler.is_compiling() or is_functorch_wrapped_tensor(kv_lengths)
    if opaque or q.device.type != "cpu" or kv_lengths.numel() == 0:
        return
    low, high = (int(x) for x in kv_lengths.aminmax())
    if low < 0 or high > n_keys:
        raise ValueError(f"{_OP}: kv_lengths must be in 0 .. {n_keys}, got {low} .. {high}")
