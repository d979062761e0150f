# SPDX-License-Identifier: Apache-2.0
"""Sizes and switches of a video DiT, and the two published HunyuanVideo shapes."""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from disca.errors import UserError

__all__ = ["DiTConfig", "hunyuan_video_1_0", "hunyuan_video_1_5"]


@dataclass(frozen=True)
class DiTConfig:
    """Shape of a `DiT`.

    Attributes:
        in_channels: channels that `img_in` reads: the latent and, where a model has them,
            conditioning channels.
        out_channels: channels of the velocity and of the latent.
        patch: frames, rows and columns of one patch.
        hidden: token width C.
        heads: attention heads; hidden // heads is the head dimension.
        double_blocks: blocks with separate weights for video and text.
        single_blocks: blocks with shared weights, after the double ones.
        mlp_ratio: MLP width over `hidden`.
        rope_dims: even head-dimension shares of the frame, row and column angle; they sum to the
            head dimension.
        rope_theta: base of the rotary frequencies.
        text_dim: width of the text features.
        text_refiner_depth: blocks of the text refiner; 0 replaces it by one linear layer.
        pooled_dim: width of the pooled prompt vector; None for a model without `vector_in`.
        guidance_embed: whether the guidance scale is an input.
        mean_flow: whether the end time r is an input, which makes the output an average velocity.
        time_reduction: how the embeddings of t and r are joined: "sum" (HunyuanVideo-1.5) or "mean"
            (1.0).
        time_features: number of sinusoidal time features, even.
        time_scale: factor on times and guidance before the sinusoids.
        time_tangent_width: half-width h of the band limit on the tangent of the time features; 0 is
            exact. See `disca_kernels.timestep_features`.
        split_qkv: separate q, k and v projections in double blocks (HunyuanVideo-1.5) instead of
            one.
        glyph_dim: width of byT5 glyph features; None for a model without them.
        image_dim: width of image features; None for a model without them.
    """

    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    hidden: int = 3072
    heads: int = 24
    double_blocks: int = 20
    single_blocks: int = 40
    mlp_ratio: float = 4.0
    rope_dims: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 256.0
    text_dim: int = 4096
    text_refiner_depth: int = 2
    pooled_dim: int | None = 768
    guidance_embed: bool = False
    mean_flow: bool = False
    time_reduction: Literal["sum", "mean"] = "sum"
    time_features: int = 256
    time_scale: float = 1000.0
    time_tangent_width: float = 0.0
    split_qkv: bool = False
    glyph_dim: int | None = None
    image_dim: int | None = None

    def __post_init__(self) -> None:
        """Check that the sizes fit together.

        Raises:
            UserError: naming the field, what was expected and what came.
        """
        for name in ("patch", "rope_dims"):
            value = tuple(getattr(self, name))
            if len(value) != 3:
                raise UserError(
                    f"{name} needs three numbers (frames, rows, columns), got {list(value)}"
                )
            object.__setattr__(self, name, value)
        positive = ("in_channels", "out_channels", "hidden", "heads", "mlp_ratio", "text_dim")
        for name in (*positive, "time_features", "time_scale", "rope_theta"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        if min(self.patch) < 1:
            raise UserError(f"patch must be positive, got {list(self.patch)}")
        for name in ("double_blocks", "single_blocks", "text_refiner_depth", "time_tangent_width"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.double_blocks + self.single_blocks == 0:
            raise UserError(
                "a DiT needs at least one block: double_blocks and single_blocks are both 0"
            )
        if self.hidden % self.heads:
            raise UserError(
                f"hidden must be divisible by heads, got {self.hidden} and {self.heads}"
            )
        if (
            any(size % 2 or size < 0 for size in self.rope_dims)
            or sum(self.rope_dims) != self.head_dim
        ):
            raise UserError(
                f"rope_dims must be three even numbers that sum to hidden // heads = "
                f"{self.head_dim}, got {list(self.rope_dims)} with sum {sum(self.rope_dims)}"
            )
        if self.time_features % 2:
            raise UserError(f"time_features must be even, got {self.time_features}")
        if self.time_reduction not in ("sum", "mean"):
            raise UserError(f'time_reduction must be "sum" or "mean", got {self.time_reduction!r}')
        if self.in_channels < self.out_channels:
            raise UserError(
                f"in_channels counts the latent's out_channels too: got {self.in_channels} < "
                f"{self.out_channels}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def mlp_hidden(self) -> int:
        """Width of the MLPs' hidden layer."""
        return int(self.hidden * self.mlp_ratio)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.double_blocks + self.single_blocks

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `from_dict` reads back, fit for JSON and YAML."""
        values = asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DiTConfig":
        """Build a configuration from plain values.

        Args:
            values: field names to values; missing fields take their defaults.

        Returns:
            The checked configuration.

        Raises:
            UserError: for a name that is no field (the nearest one is suggested) or a value that
                does not fit.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = (
                    f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
                )
                raise UserError(f"unknown model key {name!r}{hint}")
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"a model value has the wrong type: {error}") from error


def hunyuan_video_1_0(*, guidance_embed: bool = True, mean_flow: bool = False) -> DiTConfig:
    """Return the shape of HunyuanVideo-1.0 (text to video).

    Args:
        guidance_embed: with the guidance embedder, as in the released guidance-distilled weights.
        mean_flow: with the r-embedder of the DisCa release, averaged with the t-embedder.

    Returns:
        20 double and 40 single blocks of width 3072.
    """
    return DiTConfig(guidance_embed=guidance_embed, mean_flow=mean_flow, time_reduction="mean")


def hunyuan_video_1_5(*, mean_flow: bool = False) -> DiTConfig:
    """Return the shape of HunyuanVideo-1.5.

    Its 65 input channels are 32 of the latent, 32 of the conditioning latent and one mask
    (`Condition.latents`).

    Args:
        mean_flow: with the r-embedder of the step-distilled weights, summed with the t-embedder.

    Returns:
        54 double blocks of width 2048 with separate q, k and v.
    """
    return DiTConfig(
        in_channels=65,
        out_channels=32,
        patch=(1, 1, 1),
        hidden=2048,
        heads=16,
        double_blocks=54,
        single_blocks=0,
        text_dim=3584,
        pooled_dim=None,
        mean_flow=mean_flow,
        split_qkv=True,
        glyph_dim=1472,
        image_dim=1152,
    )
