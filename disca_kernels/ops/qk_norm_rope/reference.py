# SPDX-License-Identifier: Apache-2.0
"""Eager specification of query-key normalisation with rotary embedding: value and tangent."""

import torch
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]
Operand = Tensor | None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype used inside for tensors of `dtype`: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def qk_norm_rope_reference(
    qkv: Tensor,
    q_weight: Operand,
    k_weight: Operand,
    cos: Operand,
    sin: Operand,
    *context: Operand,
    heads: int,
    rope_tokens: int | None = None,
    interleaved: bool = True,
    eps: float = 1e-6,
) -> Triple:
    """Normalise queries and keys, turn them by their position, put heads before tokens.

    Plain PyTorch, differentiable any number of times, in both modes. It computes in float32
    (float64 inputs: in float64) and casts once, at the end.

    Args:
        qkv: [B, N, 3 * H * D] packed projection: queries, keys, values, each [H, D].
        q_weight: [D] weight of the queries' RMS norm, None for a norm without weight.
        k_weight: the same for the keys.
        cos: [rope_tokens, D / 2] cosines of the first tokens' angles, None for no rotation.
        sin: their sines, likewise.
        *context: nothing, or `context_qkv` [B, M, 3 * H * D], a second stream that is not turned
            and comes after the first, and `context_q_weight` and `context_k_weight`, [D] or None.
        heads: H.
        rope_tokens: rows of the tables; None for what they have.
        interleaved: whether channels 2i and 2i + 1 are turned together; otherwise i and i + D / 2.
        eps: added to the mean square.

    Returns:
        `(q, k, v)`, each [B, H, N + M, D] in the dtype of qkv, contiguous.
    """
    _check_rows(cos, rope_tokens)
    parts = [_stream(qkv, q_weight, k_weight, cos, sin, heads, interleaved, eps)]
    context_qkv, context_q, context_k = context + (None,) * (3 - len(context))
    if context_qkv is not None:
        parts.append(
            _stream(context_qkv, context_q, context_k, None, None, heads, interleaved, eps)
        )
    return _joined(parts, qkv.dtype)


def qk_norm_rope_jvp_reference(
    primals: tuple[Operand, ...],
    tangents: tuple[Operand, ...],
    *,
    heads: int,
    rope_tokens: int | None = None,
    interleaved: bool = True,
    eps: float = 1e-6,
) -> tuple[Triple, Triple]:
    """Compute the value and, by the closed formula, its directional derivative.

    With a head's row x of queries or keys, `rstd = 1 / sqrt(mean(x * x) + eps)`, `x_hat = rstd * x`
    and R the rotation,

        y = R(x_hat * w)
        y_dot = R(rstd * (x_dot - x_hat * mean(x_hat * x_dot)) * w + x_hat * w_dot)

    and the tangent of the values is that of their part of qkv.

    Args:
        primals: the operands of `qk_norm_rope_reference` in its order, all eight.
        tangents: one for each, of its primal's shape, or None for zero; those of the tables have to
            be None.
        heads: as in `qk_norm_rope_reference`.
        rope_tokens: likewise.
        interleaved: likewise.
        eps: likewise.

    Returns:
        `(q, k, v)` and their tangents.
    """
    qkv, q_weight, k_weight, cos, sin, context_qkv, *context_weights = primals
    qkv_dot, q_weight_dot, k_weight_dot, _, _, context_dot, *context_weight_dots = tangents
    assert qkv is not None
    _check_rows(cos, rope_tokens)
    options = (heads, interleaved, eps)
    given = (qkv, q_weight, k_weight, cos, sin)
    values = [_stream(*given, *options)]
    dots = [_stream_dot(given, (qkv_dot, q_weight_dot, k_weight_dot), *options)]
    if context_qkv is not None:
        context_q_weight, context_k_weight = context_weights
        given = (context_qkv, context_q_weight, context_k_weight, None, None)
        values.append(_stream(*given, *options))
        dots.append(_stream_dot(given, (context_dot, *context_weight_dots), *options))
    return _joined(values, qkv.dtype), _joined(dots, qkv.dtype)


def _check_rows(cos: Operand, rope_tokens: int | None) -> None:
    rows = 0 if cos is None else cos.shape[0]
    if rope_tokens not in (None, rows):
        raise ValueError(f"rope_tokens is {rope_tokens}, the tables have {rows} rows")


def _stream(
    qkv: Tensor,
    q_weight: Operand,
    k_weight: Operand,
    cos: Operand,
    sin: Operand,
    heads: int,
    interleaved: bool,
    eps: float,
) -> Triple:
    """Return queries, keys and values [B, N, H, D] of one stream, wide."""
    q, k, v = _unpacked(qkv, heads)

    def normal(x: Tensor, weight: Operand) -> Tensor:
        x_hat = torch.nn.functional.rms_norm(x, x.shape[-1:], None, eps)
        y = x_hat if weight is None else x_hat * weight.to(x.dtype)
        return _rotated(y, cos, sin, interleaved)

    return normal(q, q_weight), normal(k, k_weight), v


def _stream_dot(
    primals: tuple[Tensor, Operand, Operand, Operand, Operand],
    tangents: tuple[Operand, ...],
    heads: int,
    interleaved: bool,
    eps: float,
) -> Triple:
    """Return the tangents of what `_stream` returns."""
    qkv, *weights, cos, sin = primals
    qkv_dot, *weight_dots = tangents
    *rows, v = _unpacked(qkv, heads)
    *row_dots, v_dot = (None,) * 3 if qkv_dot is None else _unpacked(qkv_dot, heads)
    dots = []
    for x, weight, x_dot, weight_dot in zip(rows, weights, row_dots, weight_dots, strict=True):
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        x_hat = x * rstd
        y_dot = torch.zeros_like(x)
        if x_dot is not None:
            along = (x_hat * x_dot).mean(-1, keepdim=True)
            x_hat_dot = rstd * (x_dot - x_hat * along)
            y_dot = x_hat_dot if weight is None else x_hat_dot * weight.to(x.dtype)
        if weight_dot is not None:
            y_dot = y_dot + x_hat * weight_dot.to(x.dtype)
        dots.append(_rotated(y_dot, cos, sin, interleaved))
    return dots[0], dots[1], torch.zeros_like(v) if v_dot is None else v_dot


def _unpacked(qkv: Tensor, heads: int) -> Triple:
    """Return wide queries, keys and values [B, N, H, D] of a packed projection."""
    wide = qkv.to(compute_dtype(qkv.dtype))
    q, k, v = torch.unflatten(wide, -1, (3, heads, wide.shape[-1] // (3 * heads))).unbind(2)
    return q, k, v


def _rotated(y: Tensor, cos: Operand, sin: Operand, interleaved: bool) -> Tensor:
    """Turn the channel pairs of the first tokens of [B, N, H, D]; later tokens stay."""
    if cos is None or sin is None:
        return y
    first, rest = y[:, : cos.shape[0]], y[:, cos.shape[0] :]
    cos, sin = (table.to(y.dtype).unsqueeze(1) for table in (cos, sin))
    a, b = torch.unflatten(first, -1, (-1, 2)).unbind(-1) if interleaved else first.chunk(2, -1)
    pairs = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat((turned, rest), 1)


def _joined(parts: list[Triple], dtype: torch.dtype) -> Triple:
    """Append the streams along the tokens, heads first: [B, N, H, D] to [B, H, N + M, D]."""
    q, k, v = (
        torch.cat(streams, 1).to(dtype).transpose(1, 2) for streams in zip(*parts, strict=True)
    )
    return q.contiguous(), k.contiguous(), v.contiguous()
