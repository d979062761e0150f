# SPDX-License-Identifier: Apache-2.0
"""The learned cache predictor: a small transformer in place of the host's blocks."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from disca.errors import UserError
from disca.models.blocks import DoubleBlock, SingleBlock
from disca.models.configs import DiTConfig
from disca.models.host import Host
from disca.models.init import initialise, zero_linear
from disca.models.state import State
from disca.models.weights import canonical_keys, fill_from, read_state_dict
from disca_kernels import cache_read

__all__ = ["Predictor", "load_predictor"]

Form = Literal["paper", "residual"]
Stream = Literal["single", "double"]


class Predictor(nn.Module):
    """Predict the host's last-layer tokens from the current embedding and a cached last layer.

    `h = blocks(fusion([current, cache]))` with a two-layer fusion MLP and `depth` DiT blocks of the
    host's width, modulated by the current times and condition. `current` are the tokens of
    `host.embed`, `cache` those after the host's last block at an earlier step. The paper's form
    returns h; the residual form returns `cache + correction(h)` with one further linear layer that
    starts at zero, so that an untrained predictor equals reuse of the cache. The host's own
    embedders and head serve every step (DisCa, arXiv 2602.05449, section 4).

    Names are those of the released files: `fusion_mlp`, `mm_single_blocks` for single-stream
    blocks (HunyuanVideo-1.0); `fusion_mlp_img`, `fusion_mlp_txt`, `double_blocks` for double-stream
    blocks (HunyuanVideo-1.5). The residual form adds `correction`.

        predictor = Predictor(host.config, form="residual")
        cache = host.run(host.embed(x, t, r, cond)).tokens           # a full step
        state = host.embed(x_next, t_next, r_next, cond)             # a predicted one
        velocity = predictor.velocity(host, state, cache)
    """

    def __init__(
        self,
        host_config: DiTConfig,
        *,
        depth: int = 2,
        form: Form = "paper",
        block: Stream | None = None,
    ) -> None:
        """Build and initialise the predictor.

        Args:
            host_config: shape of the host.
            depth: number of blocks.
            form: "paper", or "residual" for cache plus correction.
            block: "single" or "double" stream blocks; None for the kind of the host's last block.

        Raises:
            UserError: if an argument is none of these.
        """
        super().__init__()
        if block is None:
            block = "single" if host_config.single_blocks else "double"
        if form not in ("paper", "residual"):
            raise UserError(f'form must be "paper" or "residual", got {form!r}')
        if block not in ("single", "double"):
            raise UserError(f'block must be "single" or "double", got {block!r}')
        if depth < 1:
            raise UserError(f"depth must be at least 1, got {depth}")
        self.form, self.block = form, block
        hidden = host_config.hidden
        self.config = replace(
            host_config,
            double_blocks=depth if block == "double" else 0,
            single_blocks=depth if block == "single" else 0,
        )
        if block == "single":
            self.fusion_mlp = _fusion(hidden)
            self.mm_single_blocks = nn.ModuleList(SingleBlock(self.config) for _ in range(depth))
        else:
            self.fusion_mlp_img = _fusion(hidden)
            self.fusion_mlp_txt = _fusion(hidden)
            self.double_blocks = nn.ModuleList(DoubleBlock(self.config) for _ in range(depth))
        self.correction = nn.Linear(hidden, hidden) if form == "residual" else None
        initialise(self, host_config.out_channels)
        if self.correction is not None:
            zero_linear(self.correction)

    def forward(self, state: State, cache: Tensor) -> Tensor:
        """Predict the tokens after the host's last block.

        Args:
            state: what the host's `embed` returned for this step.
            cache: tokens after the host's last block at an earlier step [B, N, C].

        Returns:
            Tokens [B, N, C], text included.

        Raises:
            UserError: if the cache has another shape, dtype or device than the tokens.
        """
        if not isinstance(cache, Tensor):
            raise UserError(f"the cache must be a tensor, got {type(cache).__name__}")
        video = state.video
        cast = (
            torch.is_autocast_enabled(video.device.type) if video.device.type != "meta" else False
        )
        if cache.device != video.device or (cache.dtype != video.dtype and not cast):
            raise UserError(
                f"the tokens are {video.dtype} on {video.device}, the cache is {cache.dtype} on "
                f"{cache.device}; move it with cache.to(tokens)"
            )
        if cache.shape != state.shape:
            raise UserError(
                f"the cache must have the shape of the tokens {list(state.shape)}, got "
                f"{list(cache.shape)}; it belongs to another batch, resolution or model"
            )
        blocks = self.mm_single_blocks if self.block == "single" else self.double_blocks
        fused = self._fuse(state, cache)
        for block in blocks:
            fused = block(fused)
        tokens = fused.tokens
        return tokens if self.correction is None else cache + self.correction(tokens)

    def velocity(self, host: Host, state: State, cache: Tensor) -> Tensor:
        """Predict the tokens and pass them through the host's head.

        Args:
            host: the model whose `embed` made the state.
            state: the current step's state before the first block.
            cache: tokens of an earlier full step [B, N, C].

        Returns:
            The velocity [B, C, F, H, W].
        """
        return host.head(state.with_tokens(self(state, cache)))

    def share(self, host: Host) -> float:
        """Return the predictor's number of parameters over the host's."""
        own = sum(parameter.numel() for parameter in self.parameters())
        return own / sum(parameter.numel() for parameter in host.parameters())

    def _fuse(self, state: State, cache: Tensor) -> State:
        if self.block == "single":
            return state.with_tokens(_apply_fusion(self.fusion_mlp, state.tokens, cache))
        cached = state.with_tokens(cache)
        return state.with_streams(
            _apply_fusion(self.fusion_mlp_img, state.video, cached.video),
            _apply_fusion(self.fusion_mlp_txt, state.text, cached.text),
        )


def load_predictor(
    source: str | Path | Mapping[str, Any],
    host_config: DiTConfig,
    *,
    depth: int = 2,
    form: Form = "paper",
    block: Stream | None = None,
) -> Predictor:
    """Build a predictor from released or own weights.

    Merged and split (tensor-parallel) names are read, wrapped dictionaries and prefixes too; see
    `canonical_keys`. The predictor takes the dtype of the weights.

    Args:
        source: a safetensors or PyTorch file, or a state dictionary.
        host_config: shape of the host.
        depth: number of blocks.
        form: the form that the weights are for.
        block: kind of the blocks; None for the kind of the host's last block.

    Returns:
        The predictor, on the CPU.

    Raises:
        UserError: if the file cannot be read, or keys or shapes do not fit; they are listed.
    """
    raw = source if isinstance(source, Mapping) else read_state_dict(source)
    state = canonical_keys(raw, split_qkv=host_config.split_qkv)
    with torch.device("meta"):
        predictor = Predictor(host_config, depth=depth, form=form, block=block)
    return fill_from(predictor, state, what="predictor")


def _fusion(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))


def _apply_fusion(fusion: nn.Sequential, current: Tensor, cache: Tensor) -> Tensor:
    """Apply the MLP to [current, cache] without joining them."""
    first, last = fusion[0], fusion[2]
    assert isinstance(first, nn.Linear)
    fused: Tensor = last(cache_read(current, cache, first.weight, first.bias))
    return fused
