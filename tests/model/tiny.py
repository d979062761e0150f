# SPDX-License-Identifier: Apache-2.0
"""Small models with no zero weight, and inputs for them."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from disca.models import Condition, DiT, DiTConfig

Module = TypeVar("Module", bound=nn.Module)

TINY: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "patch": (1, 2, 2),
    "hidden": 24,
    "heads": 2,
    "double_blocks": 2,
    "single_blocks": 2,
    "mlp_ratio": 2.0,
    "rope_dims": (4, 4, 4),
    "text_dim": 7,
    "text_refiner_depth": 0,
    "pooled_dim": 5,
    "time_features": 32,
}

# The same model in the layout of HunyuanVideo-1.5.
TINY_1_5: dict[str, Any] = {
    **TINY,
    "in_channels": 7,
    "patch": (1, 1, 1),
    "double_blocks": 3,
    "single_blocks": 0,
    "text_refiner_depth": 1,
    "pooled_dim": None,
    "split_qkv": True,
    "glyph_dim": 6,
    "image_dim": 8,
}


def config(**changes: Any) -> DiTConfig:
    """Return the tiny configuration with some fields changed."""
    return DiTConfig(**{**TINY, **changes})


def roughen(module: Module, seed: int = 0) -> Module:
    """Give every parameter random values, zero-initialised ones too, and return the module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.15 * noise).to(parameter.dtype))
    return module


def model(dtype: torch.dtype = torch.float32, **changes: Any) -> DiT:
    """Return a tiny model without a zero weight."""
    torch.manual_seed(0)
    return roughen(DiT(config(**changes)).to(dtype))


def inputs(
    settings: DiTConfig,
    *,
    batch: int = 3,
    size: tuple[int, int, int] = (3, 4, 6),
    text: int = 5,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Condition]:
    """Return x, t, r <= t and a condition with text padding."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    t = torch.linspace(0.3, 0.95, batch, dtype=dtype)
    extra = settings.in_channels - settings.out_channels
    condition = Condition(
        text=normal(batch, text, settings.text_dim),
        text_lengths=torch.tensor([text - 1 - i % text for i in range(batch)]),
        pooled=normal(batch, settings.pooled_dim) if settings.pooled_dim else None,
        guidance=torch.linspace(1, 6, batch, dtype=dtype) if settings.guidance_embed else None,
        latents=normal(batch, extra, *size) if extra else None,
        glyph=normal(batch, 4, settings.glyph_dim) if settings.glyph_dim else None,
        glyph_lengths=torch.arange(batch) % 4 if settings.glyph_dim else None,
        image=normal(batch, 2, settings.image_dim) if settings.image_dim else None,
    )
    return normal(batch, settings.out_channels, *size), t, t * 0.6, condition
