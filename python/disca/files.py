# SPDX-License-Identifier: Apache-2.0
"""What several parts of the model layer do with files."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["file_digest"]

_BLOCK = 1 << 20


def file_digest(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes, read a block at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
