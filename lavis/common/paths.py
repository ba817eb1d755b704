"""Where the user's weights and data are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from lavis.common.errors import LavisError, WeightsError

LIBRARY_ROOT = Path(__file__).resolve().parent.parent
"""The ``lavis`` package, which holds the default configurations."""


def cache_path(path: str, cache_root: str) -> Path:
    """Resolve a path of a YAML file: absolute, or relative to ``env.cache_root``."""
    return (Path(cache_root).expanduser() / Path(path).expanduser()).absolute()


def user_cache() -> Path:
    """Where things are kept that can be computed again: ``$XDG_CACHE_HOME/lavis``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lavis"


def is_file(path: Path) -> bool:
    """Whether a file is there. A name that is too long for the file system names none."""
    return _answers(path.is_file)


def require(path: Path, key: str, error: type[LavisError], *, directory: bool = False) -> Path:
    """Return ``path`` if it exists.

    Args:
        key: dotted name of the setting that led here, for the message.
        error: the exception class to raise.

    Raises:
        LavisError: the path is missing or of the wrong kind; the message names the last part of
            the path that does exist.
    """
    if _answers(path.is_dir if directory else path.is_file):
        return path
    kind = "folder" if directory else "file"
    if _answers(path.exists):
        raise error(f"{key}: {path} is not a {kind}{_checkpoint_in(path)}")
    nearest = next(p for p in (*path.parents, Path("/")) if _answers(p.exists))
    raise error(
        f"{key}: no {kind} {path} (the nearest existing folder is {nearest}). Put it there, set "
        f"{key}, or point env.cache_root at the folder that holds your weights and data"
    )


def require_checkpoint(path: str | Path, key: str = "") -> Path:
    """Return the path of a checkpoint if it is a file; ``key`` is the setting that names it.

    Raises:
        WeightsError: it is missing, or a folder, in which the message offers the newest.
    """
    if is_file(path := Path(path).expanduser()):
        return path
    wrong = f"no checkpoint {path}"
    if _answers(path.is_dir):
        wrong = f"{path} is a folder, not a checkpoint{_checkpoint_in(path)}"
    raise WeightsError(f"{key}: {wrong}" if key else wrong)


def _checkpoint_in(folder: Path) -> str:
    found = [*folder.glob("checkpoint_*.pth"), *folder.glob("*/checkpoint_*.pth")]
    found.sort(key=lambda p: (p.name == "checkpoint_latest.pth", p.stat().st_mtime))
    return f"; it holds {found[-1]}" if found else ""


def require_writable(folder: Path, key: str, error: type[LavisError]) -> None:
    """Check that a folder can be made or written to, without making it.

    Raises:
        LavisError: the message names what is in the way.
    """
    nearest = next(p for p in (folder, *folder.absolute().parents) if _answers(p.exists))
    if not nearest.is_dir():
        raise error(f"{key}: {folder} cannot be a folder, since {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise error(f"{key}: {folder} cannot be written: no permission to write to {nearest}")


def _answers(probe: Callable[[], bool]) -> bool:
    try:
        return probe()
    except OSError:
        return False
