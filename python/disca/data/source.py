# SPDX-License-Identifier: Apache-2.0
"""What training and evaluation need of a data set: batches of clips with their conditions."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from disca.errors import UserError
from disca.models.condition import Condition

__all__ = ["SPLITS", "ClipBatch", "ClipSource", "build_source"]

SPLITS = ("train", "test")

#: kind -> "module:class", by name so that one source never imports the libraries of another.
_KINDS = {
    "digits": "disca.data.digits:MovingDigits",
    "video": "disca.data.video:VideoClips",
}


@dataclass(frozen=True)
class ClipBatch:
    """Clips with the conditions that describe them.

    Attributes:
        clips: float32 ``[B, C, F, H, W]`` in [-1, 1].
        condition: the encoded prompts, one per clip.
        labels: int64 ``[B, 3]`` (digit, direction, speed), or None for unlabelled sources.
    """

    clips: Tensor
    condition: Condition
    labels: Tensor | None = None

    def __len__(self) -> int:
        return self.clips.shape[0]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ClipBatch:
        """Return the batch on `device`; `dtype` applies to clips and condition, never to labels."""
        labels = None if self.labels is None else self.labels.to(device=device)
        return replace(
            self,
            clips=self.clips.to(device=device, dtype=dtype),
            condition=self.condition.to(device=device, dtype=dtype),
            labels=labels,
        )


@runtime_checkable
class ClipSource(Protocol):
    """A data set of clips. Everything it draws comes from the generator it is handed."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(C, F, H, W)`` of one clip."""
        ...

    @property
    def text_dim(self) -> int:
        """Width of a text token."""
        ...

    @property
    def text_tokens(self) -> int:
        """Number of text tokens after padding."""
        ...

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text vector."""
        ...

    def sample(self, n: int, generator: torch.Generator, *, split: str = "train") -> ClipBatch:
        """Draw `n` clips of `split` ("train" or "test")."""
        ...

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts; raises UserError for a prompt the source does not know."""
        ...

    def null(self, n: int) -> Condition:
        """`n` copies of the empty prompt, the condition of unconditional passes."""
        ...


def build_source(config: Mapping[str, Any]) -> ClipSource:
    """Build the source that `config` describes.

    Args:
        config: ``{"kind": "digits" | "video", **options}``; the options are the keyword arguments
            of `disca.data.digits.MovingDigits` or `disca.data.video.VideoClips`.

    Raises:
        UserError: unknown kind, unknown or missing option, or a value the source refuses.
    """
    options = dict(config)
    if "kind" not in options:
        raise UserError(f"data: 'kind' is missing; it must be one of {_listing(_KINDS)}")
    kind = options.pop("kind")
    if kind not in _KINDS:
        raise UserError(
            f"data: unknown kind {kind!r}; it must be one of {_listing(_KINDS)}"
            + closest(str(kind), list(_KINDS))
        )
    module, name = _KINDS[kind].split(":")
    source = getattr(importlib.import_module(module), name)
    check_options(f"data of kind {kind!r}", source, options)
    return cast(ClipSource, source(**options))


def check_options(what: str, constructor: Any, options: Mapping[str, Any]) -> None:
    """Raise UserError unless `options` names arguments of `constructor` and all required ones."""
    parameters = inspect.signature(constructor).parameters
    for name in options:
        if name not in parameters:
            raise UserError(
                f"{what}: unknown option {name!r}; the options are {_listing(parameters)}"
                + closest(str(name), list(parameters))
            )
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise UserError(f"{what}: option {name!r} is missing")


def check_integer(name: str, value: Any, minimum: int) -> int:
    """Return `value` if it is an integer of at least `minimum`, else raise UserError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise UserError(f"{name} must be at least {minimum}, got {value}")
    return value


def check_share(name: str, value: Any) -> float:
    """Return `value` if it is a number strictly between 0 and 1, else raise UserError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(f"{name} must be a number between 0 and 1, got {value!r}")
    return float(value)


def check_split(split: str) -> str:
    """Return `split` if it names a split, else raise UserError."""
    if split not in SPLITS:
        raise UserError(f"split must be one of {_listing(SPLITS)}, got {split!r}")
    return split


def closest(word: str, known: Sequence[str]) -> str:
    """The end of an error message: a suggestion for a mistyped word, or nothing."""
    match = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def _listing(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
