# SPDX-License-Identifier: Apache-2.0
"""Write files whole or not at all."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from disca.data.io import atomic_path
from disca.errors import UserError

__all__ = ["check_section", "output_folder", "replace_section", "write_text"]


def output_folder(path: Path) -> Path:
    """Make the folder if it is not there and prove that files can be written into it.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to the folder {path}: {error.strerror or error}") from error
    return path


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_section(path: Path, name: str, text: str) -> None:
    """Put ``text`` between the markers of a section of a Markdown file, atomically.

    The markers are the comments ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` on lines of
    their own. What lies around them stays as it is.

    Args:
        path: the file; it must have the markers.
        name: name of the section.
        text: the new content.

    Raises:
        UserError: the file cannot be read or does not have both markers, in order and once.
    """
    before, after = _section(path, name)
    write_text(path, f"{before}\n{text.strip()}\n{after}")


def check_section(path: Path, name: str) -> None:
    """Raise UserError unless :func:`replace_section` would find its markers."""
    _section(path, name)


def _section(path: Path, name: str) -> tuple[str, str]:
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    pattern = f"^(.*^{re.escape(begin)}$).*(^{re.escape(end)}$.*)$"
    found = re.match(pattern, content, re.DOTALL | re.MULTILINE)
    if found is None or content.count(begin) != 1 or content.count(end) != 1:
        raise UserError(
            f"{path} needs the lines {begin!r} and {end!r}, once each and in this order"
        )
    return found[1], found[2]
