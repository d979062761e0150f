# SPDX-License-Identifier: Apache-2.0
"""What a comparison keeps while it runs, so that it can be stopped and go on."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from disca.compare.files import write_text
from disca.compare.results import SeedScores
from disca.errors import UserError

__all__ = ["Record", "Timings"]

Kept = TypeVar("Kept", bound="_Kept")


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid")

    identity: str

    @classmethod
    def load(cls: type[Kept], path: Path, identity: str) -> Kept | None:
        """Return what a file holds, or None if there is none.

        Raises:
            UserError: the file is damaged, or of other settings or weights.
        """
        if not path.is_file():
            return None
        try:
            kept = cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise UserError(f"{path} is damaged; delete it to make it anew") from error
        if kept.identity != identity:
            raise UserError(
                f"{path} was made with other settings, data or weights; take another --out, "
                f"or delete {path.parent} to begin anew"
            )
        return kept


class Record(_Kept):
    """One row at one seed; the fields are those of :class:`disca.compare.results.Row`."""

    scores: SeedScores
    hooked: list[str] = []
    computed: list[int] = []
    skipped: list[int] = []
    cache_bytes: int = 0
    flops: float = 0
    error_per_step: list[float] | None = None

    @classmethod
    def of_real(cls, identity: str, scores: SeedScores) -> Record:
        """Return the record of real clips."""
        return cls(identity=identity, scores=scores)


class Timings(_Kept):
    """Peak memory of every row, and the seconds of every row (loop, end to end) by repeat."""

    peaks: dict[str, int] = Field(default_factory=dict)
    repeats: list[dict[str, tuple[float, float]]] = Field(default_factory=list)

    @classmethod
    def start(cls, path: Path, identity: str) -> Timings:
        """Return what was kept; new timings if there are none or of other rows."""
        try:
            kept = cls.load(path, identity)
        except UserError:
            kept = None
        return kept or cls(identity=identity)

    def save(self, path: Path) -> None:
        """Write the timings, whole or not at all."""
        write_text(path, self.model_dump_json())
