# SPDX-License-Identifier: Apache-2.0
"""Public `adaln_modulate` and `adaln_modulate_jvp`: contract, validation, choice of backend."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from disca_kernels.backend import Backend, limit, resolve
from disca_kernels.ops.adaln_modulate import function
from disca_kernels.validation import check_eps, check_operands, check_tangents

_OP = "adaln_modulate"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_WIDTH = 8192


def adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, backend: str | Backend = "auto"
) -> Tensor:
    """Layer-normalise tokens and modulate them: `y = LN(x) * (1 + scale) + shift`.

    `LN` subtracts the mean over the last dimension and divides by the square root of the biased
    variance plus `eps`; it has no weights of its own. This is the modulation of a diffusion
    transformer's adaLN block (Peebles and Xie, "Scalable Diffusion Models with Transformers",
    arXiv 2212.09748). Everything is computed in float32 (float64 inputs: in float64) and rounded
    once, when y is stored.

    Differentiable in reverse mode on every backend, and in forward mode (`torch.func.jvp`,
    `forward_ad.dual_level`) with a detached tangent. With `backend="eager"` outside forward mode
    it is plain PyTorch, differentiable twice.

    Args:
        x: [B, N, C] tokens, float32, bfloat16, float16 or float64 (float64 only on eager).
        shift: [B, C] for one row per sample, or [B, N, C] for one row per token; the dtype of x
            or float32; under `torch.autocast` any half precision, which is widened if x is float32.
            Nothing is broadcast: [B, 1, C] is accepted only if N is 1.
        scale: shape and dtype of `shift`.
        eps: added to the variance.
        backend: "auto", "triton", "cuda", "cpu" or "eager"; see `disca_kernels.backend`.

    Returns:
        y [B, N, C], contiguous, in the dtype of x.

    Raises:
        ValueError: wrong rank, width, batch or device.
        TypeError: wrong dtype, or not a tensor.
        BackendError: the backend that was asked for cannot run this call.
    """
    if has_torch_function((x, shift, scale)):
        result: Tensor = handle_torch_function(
            adaln_modulate, (x, shift, scale), x, shift, scale, eps=eps, backend=backend
        )
        return result
    shift, scale = (_widen_in_autocast(t, x) for t in (shift, scale))
    _check_primals(x, shift, scale)
    check_eps(_OP, eps)
    return function.value(x, shift, scale, eps, resolve(_OP, backend, x, shift, scale))


def adaln_modulate_jvp(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    eps: float = 1e-6,
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `adaln_modulate` and its directional derivative in one pass.

    With `x_hat = LN(x)` and `rstd` the reciprocal standard deviation of a row,

        y_dot = rstd * (x_dot - mean(x_dot) - x_hat * mean(x_hat * x_dot)) * (1 + scale)
                + x_hat * scale_dot + shift_dot

    The value is tracked by autograd; the tangent is not, and nothing of it is kept.

    Args:
        primals: `(x, shift, scale)` as in `adaln_modulate`.
        tangents: `(x_dot, shift_dot, scale_dot)`, each of the shape and dtype of its primal; None
            stands for zero and costs nothing.
        eps: added to the variance.
        backend: as in `adaln_modulate`.

    Returns:
        `(y, y_dot)`, both [B, N, C] in the dtype of x.

    Raises:
        ValueError: as `adaln_modulate`, or a tangent of another shape or device.
        TypeError: as `adaln_modulate`, or a tangent of another dtype.
        BackendError: the backend that was asked for cannot run this call.
        NotImplementedError: an operand carries a tangent of forward-mode AD itself.
    """
    check_operands(_OP, "x, shift, scale", primals, tangents)
    relevant: tuple[Any, ...] = (*primals, *tangents)
    if has_torch_function(relevant):
        pair: tuple[Tensor, Tensor] = handle_torch_function(
            adaln_modulate_jvp, relevant, primals, tangents, eps=eps, backend=backend
        )
        return pair
    x, shift, scale = primals
    primals = (x, _widen_in_autocast(shift, x), _widen_in_autocast(scale, x))
    _check_primals(*primals)
    check_eps(_OP, eps)
    x_dot, shift_dot, scale_dot = tangents
    tangents = (x_dot, _widen_in_autocast(shift_dot, x), _widen_in_autocast(scale_dot, x))
    check_tangents(_OP, ("x", "shift", "scale"), primals, tangents)
    chosen = resolve(_OP, backend, *primals, *tangents)
    return function.value_and_tangent(primals, tangents, eps, chosen)


def _widen_in_autocast(modulation: Any, x: Any) -> Any:
    """Under autocast bring a narrow modulation, the output of a cast linear layer, to float32."""
    if not (isinstance(modulation, Tensor) and isinstance(x, Tensor)):
        return modulation
    if x.dtype != torch.float32 or modulation.dtype not in (torch.bfloat16, torch.float16):
        return modulation
    device = x.device.type
    in_autocast = device != "meta" and torch.is_autocast_enabled(device)
    return modulation.float() if in_autocast else modulation


def _check_primals(x: Tensor, shift: Tensor, scale: Tensor) -> None:
    """Validate what every backend takes for granted."""
    for name, tensor in (("x", x), ("shift", shift), ("scale", scale)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{_OP}: {name} must be a tensor, got {type(tensor).__name__}")
    if x.ndim != 3:
        raise ValueError(f"{_OP}: x must be [B, N, C], got {list(x.shape)}")
    n_batch, n_tokens, n_channels = x.shape
    if n_channels == 0:
        raise ValueError(f"{_OP}: x must have at least one channel, got {list(x.shape)}")
    if x.dtype not in _DTYPES:
        names = ", ".join(map(str, _DTYPES))
        raise TypeError(f"{_OP}: x must be one of {names}, got {x.dtype}")
    for name, tensor in (("shift", shift), ("scale", scale)):
        if tuple(tensor.shape) not in ((n_batch, n_channels), (n_batch, n_tokens, n_channels)):
            raise ValueError(
                f"{_OP}: {name} must be [B, C] = [{n_batch}, {n_channels}] (one row per sample) or "
                f"[B, N, C] = [{n_batch}, {n_tokens}, {n_channels}] (one row per token) for x "
                f"{list(x.shape)}, got {list(tensor.shape)}; nothing is broadcast"
            )
        if tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"{_OP}: {name} must have the dtype of x ({x.dtype}) or torch.float32, "
                f"got {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{_OP}: {name} is on {tensor.device}, x is on {x.device}")
    if shift.shape != scale.shape or shift.dtype != scale.dtype:
        raise ValueError(
            f"{_OP}: shift and scale must be alike, got shift {shift.dtype} {list(shift.shape)} "
            f"and scale {scale.dtype} {list(scale.shape)}"
        )


@limit(_OP, Backend.TRITON)
@limit(_OP, Backend.CUDA)
def _width_limit(x: Tensor, *_: Tensor | None) -> list[str]:
    """Say how wide a row the kernels can keep in registers."""
    width = x.shape[-1]
    if width <= _MAX_WIDTH:
        return []
    return [f"at most {_MAX_WIDTH} channels fit the registers that share a row, got {width}"]
