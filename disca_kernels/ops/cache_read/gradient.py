# SPDX-License-Identifier: Apache-2.0
"""Backward pass of cache_read: plain matrix products, which the libraries do best.

The kernels of every backend keep z, the argument of SiLU, in the dtype of y.
"""

import torch
from torch import Tensor

from disca_kernels.ops.cache_read.reference import without_autocast


def launch_bwd(
    cotangents: tuple[Tensor | None, ...],
    saved: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    options: tuple[object, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of current, cache, weight and bias, None for what is not needed.

    With `dz = dy * SiLU'(z)`, they are products of dz with the halves of the weight, written into
    one tensor of tokens each, and of its transpose with the tokens, written into the halves of one
    weight gradient.
    """
    (dy,) = cotangents
    current, cache, weight, bias, z = saved
    assert dy is not None
    assert current is not None
    assert cache is not None
    assert weight is not None
    assert z is not None
    halves = weight.chunk(2, dim=1)
    with without_autocast(dy.device):
        # [B * N, O]
        dz = torch.ops.aten.silu_backward(dy.contiguous(), z).flatten(0, 1)
        of_tokens = [
            torch.mm(dz, half).view(x.shape) if need else None
            for x, half, need in zip((current, cache), halves, needs[:2], strict=True)
        ]
        d_weight = None
        if needs[2]:
            d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            for x, half in zip((current, cache), d_weight.chunk(2, dim=1), strict=True):
                torch.mm(dz.mT, x.flatten(0, 1), out=half)
        d_bias = None
        if needs[3]:
            assert bias is not None
            d_bias = dz.sum(0, dtype=torch.float32).to(bias.dtype)
    return (*of_tokens, d_weight, d_bias)
