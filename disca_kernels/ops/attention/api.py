# SPDX-License-Identifier: Apache-2.0
"""Public `attention` and `attention_jvp`: contract, validation, choice of backend."""

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from disca_kernels.ops.attention import eager
from disca_kernels.ops.attention.reference import resolve_scale


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute `softmax(scale * q @ k^T) @ v` over tensors of [B, H, N, D]."""
    if has_torch_function((q, k, v)):
        result: Tensor = handle_torch_function(
            attention, (q, k, v), q, k, v,
            kv_lengths=kv_lengths, causal=causal, scale=scale, backend=backend,
        )  # fmt: skip
        return result
    return eager.forward(q, k, v, kv_lengths, causal, resolve_scale(scale, q.shape[-1]))


def attention_jvp(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `attention` and its directional derivative; only the value is differentiable."""
    relevant: tuple[Any, ...] = (*primals, *tangents)
    if has_torch_function(relevant):
        pair: tuple[Tensor, Tensor] = handle_torch_function(
            attention_jvp, relevant, primals, tangents,
            kv_lengths=kv_lengths, causal=causal, scale=scale, backend=backend,
        )  # fmt: skip
        return pair
    scale = resolve_scale(scale, primals[0].shape[-1])
    return eager.value_and_tangent(primals, tangents, kv_lengths, causal, scale)
