# SPDX-License-Identifier: Apache-2.0
"""Video diffusion transformer in HunyuanVideo's shape, at any size."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from disca.errors import UserError
from disca.models.blocks import DoubleBlock, FinalLayer, SingleBlock
from disca.models.condition import Condition
from disca.models.configs import DiTConfig
from disca.models.embedders import (
    GlyphMapper,
    ImageProjection,
    PatchEmbed,
    TextRefiner,
    TimeEmbedder,
    VectorEmbedder,
    valid_rows,
)
from disca.models.init import initialise, zero_linear
from disca.models.inputs import check_inputs
from disca.models.rope import rope_tables
from disca.models.state import State
from disca.models.weights import canonical_keys, fill_from, read_state_dict
from disca_kernels import forward_mode

__all__ = ["DiT", "load_dit"]

# Inner width of the byT5 mapper in the released HunyuanVideo-1.5, whatever the token width.
_GLYPH_INNER = 2048


class DiT(nn.Module):
    """Video diffusion transformer: velocity v(x_t, t) or average velocity u(x_t, r, t).

    Patches of the latent and text tokens pass through double-stream blocks and then single-stream
    blocks, each modulated by

        vec = time(t) [+ time_r(r)] + pooled(prompt) + guidance(1000 g)

    (with `time_reduction="mean"` the two time embeddings are averaged). Video tokens come first and
    carry 3-D rotary positions; text padding is masked out of attention. Time 1 is noise, time 0 is
    data, a step goes from t to r <= t.

    Works unchanged in plain mode, under `torch.func.jvp`, under `disca_kernels.dual.jvp`, under
    autocast and under `torch.compile`. Parameter names are those of the released HunyuanVideo-1.0
    and 1.5 files.

        model = DiT(DiTConfig(in_channels=1, out_channels=1, patch=(2, 4, 4), hidden=96, heads=4,
        rope_dims=(8, 8, 8),
                              double_blocks=2, single_blocks=10, text_dim=32, text_refiner_depth=0,
                              pooled_dim=32))
        velocity = model(x, t, cond=condition)

    Attributes:
        config: shape of the model.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its
            activations, in plain mode and under `disca_kernels.dual.jvp`; passes under
            `torch.func` and `forward_ad` keep them.
    """

    def __init__(self, config: DiTConfig) -> None:
        """Build and initialise the model.

        Args:
            config: shape of the model.
        """
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        hidden = config.hidden
        self.img_in = PatchEmbed(config.in_channels, hidden, config.patch)
        self.txt_in: nn.Module
        if config.text_refiner_depth:
            self.txt_in = TextRefiner(
                config.text_dim,
                hidden,
                config.heads,
                config.text_refiner_depth,
                config.mlp_hidden,
                self._time(),
            )
        else:
            self.txt_in = nn.Linear(config.text_dim, hidden)
        self.time_in = self._time()
        self.time_r_in = self._time() if config.mean_flow else None
        self.vector_in = VectorEmbedder(config.pooled_dim, hidden) if config.pooled_dim else None
        self.guidance_in = self._time() if config.guidance_embed else None
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_blocks))
        p_f, p_h, p_w = config.patch
        self.final_layer = FinalLayer(hidden, config.out_channels * p_f * p_h * p_w)
        self.byt5_in = (
            GlyphMapper(config.glyph_dim, _GLYPH_INNER, hidden) if config.glyph_dim else None
        )
        self.vision_in = ImageProjection(config.image_dim, hidden) if config.image_dim else None
        has_types = config.glyph_dim or config.image_dim
        # Rows: text, glyph, image.
        self.cond_type_embedding = nn.Embedding(3, hidden) if has_types else None
        initialise(self, config.out_channels)
        if self.cond_type_embedding is not None:
            nn.init.zeros_(self.cond_type_embedding.weight)
        self._start_r_embedder()

    @classmethod
    def from_teacher(
        cls, teacher: "DiT", *, guidance_embed: bool | None = None, mean_flow: bool | None = None
    ) -> "DiT":
        """Build a student with the teacher's weights and, where asked, further embedders.

        A new guidance embedder starts at zero: the output equals the teacher's at every g. A new
        r-embedder starts at zero (`time_reduction="sum"`) or as a copy of the t-embedder ("mean"):
        the output at r = t equals the teacher's to the bit.

        Args:
            teacher: the trained model; it is not changed.
            guidance_embed: whether the student has a guidance embedder; None for as the teacher.
            mean_flow: whether the student has an r-embedder; None for as the teacher.

        Returns:
            A model of its own on the teacher's device, in its dtype and mode.

        Raises:
            UserError: if the student would lack an embedder that the teacher has.
        """
        old = teacher.config
        new = replace(
            old,
            guidance_embed=old.guidance_embed if guidance_embed is None else guidance_embed,
            mean_flow=old.mean_flow if mean_flow is None else mean_flow,
        )
        for name in ("guidance_embed", "mean_flow"):
            if getattr(old, name) and not getattr(new, name):
                raise UserError(
                    f"the teacher has {name}, so a student without it cannot start from its weights"
                )
        weight = teacher.final_layer.linear.weight
        student = cls(new).to(device=weight.device, dtype=weight.dtype)
        student.load_state_dict(teacher.state_dict(), strict=False)
        if new.mean_flow and not old.mean_flow:
            student._start_r_embedder()
        if new.guidance_embed and not old.guidance_embed:
            assert student.guidance_in is not None
            zero_linear(student.guidance_in.mlp[2])
        student.gradient_checkpointing = teacher.gradient_checkpointing
        return student.train(teacher.training)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in order: double-stream, then single-stream."""
        return (*self.double_blocks, *self.single_blocks)

    @property
    def mean_flow(self) -> bool:
        """Whether an end time r is an input."""
        return self.config.mean_flow

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        r: Tensor | None = None,
        cond: Condition | None = None,
        *,
        tangent_width: float | Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity, or with `mean_flow` the average velocity from t to r.

        Args:
            x: latent [B, out_channels, F, H, W] at noise level t.
            t: start times [B] in [0, 1].
            r: end times [B], r <= t; for models with `mean_flow`, and only for them.
            cond: condition of the batch.
            tangent_width: band limit of the time tangent, a number or [B]; None for the
                configuration's.

        Returns:
            A tensor [B, out_channels, F, H, W].

        Raises:
            UserError: if an input does not fit the configuration.
        """
        if cond is None:
            raise UserError("a condition is needed: model(x, t, r, cond)")
        return self.head(self.run(self.embed(x, t, r, cond, tangent_width=tangent_width)))

    def embed(
        self,
        x: Tensor,
        t: Tensor,
        r: Tensor | None,
        cond: Condition,
        *,
        tangent_width: float | Tensor | None = None,
    ) -> State:
        """Turn latent, times and condition into the state before the first block.

        Args:
            x: latent [B, out_channels, F, H, W].
            t: start times [B].
            r: end times [B] or None.
            cond: condition of the batch.
            tangent_width: band limit of the time tangent; None for the configuration's.

        Returns:
            The state that `run` takes.

        Raises:
            UserError: if an input does not fit the configuration.
        """
        if cond.latents is not None:
            x = torch.cat((x, cond.latents), dim=1)
        check_inputs(self.config, x, t, r, cond)
        width = self.config.time_tangent_width if tangent_width is None else tangent_width
        video = self.img_in(x)
        text, lengths = self._embed_text(t, cond, width)
        # Under autocast the layer norms of some text embedders leave float32.
        text = text.to(video.dtype)
        # Each kind of block starts from the layout that it works on.
        parts = (video, text) if self.double_blocks else (torch.cat((video, text), dim=1),)
        grid = tuple(
            size // patch for size, patch in zip(x.shape[2:], self.config.patch, strict=True)
        )
        assert len(grid) == 3
        rope = rope_tables(
            grid,
            self.config.rope_dims,
            self.config.rope_theta,
            dtype=torch.float64 if video.dtype == torch.float64 else torch.float32,
            device=video.device,
        )
        vec = F.silu(self._embed_vector(t, r, cond, width))
        return State(parts, video.shape[1], vec, rope, lengths + video.shape[1], grid)

    def run(self, state: State, start: int = 0, stop: int | None = None) -> State:
        """Run some of the blocks.

        Args:
            state: the state before block `start`.
            start: first block.
            stop: block to stop before; None for all that follow.

        Returns:
            The state after block `stop - 1`.
        """
        recompute = self._recomputes()
        for block in self.blocks[start:stop]:
            state = checkpoint(block, state, use_reentrant=False) if recompute else block(state)
        return state

    def head(self, state: State) -> Tensor:
        """Turn the state's video tokens into a velocity.

        Args:
            state: the state after the last block; text tokens are ignored.

        Returns:
            A tensor [B, out_channels, F, H, W].
        """
        patches = self.final_layer(state.video, state.vec)
        (f, h, w), (p_f, p_h, p_w) = state.grid, self.config.patch
        patches = patches.reshape(-1, f, h, w, self.config.out_channels, p_f, p_h, p_w)
        velocity: Tensor = patches.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(
            -1, self.config.out_channels, f * p_f, h * p_h, w * p_w
        )
        return velocity

    def _time(self) -> TimeEmbedder:
        return TimeEmbedder(self.config.hidden, self.config.time_features, self.config.time_scale)

    def _start_r_embedder(self) -> None:
        if self.time_r_in is None:
            return
        if self.config.time_reduction == "mean":
            self.time_r_in.load_state_dict(self.time_in.state_dict())
        else:
            zero_linear(self.time_r_in.mlp[2])

    def _recomputes(self) -> bool:
        """Whether the backward pass is to run each block again.

        PyTorch's own forward mode cannot replay a block; `dual.jvp` can, since the backward pass
        reads nothing of the tangent.
        """
        if not self.gradient_checkpointing or not torch.is_grad_enabled():
            return False
        return not (forward_mode.active() or torch._C._are_functorch_transforms_active())

    def _embed_vector(
        self, t: Tensor, r: Tensor | None, cond: Condition, width: float | Tensor
    ) -> Tensor:
        vec: Tensor = self.time_in(t, width)
        if self.time_r_in is not None:
            end = self.time_r_in(r)
            vec = (vec + end) / 2 if self.config.time_reduction == "mean" else vec + end
        if self.vector_in is not None:
            vec = vec + self.vector_in(cond.pooled)
        if self.guidance_in is not None:
            vec = vec + self.guidance_in(cond.guidance)
        return vec

    def _embed_text(
        self, t: Tensor, cond: Condition, width: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Text tokens with padding at the end [B, L, C] and their number [B]."""
        # Padding may hold anything, NaN included; masked attention weights times NaN would still be
        # NaN.
        padding = ~valid_rows(cond.text, cond.text_lengths)
        features = cond.text.masked_fill(padding.unsqueeze(-1), 0)
        if isinstance(self.txt_in, TextRefiner):
            text = self.txt_in(features, t, cond.text_lengths, width)
        else:
            text = self.txt_in(features)
        if self.cond_type_embedding is None:
            return text, cond.text_lengths
        return self._join_streams(text, cond)

    def _join_streams(self, text: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """Put image and glyph tokens before the text and all padding at the end."""
        assert self.cond_type_embedding is not None
        kinds = self.cond_type_embedding.weight
        parts, lengths = [text + kinds[0]], [cond.text_lengths]
        if self.byt5_in is not None:
            assert cond.glyph is not None
            assert cond.glyph_lengths is not None
            padding = ~valid_rows(cond.glyph, cond.glyph_lengths)
            glyph = self.byt5_in(cond.glyph.masked_fill(padding.unsqueeze(-1), 0)) + kinds[1]
            parts.insert(0, glyph)
            lengths.insert(0, cond.glyph_lengths)
        if self.vision_in is not None and cond.image is not None:
            parts.insert(0, self.vision_in(cond.image) + kinds[2])
            lengths.insert(0, torch.full_like(cond.text_lengths, cond.image.shape[1]))
        valid = torch.cat(
            [valid_rows(part, length) for part, length in zip(parts, lengths, strict=True)], dim=1
        )
        order = torch.argsort(~valid, dim=1, stable=True).unsqueeze(-1)
        joined = torch.cat(parts, dim=1)
        return joined.gather(1, order.expand_as(joined)), valid.sum(dim=1)


def load_dit(source: str | Path | Mapping[str, Any], config: DiTConfig) -> DiT:
    """Build a DiT from released or own weights.

    Args:
        source: a safetensors or PyTorch file, or a state dictionary; merged or split names, wrapped
            or not, see `canonical_keys`.
        config: shape of the model; its switches must match the weights.

    Returns:
        The model on the CPU, in the dtype of the weights.

    Raises:
        UserError: if the file cannot be read, or keys or shapes do not fit; they are listed.
    """
    raw = source if isinstance(source, Mapping) else read_state_dict(source)
    state = canonical_keys(raw, split_qkv=config.split_qkv)
    with torch.device("meta"):
        model = DiT(config)
    return fill_from(model, state, what="DiT")
