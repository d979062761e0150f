# SPDX-License-Identifier: Apache-2.0
"""Multi-scale discriminator on the features of a frozen host."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from disca.errors import UserError
from disca.models.condition import Condition
from disca.models.configs import DiTConfig
from disca.models.host import Host

__all__ = ["Discriminator", "frozen"]

Kernel = Literal["space_time", "time"]


class Discriminator(nn.Module):
    """Judge latents by the features that a frozen video model sees in them.

    The host runs on (x, t, r, cond); after each tapped block its video tokens, layer-normalised
    without weights, are laid out on the (f, h, w) grid and one spectral-normed head maps them to
    logits. The heads together are D and the host is F in the hinge losses of DisCa (arXiv
    2602.05449, eq. 7 and 8). Gradients reach x but not the host's weights. The paper leaves taps
    and heads open; the defaults follow public discriminators on diffusion features.
    """

    def __init__(
        self,
        host_config: DiTConfig,
        *,
        taps: Sequence[int] | None = None,
        width: int | None = None,
        kernel: Kernel = "space_time",
    ) -> None:
        """Build one head for each tap.

        Args:
            host_config: shape of the host.
            taps: numbers of blocks after which features are taken, increasing, each in 1 .. depth;
                None for a quarter, a half, three quarters and all of the depth.
            width: channels of the heads; None for the host's width, at most 1024.
            kernel: neighbourhood of the residual convolution: "space_time" is 3x3x3, "time" 3x1x1.

        Raises:
            UserError: if a tap is out of range or out of order, or the kernel is unknown.
        """
        super().__init__()
        depth = host_config.depth
        if taps is None:
            taps = sorted({max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3, 4)})
        ordered = all(before < after for before, after in pairwise(taps))
        if not taps or not ordered or taps[0] < 1 or taps[-1] > depth:
            raise UserError(
                f"taps must be increasing block numbers in 1 .. {depth}, got {list(taps)}"
            )
        if kernel not in ("space_time", "time"):
            raise UserError(f'kernel must be "space_time" or "time", got {kernel!r}')
        self.taps = tuple(taps)
        width = min(host_config.hidden, 1024) if width is None else width
        self.heads = nn.ModuleList(_Head(host_config.hidden, width, kernel) for _ in self.taps)

    def forward(
        self, host: Host, x: Tensor, t: Tensor, r: Tensor | None, cond: Condition
    ) -> list[Tensor]:
        """Return one logit map [B, 1, f, h, w] per tap.

        Args:
            host: the feature extractor; its weights are treated as constants.
            x: latents to judge [B, C, F, H, W].
            t: their noise levels [B].
            r: end times [B], for a host that takes them; usually t.
            cond: condition of the batch.

        Returns:
            Logits, high for what looks real, in the order of the taps.
        """
        logits = []
        with frozen(host):
            state, done = host.embed(x, t, r, cond), 0
            for tap, head in zip(self.taps, self.heads, strict=True):
                state, done = host.run(state, done, tap), tap
                video = F.layer_norm(state.video, state.video.shape[-1:])
                grid = video.transpose(1, 2).unflatten(2, state.grid)  # type: ignore[no-untyped-call]
                logits.append(head(grid))
        return logits


class _Head(nn.Module):
    """1x1 convolution, residual convolution over neighbours, 1x1 convolution to a logit."""

    def __init__(self, channels: int, width: int, kernel: Kernel) -> None:
        super().__init__()
        size = (3, 3, 3) if kernel == "space_time" else (3, 1, 1)
        padding = (1, 1, 1) if kernel == "space_time" else (1, 0, 0)
        self.enter = spectral_norm(nn.Conv3d(channels, width, 1))
        self.mix = spectral_norm(nn.Conv3d(width, width, size, padding=padding))
        self.leave = spectral_norm(nn.Conv3d(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.enter(x), 0.2)
        x = (x + F.leaky_relu(self.mix(x), 0.2)) * 0.5**0.5
        logits: Tensor = self.leave(x)
        return logits


@contextmanager
def frozen(host: Host) -> Iterator[None]:
    """Treat a host's weights as constants: graphs built inside give them no gradient.

    Args:
        host: the model; the weights' `requires_grad` flags are restored at the end.

    Yields:
        None.
    """
    trainable = [parameter for parameter in host.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
