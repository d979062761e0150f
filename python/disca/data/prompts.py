# SPDX-License-Identifier: Apache-2.0
"""Prompts such as "7 left fast": parsing, labels and one-hot text features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from disca.data.source import closest
from disca.errors import UserError
from disca.models.condition import Condition

__all__ = ["DIAGONALS", "DIRECTIONS", "NULL", "SPEEDS", "PromptEncoder"]

NULL = "<null>"

#: word -> (dy, dx) per unit of speed; rows grow downwards.
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
DIAGONALS = {"up-left": (-1, -1), "up-right": (-1, 1), "down-left": (1, -1), "down-right": (1, 1)}

#: word -> pixels per frame.
SPEEDS = {"slow": 1, "fast": 2}


class PromptEncoder:
    """Turns prompts "digit direction speed" into labels and into a `Condition`.

    A token is a one-hot row. With two digits each digit is a token of its own, and a digit has
    another row on the left ("3_") than on the right ("_3"): the text tokens carry no positions, so
    "37" and "73" must differ as sets. The pooled vector is the sum of the rows. The empty prompt is
    the single token ``<null>``.

    Args:
        digits: digits in a prompt, 1 or 2.
        diagonals: whether the four diagonal directions are words too.
    """

    def __init__(self, digits: int = 1, diagonals: bool = False) -> None:
        self.digits = digits
        self.directions = (*DIRECTIONS, *DIAGONALS) if diagonals else tuple(DIRECTIONS)
        self.speeds = tuple(SPEEDS)
        tens = [f"{d}_" for d in range(10)] if digits == 2 else []
        ones = [f"_{d}" if digits == 2 else f"{d}" for d in range(10)]
        self.vocabulary: tuple[str, ...] = (NULL, *tens, *ones, *self.directions, *self.speeds)

    @property
    def tokens(self) -> int:
        """Text tokens of a prompt, which is also the padded length."""
        return self.digits + 2

    @property
    def label_sizes(self) -> tuple[int, int, int]:
        """Number of classes of digit (10 or 100), direction and speed."""
        return 10**self.digits, len(self.directions), len(self.speeds)

    def all_prompts(self) -> list[str]:
        """Every prompt, digits slowest and speeds fastest."""
        numbers, directions, speeds = self.label_sizes
        grid = torch.cartesian_prod(*(torch.arange(n) for n in (numbers, directions, speeds)))
        return self.prompts(grid)

    def prompts(self, labels: Tensor) -> list[str]:
        """The prompts of int64 labels ``[B, 3]``; inverse of `labels`."""
        return [
            f"{number:0{self.digits}d} {self.directions[direction]} {self.speeds[speed]}"
            for number, direction, speed in labels.tolist()
        ]

    def labels(self, prompts: Sequence[str]) -> Tensor:
        """Parse prompts to int64 labels ``[B, 3]``.

        Raises:
            UserError: a word is unknown, out of order, missing or one too many. The empty prompt
                has no label and is refused too.
        """
        _check_list(prompts)
        rows = [self._parse(prompt) for prompt in prompts]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts; "" and "<null>" are the empty prompt.

        Returns:
            A condition with text float32 ``[B, L, V]`` (padded rows zero), text_lengths int64
            ``[B]`` (1 for the empty prompt, else L) and pooled float32 ``[B, V]``.

        Raises:
            UserError: see `labels`.
        """
        _check_list(prompts)
        empty = torch.tensor([prompt.strip() in ("", NULL) for prompt in prompts])
        placeholder = self.prompts(torch.zeros(1, 3, dtype=torch.int64))[0]
        parsed = self.labels(
            [placeholder if e else p for p, e in zip(prompts, empty.tolist(), strict=True)]
        )
        condition = self.encode_labels(parsed)
        if not empty.any():
            return condition
        null = self.null(len(prompts))
        text = torch.where(empty[:, None, None], null.text, condition.text)
        lengths = torch.where(empty, null.text_lengths, condition.text_lengths)
        return _condition(text, lengths)

    def encode_labels(self, labels: Tensor) -> Condition:
        """The condition of int64 labels ``[B, 3]``, without a detour through strings."""
        number, direction, speed = labels.unbind(1)
        after_digits = 1 + 10 * self.digits
        ids = [number % 10 + after_digits - 10]
        if self.digits == 2:
            ids.insert(0, number // 10 + 1)
        ids.append(direction + after_digits)
        ids.append(speed + after_digits + len(self.directions))
        text = F.one_hot(torch.stack(ids, 1), len(self.vocabulary)).float()  # [B, L, V]
        lengths = torch.full((len(labels),), self.tokens, dtype=torch.int64)
        return _condition(text, lengths)

    def null(self, n: int) -> Condition:
        """`n` empty prompts: the token ``<null>`` and zero padding."""
        text = torch.zeros(n, self.tokens, len(self.vocabulary))
        text[:, 0, 0] = 1.0
        lengths = torch.ones(n, dtype=torch.int64)
        return _condition(text, lengths)

    def _parse(self, prompt: str) -> tuple[int, int, int]:
        words = prompt.lower().split()
        form = f'"{"37" if self.digits == 2 else "7"} left fast" (digit direction speed)'
        kinds = [self._kind(prompt, word) for word in words]
        if len(words) != 3:
            raise UserError(
                f"prompt {prompt!r} has {len(words)} words, expected 3 in the form {form}"
            )
        if kinds != ["digit", "direction", "speed"]:
            raise UserError(f"prompt {prompt!r} reads {' '.join(kinds)}, expected the form {form}")
        return int(words[0]), self.directions.index(words[1]), self.speeds.index(words[2])

    def _kind(self, prompt: str, word: str) -> str:
        if word in self.directions:
            return "direction"
        if word in self.speeds:
            return "speed"
        if word.isascii() and word.isdigit():
            if len(word) == self.digits:
                return "digit"
            raise UserError(
                f"prompt {prompt!r}: {word!r} has {len(word)} digits, this data has {self.digits}"
            )
        digits = "00 to 99" if self.digits == 2 else "0 to 9"
        raise UserError(
            f"prompt {prompt!r}: unknown word {word!r}; known are the digits {digits}, "
            f"the directions {', '.join(self.directions)} and the speeds {', '.join(self.speeds)}"
            + closest(word, [*self.directions, *self.speeds])
        )


def _condition(text: Tensor, lengths: Tensor) -> Condition:
    return Condition(text=text, text_lengths=lengths, pooled=text.sum(1), guidance=None)


def _check_list(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise UserError(f"prompts must be a list of prompts, got the single string {prompts!r}")
