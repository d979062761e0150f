# SPDX-License-Identifier: Apache-2.0
"""Public `qk_norm_rope` and `qk_norm_rope_jvp`: contract, validation, choice of backend."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from disca_kernels.backend import Backend, resolve
from disca_kernels.ops.qk_norm_rope import function
from disca_kernels.validation import check_eps, check_operands, check_tangents

_OP = "qk_norm_rope"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NAMES = (
    *("qkv", "q_weight", "k_weight", "cos", "sin"),
    *("context_qkv", "context_q_weight", "context_k_weight"),
)

Operand = Tensor | None
Triple = tuple[Tensor, Tensor, Tensor]


def qk_norm_rope(
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
    backend: str | Backend = "auto",
) -> Triple:
    """Normalise queries and keys, turn them by their position, put heads before tokens.

    One pass from a packed projection to what attention takes. Each head's row x of queries and
    keys becomes `y = x / sqrt(mean(x * x) + eps) * weight` (Zhang and Sennrich, "Root Mean Square
    Layer Normalization", arXiv 1910.07467; on queries and keys: Dehghani et al., "Scaling Vision
    Transformers to 22 Billion Parameters", arXiv 2302.05442). In the first `rope_tokens` tokens
    each channel pair (a, b) is then turned by that token's and pair's angle to
    `(a cos - b sin, a sin + b cos)` (Su et al., "RoFormer", arXiv 2104.09864). Values are copied.
    Everything is computed in float32 (float64 inputs: in float64) and rounded once, at the store.

    The context is a second stream, such as the text of a double-stream block, with weights of its
    own: its tokens are not turned and come after those of the first, so that nothing has to be
    concatenated.

    Differentiable in reverse mode on every backend, and in forward mode (`torch.func.jvp`,
    `forward_ad.dual_level`) with a detached tangent; the tables are constants. With
    `backend="eager"` outside forward mode it is plain PyTorch, differentiable twice.

    Args:
        qkv: [B, N, 3 * H * D] queries, keys and values, each [H, D]; float32, bfloat16, float16 or
            float64 (float64 only on eager). D is even.
        q_weight: [D] weight of the queries' norm in the dtype of qkv or float32; None for none.
        k_weight: the same for the keys.
        cos: [rope_tokens, D / 2] in the dtype of qkv or float32; None, together with `sin`, for no
            rotation.
        sin: shape and dtype of `cos`.
        *context: nothing, or `context_qkv` [B, M, 3 * H * D] in the dtype of qkv, then, if they are
            not None, `context_q_weight` and `context_k_weight`, which are to it what `q_weight` and
            `k_weight` are to qkv.
        heads: H.
        rope_tokens: tokens at the front that are turned, at most N; by default as many as the
            tables have rows, and they must not have more or fewer.
        interleaved: whether a pair is channels 2i and 2i + 1 (HunyuanVideo, Wan, FLUX); otherwise
            it is i and i + D / 2 (Llama, many language models).
        eps: added to the mean square.
        backend: "auto", "triton", "cpu" or "eager"; see `disca_kernels.backend`.

    Returns:
        `(q, k, v)`, each [B, H, N + M, D] in the dtype of qkv, contiguous.

    Raises:
        ValueError: wrong rank, width, batch, number of tokens or device.
        TypeError: wrong dtype, or not a tensor.
        NotImplementedError: a table requires a gradient or carries a tangent.
        BackendError: the backend that was asked for cannot run this call.
    """
    operands = _padded(qkv, q_weight, k_weight, cos, sin, *context)
    if has_torch_function(operands):
        result: Triple = handle_torch_function(
            qk_norm_rope,
            operands,
            *operands,
            heads=heads,
            rope_tokens=rope_tokens,
            interleaved=interleaved,
            eps=eps,
            backend=backend,
        )
        return result
    _check_primals(operands, heads, rope_tokens)
    check_eps(_OP, eps)
    return function.value(operands, (heads, interleaved, eps), resolve(_OP, backend, *operands))


def qk_norm_rope_jvp(
    primals: Sequence[Operand],
    tangents: Sequence[Operand],
    *,
    heads: int,
    rope_tokens: int | None = None,
    interleaved: bool = True,
    eps: float = 1e-6,
    backend: str | Backend = "auto",
) -> tuple[Triple, Triple]:
    """Compute `qk_norm_rope` and its directional derivative in one pass.

    With `x_hat` a normalised row, `rstd` the reciprocal root of its mean square and R the rotation,

        y_dot = R(rstd * (x_dot - x_hat * mean(x_hat * x_dot)) * weight + x_hat * weight_dot)

    The values are tracked by autograd; the tangents are not, and nothing of them is kept.

    Args:
        primals: `(qkv, q_weight, k_weight, cos, sin, context_qkv, context_q_weight,
            context_k_weight)` as in `qk_norm_rope`; the last three may be left out.
        tangents: one for each primal, of its shape and dtype; None stands for zero and costs
            nothing. Those of the tables are None.
        heads: as in `qk_norm_rope`.
        rope_tokens: likewise.
        interleaved: likewise.
        eps: likewise.
        backend: likewise.

    Returns:
        `(q, k, v)` and `(q_dot, k_dot, v_dot)`, each [B, H, N + M, D] in the dtype of qkv.

    Raises:
        ValueError: as `qk_norm_rope`, or a tangent of another shape or device, or without primal.
        TypeError: as `qk_norm_rope`, or a tangent of another dtype.
        NotImplementedError: an operand carries a tangent of forward-mode AD itself, or there is a
            tangent of a table.
        BackendError: the backend that was asked for cannot run this call.
    """
    operands, dots = check_operands(_OP, ", ".join(_NAMES), primals, tangents, optional=3)
    relevant = (*operands, *dots)
    if has_torch_function(relevant):
        pair: tuple[Triple, Triple] = handle_torch_function(
            qk_norm_rope_jvp,
            relevant,
            primals,
            tangents,
            heads=heads,
            rope_tokens=rope_tokens,
            interleaved=interleaved,
            eps=eps,
            backend=backend,
        )
        return pair
    _check_primals(operands, heads, rope_tokens)
    check_eps(_OP, eps)
    check_tangents(_OP, _NAMES, operands, dots)
    chosen = resolve(_OP, backend, *relevant)
    return function.value_and_tangent(operands, dots, (heads, interleaved, eps), chosen)


def _padded(*operands: Any) -> tuple[Any, ...]:
    """Return all operands, None for those that were left out."""
    if len(operands) > len(_NAMES):
        raise TypeError(
            f"{_OP}: at most {len(_NAMES)} operands ({', '.join(_NAMES)}), got {len(operands)}"
        )
    return (*operands, *[None] * (len(_NAMES) - len(operands)))


def _check_primals(operands: tuple[Any, ...], heads: Any, rope_tokens: Any) -> None:
    """Validate what every backend takes for granted."""
    for name, tensor in zip(_NAMES, operands, strict=True):
        if not isinstance(tensor, Tensor) and (tensor is not None or name == "qkv"):
            raise TypeError(
                f"{_OP}: {name} must be a tensor{'' if name == 'qkv' else ' or None'}, "
                f"got {type(tensor).__name__}"
            )
    qkv, q_weight, k_weight, cos, sin, context_qkv, *context_weights = operands
    width = _check_projection(qkv, heads)
    _check_tables(qkv, cos, sin, width, rope_tokens)
    if context_qkv is None:
        for name, weight in zip(_NAMES[6:], context_weights, strict=True):
            if weight is not None:
                raise ValueError(f"{_OP}: {name} was given without context_qkv")
    else:
        _check_context(qkv, context_qkv)
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    weights |= dict(zip(_NAMES[6:], context_weights, strict=True))
    for name, weight in weights.items():
        if weight is None:
            continue
        _check_companion(qkv, name, weight)
        if tuple(weight.shape) != (width,):
            raise ValueError(
                f"{_OP}: {name} must be [D] = [{width}] for qkv {list(qkv.shape)} and {heads} "
                f"heads, got {list(weight.shape)}"
            )


def _check_projection(qkv: Tensor, heads: Any) -> int:
    """Check the packed projection; return D."""
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"{_OP}: heads must be an integer, got {type(heads).__name__}")
    if heads < 1:
        raise ValueError(f"{_OP}: heads must be at least 1, got {heads}")
    if qkv.ndim != 3:
        raise ValueError(f"{_OP}: qkv must be [B, N, 3 * H * D], got {list(qkv.shape)}")
    width = qkv.shape[-1]
    if width == 0 or width % (6 * heads):
        raise ValueError(
            f"{_OP}: qkv must be [B, N, 3 * H * D] with H = {heads} and D even, so that its width "
            f"is a multiple of {6 * heads}, got {list(qkv.shape)}"
        )
    if qkv.dtype not in _DTYPES:
        names = ", ".join(map(str, _DTYPES))
        raise TypeError(f"{_OP}: qkv must be one of {names}, got {qkv.dtype}")
    return int(width // (3 * heads))


def _check_tables(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, width: int, rope_tokens: Any
) -> None:
    if isinstance(rope_tokens, bool) or not isinstance(rope_tokens, (int, type(None))):
        raise TypeError(f"{_OP}: rope_tokens must be an integer, got {type(rope_tokens).__name__}")
    if cos is None or sin is None:
        if cos is not sin:
            present = "sin" if cos is None else "cos"
            raise ValueError(f"{_OP}: cos and sin come together, got only {present}")
        if rope_tokens:
            raise ValueError(
                f"{_OP}: rope_tokens is {rope_tokens}, but there are no tables; pass cos and sin"
            )
        return
    for name, table in (("cos", cos), ("sin", sin)):
        _check_companion(qkv, name, table)
        if table.ndim != 2 or table.shape[1] != width // 2:
            raise ValueError(
                f"{_OP}: {name} must be [rope_tokens, D / 2] = [rope_tokens, {width // 2}] for qkv "
                f"{list(qkv.shape)}, got {list(table.shape)}"
            )
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"{_OP}: cos and sin must be alike, got cos {cos.dtype} {list(cos.shape)} and sin "
            f"{sin.dtype} {list(sin.shape)}"
        )
    if rope_tokens is not None and rope_tokens != cos.shape[0]:
        raise ValueError(
            f"{_OP}: rope_tokens is {rope_tokens}, cos and sin have {cos.shape[0]} rows; the "
            "tables must have one row for each token that is turned"
        )
    if cos.shape[0] > qkv.shape[1]:
        raise ValueError(
            f"{_OP}: {cos.shape[0]} tokens would be turned (rope_tokens, the rows of cos), but qkv "
            f"{list(qkv.shape)} has {qkv.shape[1]}"
        )


def _check_context(qkv: Tensor, context_qkv: Tensor) -> None:
    expected = (qkv.shape[0], qkv.shape[2])
    if context_qkv.ndim != 3 or (context_qkv.shape[0], context_qkv.shape[2]) != expected:
        raise ValueError(
            f"{_OP}: context_qkv must be [B, M, 3 * H * D] = [{expected[0]}, M, {expected[1]}] for "
            f"qkv {list(qkv.shape)}, got {list(context_qkv.shape)}"
        )
    if context_qkv.dtype != qkv.dtype:
        raise TypeError(
            f"{_OP}: context_qkv must have the dtype of qkv, {qkv.dtype}, got {context_qkv.dtype}"
        )
    if context_qkv.device != qkv.device:
        raise ValueError(f"{_OP}: context_qkv is on {context_qkv.device}, qkv is on {qkv.device}")


def _check_companion(qkv: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (qkv.dtype, torch.float32):
        raise TypeError(
            f"{_OP}: {name} must have the dtype of qkv ({qkv.dtype}) or torch.float32, "
            f"got {tensor.dtype}"
        )
    if tensor.device != qkv.device:
        raise ValueError(f"{_OP}: {name} is on {tensor.device}, qkv is on {qkv.device}")
