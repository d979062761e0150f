# SPDX-License-Identifier: Apache-2.0
"""Checks of what is passed to a video DiT."""

import torch
from torch import Tensor

from disca.errors import UserError
from disca.models.condition import Condition
from disca.models.configs import DiTConfig

__all__ = ["check_inputs"]


def check_inputs(
    config: DiTConfig, x: Tensor, t: Tensor, r: Tensor | None, cond: Condition
) -> None:
    """Check shapes, and values where reading them costs no synchronisation.

    Times and lengths are read only from plain CPU tensors outside `torch.compile`; on an
    accelerator a wrong value there is the caller's to avoid.

    Args:
        config: shape of the model.
        x: latent with its conditioning channels.
        t: start times.
        r: end times, or None.
        cond: condition of the batch.

    Raises:
        UserError: saying what was expected and what came.
    """
    if x.dim() != 5 or x.shape[1] != config.in_channels:
        raise UserError(
            f"x must be a latent [B, C, F, H, W] with C = {config.in_channels} "
            f"(conditioning channels included), got shape {list(x.shape)}"
        )
    if any(
        size % patch or size == 0 for size, patch in zip(x.shape[2:], config.patch, strict=True)
    ):
        raise UserError(
            f"frames, rows and columns must be positive multiples of the patch "
            f"{list(config.patch)}, got {list(x.shape[2:])}"
        )
    _check_times(config, x.shape[0], t, r)
    _check_condition(config, x.shape[0], cond)


def _check_times(config: DiTConfig, batch: int, t: Tensor, r: Tensor | None) -> None:
    if config.mean_flow and r is None:
        raise UserError(
            "this model predicts average velocities (mean_flow) and needs r; pass r = t for the "
            "velocity at t"
        )
    if not config.mean_flow and r is not None:
        raise UserError("r was given, but this model has no r-embedder (mean_flow is off)")
    for name, value in (("t", t), ("r", r)):
        if value is None:
            continue
        if value.shape != (batch,) or not value.is_floating_point():
            raise UserError(
                f"{name} must be a floating-point tensor of shape [{batch}] with values in [0, 1], "
                f"got {value.dtype} of shape {list(value.shape)}"
            )
    if r is not None and _readable(t, r) and bool((r > t).any()):
        row = int((r > t).nonzero()[0])
        raise UserError(
            f"a step goes from t to r <= t, got t = {float(t[row])} and r = {float(r[row])} "
            f"in row {row}"
        )


def _check_condition(config: DiTConfig, batch: int, cond: Condition) -> None:
    _check_sequence("text", cond.text, cond.text_lengths, config.text_dim, batch)
    switches = (
        ("pooled", cond.pooled, config.pooled_dim is not None, "pooled_dim"),
        ("guidance", cond.guidance, config.guidance_embed, "guidance_embed"),
        ("glyph", cond.glyph, config.glyph_dim is not None, "glyph_dim"),
    )
    for name, value, wanted, key in switches:
        if wanted and value is None:
            raise UserError(f"this model needs cond.{name} (its {key} is set), got None")
        if not wanted and value is not None:
            raise UserError(
                f"cond.{name} was given, but this model has no embedder for it ({key} is not set)"
            )
    if cond.pooled is not None and cond.pooled.shape != (batch, config.pooled_dim):
        raise UserError(
            f"cond.pooled must be [{batch}, {config.pooled_dim}], got {list(cond.pooled.shape)}"
        )
    if cond.guidance is not None and cond.guidance.shape != (batch,):
        raise UserError(f"cond.guidance must be [{batch}], got {list(cond.guidance.shape)}")
    if cond.glyph is not None and config.glyph_dim is not None:
        if cond.glyph_lengths is None:
            raise UserError("cond.glyph needs cond.glyph_lengths, got None")
        _check_sequence("glyph", cond.glyph, cond.glyph_lengths, config.glyph_dim, batch)
    if cond.image is not None:
        if config.image_dim is None:
            raise UserError(
                "cond.image was given, but this model has no embedder for it (image_dim is not set)"
            )
        if cond.image.dim() != 3 or cond.image.shape[::2] != (batch, config.image_dim):
            raise UserError(
                f"cond.image must be [{batch}, L, {config.image_dim}], got {list(cond.image.shape)}"
            )


def _check_sequence(name: str, value: Tensor, lengths: Tensor, width: int, batch: int) -> None:
    if value.dim() != 3 or value.shape[0] != batch or value.shape[2] != width:
        raise UserError(f"cond.{name} must be [{batch}, L, {width}], got {list(value.shape)}")
    if lengths.shape != (batch,) or lengths.is_floating_point():
        raise UserError(
            f"cond.{name}_lengths must be integers of shape [{batch}], got {lengths.dtype} "
            f"of shape {list(lengths.shape)}"
        )
    longest = value.shape[1]
    if _readable(lengths) and bool(((lengths < 0) | (lengths > longest)).any()):
        raise UserError(f"cond.{name}_lengths must lie in [0, {longest}], got {lengths.tolist()}")


def _readable(*tensors: Tensor) -> bool:
    """Whether values can be read without waiting for a device or breaking a trace."""
    if torch.compiler.is_compiling():
        return False
    return all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in tensors)
