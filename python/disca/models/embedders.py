# SPDX-License-Identifier: Apache-2.0
"""Layers that bring latents, times and prompts to the token width.

Module names follow the released HunyuanVideo files, so that their weights load unchanged.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disca_kernels import attention, gated_residual, timestep_features

__all__ = [
    "GlyphMapper",
    "ImageProjection",
    "PatchEmbed",
    "RefinerBlock",
    "TextRefiner",
    "TimeEmbedder",
    "VectorEmbedder",
    "valid_rows",
]


class PatchEmbed(nn.Module):
    """Cut a latent into patches and map each to a token, with the weights of a strided Conv3d."""

    def __init__(self, in_channels: int, hidden: int, patch: tuple[int, int, int]) -> None:
        """Build the layer for patches of `patch` = (frames, rows, columns)."""
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(in_channels, hidden, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Map a latent [B, C_in, F, H, W] to tokens [B, N, C], the column index running fastest.

        A sampler accumulates latents in float32; layers in half precision read them rounded.
        """
        if self.proj.weight.dtype.itemsize < 4:
            x = x.to(self.proj.weight.dtype)
        batch, channels, frames, rows, columns = x.shape
        p_f, p_h, p_w = self.patch
        grid = (frames // p_f, rows // p_h, columns // p_w)
        x = x.reshape(batch, channels, grid[0], p_f, grid[1], p_h, grid[2], p_w)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, grid[0] * grid[1] * grid[2], -1)
        # The patches do not overlap, so the convolution is one matrix product.
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class TimeEmbedder(nn.Module):
    """Sinusoids of a number, then Linear, SiLU, Linear."""

    def __init__(self, hidden: int, features: int, scale: float) -> None:
        """Build the layer with `features` sinusoids of `scale` times the number."""
        super().__init__()
        self.features = features
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: Tensor, tangent_width: float | Tensor = 0.0) -> Tensor:
        """Embed t [B] as [B, C]; `tangent_width` is that of `timestep_features`."""
        sinusoids = timestep_features(
            t, self.features, scale=self.scale, tangent_width=tangent_width
        )
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        embedded: Tensor = self.mlp(sinusoids.to(first.weight.dtype))
        return embedded


class VectorEmbedder(nn.Module):
    """Linear, SiLU, Linear for the pooled prompt vector."""

    def __init__(self, width: int, hidden: int) -> None:
        """Build the layer for vectors of `width`."""
        super().__init__()
        self.in_layer = nn.Linear(width, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, width] to [B, C]."""
        embedded: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return embedded


class _TextProjection(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return projected


class _RefinerMlp(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, inner)
        self.fc2 = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.silu(self.fc1(x)))
        return out


class RefinerBlock(nn.Module):
    """Self-attention and MLP over text tokens, each gated by a condition vector."""

    def __init__(self, hidden: int, heads: int, mlp_hidden: int) -> None:
        """Build the block; its MLP has the inner width `mlp_hidden`."""
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(hidden, eps=1e-6)
        self.self_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.self_attn_proj = nn.Linear(hidden, hidden)
        self.norm2 = nn.LayerNorm(hidden, eps=1e-6)
        self.mlp = _RefinerMlp(hidden, mlp_hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor, lengths: Tensor) -> Tensor:
        """Map tokens [B, L, C] with `lengths` [B] real ones, gated by vec [B, C]."""
        gate_attention, gate_mlp = self.adaLN_modulation(vec).chunk(2, dim=-1)
        qkv = self.self_attn_qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        attended = attention(q, k, v, kv_lengths=lengths).transpose(1, 2).flatten(2)
        x = gated_residual(x, self.self_attn_proj(attended), gate_attention)
        return gated_residual(x, self.mlp(self.norm2(x)), gate_mlp)


class _Refiner(nn.Module):
    def __init__(self, hidden: int, heads: int, mlp_hidden: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RefinerBlock(hidden, heads, mlp_hidden) for _ in range(depth))

    def forward(self, x: Tensor, vec: Tensor, lengths: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, vec, lengths)
        return x


class TextRefiner(nn.Module):
    """Transformer over the text tokens alone, conditioned on t and on the mean text feature."""

    def __init__(
        self, width: int, hidden: int, heads: int, depth: int, mlp_hidden: int, time: TimeEmbedder
    ) -> None:
        """Build `depth` blocks for features of `width`; `time` is the refiner's own embedder."""
        super().__init__()
        self.input_embedder = nn.Linear(width, hidden)
        self.t_embedder = time
        self.c_embedder = _TextProjection(width, hidden)
        self.individual_token_refiner = _Refiner(hidden, heads, mlp_hidden, depth)

    def forward(
        self, text: Tensor, t: Tensor, lengths: Tensor, tangent_width: float | Tensor = 0.0
    ) -> Tensor:
        """Map text [B, L, width], zero behind `lengths` [B], to tokens [B, L, C] at time t [B]."""
        count = lengths.clamp(min=1).unsqueeze(-1).to(text.dtype)
        vec = self.t_embedder(t, tangent_width) + self.c_embedder(text.sum(dim=1) / count)
        tokens: Tensor = self.individual_token_refiner(self.input_embedder(text), vec, lengths)
        return tokens


class GlyphMapper(nn.Module):
    """LayerNorm and three linear layers for byT5 glyph features (HunyuanVideo-1.5)."""

    def __init__(self, width: int, inner: int, hidden: int) -> None:
        """Build the layer for features of `width` with two inner layers of width `inner`."""
        super().__init__()
        self.layernorm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, inner)
        self.fc3 = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, L, width] to [B, L, C]."""
        mapped: Tensor = self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(self.layernorm(x))))))
        return mapped


class ImageProjection(nn.Module):
    """LayerNorm, MLP, LayerNorm for vision features (HunyuanVideo-1.5)."""

    def __init__(self, width: int, hidden: int) -> None:
        """Build the layer for features of `width`."""
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, hidden),
            nn.LayerNorm(hidden),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, L, width] to [B, L, C]."""
        mapped: Tensor = self.proj(x)
        return mapped


def valid_rows(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Mask [B, L] that is true for the first `lengths[b]` positions of row b."""
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(-1)
