# SPDX-License-Identifier: Apache-2.0
"""Public `adaln_modulate` and `adaln_modulate_jvp`: contract, validation, choice of backend."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from disca_kernels.ops.adaln_modulate.reference import (
    adaln_modulate_jvp_reference,
    adaln_modulate_reference,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    """Layer-normalise tokens and modulate them: `y = LN(x) * (1 + scale) + shift`."""
    if has_torch_function((x, shift, scale)):
        result: Tensor = handle_torch_function(
            adaln_modulate, (x, shift, scale), x, shift, scale, eps=eps, backend=backend
        )
        return result
    return adaln_modulate_reference(x, shift, scale, eps=eps)


def adaln_modulate_jvp(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `adaln_modulate` and its directional derivative; only the value is differentiable."""
    relevant: tuple[Any, ...] = (*primals, *tangents)
    if has_torch_function(relevant):
        pair: tuple[Tensor, Tensor] = handle_torch_function(
            adaln_modulate_jvp, relevant, primals, tangents, eps=eps, backend=backend
        )
        return pair
    y = adaln_modulate_reference(*primals, eps=eps)
    with torch.no_grad():
        _, y_dot = adaln_modulate_jvp_reference(primals, tangents, eps=eps)
    return y, y_dot
