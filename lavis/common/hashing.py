"""Hashes of files' bytes and of settings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def file_digest(path: Path) -> str:
    """BLAKE2b of a file's bytes, 64 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def settings_digest(settings: object) -> str:
    """BLAKE2b of what JSON can hold, 64 hexadecimal digits; the order of keys does not count."""
    text = json.dumps(settings, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=32).hexdigest()
