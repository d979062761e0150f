# SPDX-License-Identifier: Apache-2.0
"""A small classifier of moving digits: the semantic score and the features of the quality score."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from disca.data.io import atomic_path
from disca.data.source import ClipBatch, check_integer
from disca.errors import UserError

__all__ = ["ATTRIBUTES", "ClipClassifier", "LabelledSource", "train_classifier"]

ATTRIBUTES = ("digit", "direction", "speed")

#: Output channels, kernel in time, strides (time, height, width) of each convolution.
_LAYERS = (
    (16, 3, (2, 1, 1)),
    (32, 3, (1, 2, 2)),
    (64, 1, (1, 1, 1)),
    (96, 3, (2, 2, 2)),
)


class LabelledSource(Protocol):
    """A source of clips with labels, such as `disca.data.MovingDigits`."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(C, F, H, W)`` of one clip."""
        ...

    @property
    def label_sizes(self) -> tuple[int, int, int]:
        """Number of classes of digit, direction and speed."""
        ...

    def sample(self, n: int, generator: torch.Generator, *, split: str = "train") -> ClipBatch:
        """Draw `n` labelled clips."""
        ...


class ClipClassifier(nn.Module):
    """3-D convolutions on a torus with a head for digit, one for direction, one for speed.

    The canvas wraps round, so the convolutions pad circularly in space (with zeros in time), and
    mean and maximum over all positions are pooled: where the digit is makes no difference. With 100
    digit classes (two digits) the logit of "37" is the sum of a "3 on the left" and a "7 on the
    right" logit, so each digit is learned from all clips that show it.

    Args:
        channels: channels of a clip.
        label_sizes: classes of digit (10 or 100), direction and speed.
        feature_dim: width D of the features.
    """

    def __init__(
        self, channels: int, label_sizes: tuple[int, int, int], feature_dim: int = 64
    ) -> None:
        super().__init__()
        if label_sizes[0] not in (10, 100):
            raise UserError(f"the digit head has 10 or 100 classes, got {label_sizes[0]}")
        self.channels = channels
        self.label_sizes = tuple(label_sizes)
        self.feature_dim = feature_dim
        widths = (channels, *(width for width, _, _ in _LAYERS))
        self.layers = nn.ModuleList(
            _Convolution(before, *layer) for before, layer in zip(widths, _LAYERS, strict=False)
        )
        self.project = nn.Linear(2 * widths[-1], feature_dim)
        self.digit = nn.Linear(feature_dim, 10 if label_sizes[0] == 10 else 20)
        self.direction = nn.Linear(feature_dim, label_sizes[1])
        self.speed = nn.Linear(feature_dim, label_sizes[2])

    def features(self, clips: Tensor) -> Tensor:
        """Features ``[B, D]`` of clips ``[B, C, F, H, W]``, the input of all three heads."""
        x = clips
        for layer in self.layers:
            x = layer(x)
        pooled = torch.cat([x.mean((2, 3, 4)), x.amax((2, 3, 4))], 1)
        return F.relu(self.project(pooled))

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of digit, direction and speed, ``[B, classes]`` each."""
        features = self.features(clips)
        digit = self.digit(features)
        if self.label_sizes[0] == 100:
            left, right = digit.chunk(2, 1)
            digit = (left[:, :, None] + right[:, None, :]).flatten(1)
        return digit, self.direction(features), self.speed(features)

    @torch.no_grad()
    def predict(self, clips: Tensor, batch: int = 256) -> Tensor:
        """Most likely labels int64 ``[B, 3]`` in evaluation mode, `batch` clips at a time."""
        return self._evaluate(
            lambda part: torch.stack([logits.argmax(1) for logits in self(part)], 1), clips, batch
        )

    @torch.no_grad()
    def embed(self, clips: Tensor, batch: int = 256) -> Tensor:
        """`features` in evaluation mode without a graph, `batch` clips at a time."""
        return self._evaluate(self.features, clips, batch)

    def _evaluate(self, function: Callable[[Tensor], Tensor], clips: Tensor, batch: int) -> Tensor:
        if clips.dim() != 5 or clips.shape[1] != self.channels or len(clips) == 0:
            raise UserError(
                f"the classifier reads clips [B, {self.channels}, F, H, W] with B > 0, "
                f"got shape {list(clips.shape)}"
            )
        mode = self.training
        self.eval()
        try:
            return torch.cat([function(part) for part in torch.split(clips.float(), batch)])
        finally:
            self.train(mode)

    def save(self, path: str | Path) -> None:
        """Write weights and sizes as one safetensors file; raises UserError if it cannot."""
        sizes = {
            "channels": self.channels,
            "label_sizes": self.label_sizes,
            "feature_dim": self.feature_dim,
        }
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        with atomic_path(path) as temporary:
            temporary.write_bytes(save(weights, metadata={"classifier": json.dumps(sizes)}))

    @classmethod
    def load(cls, path: str | Path) -> ClipClassifier:
        """Read a file of `save`, in evaluation mode.

        Raises:
            UserError: the file is missing, truncated or not a classifier.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                sizes = json.loads((file.metadata() or {})["classifier"])
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            model = cls(sizes["channels"], tuple(sizes["label_sizes"]), sizes["feature_dim"])
            model.load_state_dict(weights)
        except FileNotFoundError as error:
            raise UserError(f"classifier {str(path)!r} does not exist") from error
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{str(path)!r} is not a classifier file: {reason}") from error
        return model.eval()


class _Convolution(nn.Module):
    """Convolution, circular in space and zero-padded in time, batch norm, ReLU."""

    def __init__(self, before: int, after: int, time: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv3d(
            before, after, (time, 3, 3), stride, padding=(time // 2, 0, 0), bias=False
        )
        self.norm = nn.BatchNorm3d(after)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(F.pad(x, (1, 1, 1, 1, 0, 0), mode="circular")))
        return F.relu(y)


def train_classifier(
    source: LabelledSource,
    *,
    steps: int = 500,
    batch: int = 64,
    seed: int = 0,
    learning_rate: float = 3e-3,
    noise: float = 0.05,
    progress: Callable[[int, float], None] | None = None,
) -> ClipClassifier:
    """Train a classifier on the train split of `source`, on the CPU.

    Sum of three cross-entropies, AdamW with a one-cycle schedule. Initial weights, batches and
    noise come from `seed` alone; the global random state is left as it was. The same seed gives the
    same weights on one machine with one number of threads.

    Args:
        source: clips with labels.
        steps: optimiser steps.
        batch: clips a step.
        seed: seed of everything random.
        learning_rate: peak learning rate.
        noise: standard deviation of the white noise added to the clips, so that invisible noise in
            generated clips does not move the features.
        progress: called with step (from 1) and loss after each step.

    Returns:
        The classifier in evaluation mode.

    Raises:
        UserError: steps or batch out of range.
    """
    check_integer("classifier steps", steps, 1)
    check_integer("classifier batch", batch, 2)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ClipClassifier(source.shape[0], source.label_sizes)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, learning_rate, total_steps=steps, pct_start=0.2
    )
    for step in range(1, steps + 1):
        data = source.sample(batch, generator)
        if data.labels is None:
            raise UserError("the classifier needs a source with labels")
        clips = data.clips + noise * torch.randn(data.clips.shape, generator=generator)
        logits = model(clips)
        losses = [
            F.cross_entropy(head, label)
            for head, label in zip(logits, data.labels.unbind(1), strict=True)
        ]
        loss = torch.stack(losses).sum()
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step, loss.item())
    return model.eval()
