"""Hashes of files' bytes, remembered so that an unchanged file is read once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path

from lavis.common.paths import user_cache

logger = logging.getLogger(__name__)
_SETTLED_NS = 2_000_000_000  # a file changed this recently may change again unnoticed

Entry = list[int | str]


class FileHashes:
    """BLAKE2b of files' contents.

    What has been read is remembered by path, size and times of change, one table for each folder,
    in ``user_cache()/hashes``. A file that was changed in the last two seconds is not remembered:
    a clock may be too coarse to tell it from what replaces it.
    """

    def __init__(self) -> None:
        self._tables: dict[Path, dict[str, Entry]] = {}
        self._new: dict[Path, dict[str, Entry]] = {}

    def digest(self, path: Path) -> str:
        """Hash of a file's bytes, 64 hexadecimal digits.

        Raises:
            OSError: the file cannot be read.
        """
        path = path.absolute()
        stat = path.stat()
        known = self._table(path.parent).get(path.name)
        entry: Entry = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        if known is not None and known[:3] == entry:
            return str(known[3])
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS:
            self._new.setdefault(path.parent, {})[path.name] = [*entry, found]
        return found

    def save(self) -> None:
        """Remember what has been read since; without a word where that cannot be written."""
        for folder, new in self._new.items():
            file = _table_file(folder)
            temporary = file.with_suffix(f".{os.getpid()}.tmp")
            self._tables[folder] = _read(file) | new  # another process may have written
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_text(json.dumps(self._tables[folder]), encoding="utf-8")
                temporary.replace(file)
            except OSError as error:
                logger.info("hashes of files are not kept for the next run: %s", error)
        self._new.clear()

    def _table(self, folder: Path) -> dict[str, Entry]:
        if folder not in self._tables:
            self._tables[folder] = _read(_table_file(folder))
        return self._tables[folder]


def _table_file(folder: Path) -> Path:
    name = hashlib.blake2b(str(folder).encode(), digest_size=16).hexdigest()
    return user_cache() / "hashes" / f"{name}.json"


def _read(path: Path) -> dict[str, Entry]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {k: v for k, v in content.items() if isinstance(v, list) and len(v) == 4}
