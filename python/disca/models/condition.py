# SPDX-License-Identifier: Apache-2.0
"""What a video model is conditioned on."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from disca.errors import UserError

__all__ = ["Condition"]

_LENGTHS = ("text_lengths", "glyph_lengths")
# Fields whose second dimension is a token count that may differ between two conditions.
_TOKENS = ("text", "glyph")


@dataclass(frozen=True)
class Condition:
    """Everything besides the latent and the times that a model reads; B is the batch size.

    Padding sits at the end of each row of `text`: row b holds `text_lengths[b]` real tokens. What
    the padding contains never reaches the output.

    Attributes:
        text: text features [B, L, text_dim].
        text_lengths: number of real text tokens [B], int64, each in [0, L].
        pooled: one vector for the whole prompt [B, pooled_dim], for models with `vector_in`.
        guidance: guidance scale g [B] for models with `guidance_in`; the model multiplies by 1000.
        latents: further input channels [B, C', F, H, W] that the model concatenates behind the
            noisy latent (HunyuanVideo-1.5: 32 channels of the conditioning latent and one mask
            channel).
        glyph: byT5 features of the text to draw [B, L', glyph_dim] (HunyuanVideo-1.5).
        glyph_lengths: number of real glyph tokens [B], int64.
        image: vision features of a conditioning image [B, L'', image_dim] (HunyuanVideo-1.5); None
            for text-to-video.
    """

    text: Tensor
    text_lengths: Tensor
    pooled: Tensor | None = None
    guidance: Tensor | None = None
    latents: Tensor | None = None
    glyph: Tensor | None = None
    glyph_lengths: Tensor | None = None
    image: Tensor | None = None

    @property
    def batch(self) -> int:
        """Number of rows B."""
        return self.text.shape[0]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Condition":
        """Move every tensor to `device` and every floating-point tensor to `dtype`.

        Args:
            device: target device, or None to stay.
            dtype: target floating-point type, or None to keep each.

        Returns:
            A new condition; the lengths stay int64.
        """
        moved = {}
        for name, value in self._tensors().items():
            to = None if name in _LENGTHS else dtype
            moved[name] = value.to(device=device, dtype=to)
        return replace(self, **moved)

    def with_guidance(self, guidance: float | Tensor | None) -> "Condition":
        """Replace the guidance scale.

        Args:
            guidance: one scale for every row, a tensor [B], or None for a model without guidance
                embedder.

        Returns:
            A new condition that shares the other tensors.

        Raises:
            UserError: if a tensor of another shape than [B] is given.
        """
        if isinstance(guidance, Tensor):
            if guidance.shape != (self.batch,):
                raise UserError(
                    f"guidance must be a number or a tensor of shape [{self.batch}], "
                    f"got shape {list(guidance.shape)}"
                )
            return replace(self, guidance=guidance)
        if guidance is None:
            return replace(self, guidance=None)
        dtype = self.text.dtype if self.text.dtype == torch.float64 else torch.float32
        row = torch.full((self.batch,), float(guidance), device=self.text.device, dtype=dtype)
        return replace(self, guidance=row)

    def select(self, index: Tensor | slice) -> "Condition":
        """Take some rows of every tensor.

        Args:
            index: a slice, or an index or boolean tensor over the batch.

        Returns:
            A new condition with those rows.
        """
        return replace(self, **{name: value[index] for name, value in self._tensors().items()})

    @staticmethod
    def cat(conditions: Sequence["Condition"]) -> "Condition":
        """Stack conditions along the batch; shorter text is padded with zeros at its end.

        Args:
            conditions: at least one; all of them have the same optional fields.

        Returns:
            One condition whose batch is the sum of theirs.

        Raises:
            UserError: if there is none, or an optional field is present in some only.
        """
        if not conditions:
            raise UserError("Condition.cat needs at least one condition, got none")
        rows = [condition._tensors() for condition in conditions]
        names = rows[0].keys()
        for row in rows[1:]:
            if row.keys() != names:
                differing = sorted(names ^ row.keys())
                raise UserError(
                    f"conditions to stack must have the same fields; {differing} are in some only"
                )
        joined = {}
        for name in names:
            parts = [row[name] for row in rows]
            if name in _TOKENS:
                longest = max(part.shape[1] for part in parts)
                parts = [F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts]
            joined[name] = torch.cat(parts)
        return replace(conditions[0], **joined)

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}
