"""Where the user's weights and data are.

``os.path`` answers where a :class:`Path` raises: a name may be too long for the file system.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lavis.common.errors import ConfigError, LavisError, WeightsError, raised_as
from lavis.common.registry import did_you_mean

LIBRARY_ROOT = Path(__file__).resolve().parent.parent
"""The ``lavis`` package, which holds the default configurations."""
REPOSITORY = LIBRARY_ROOT.parent
TOYBOX = REPOSITORY / "examples" / "toybox"
"""The embedded model, which an installed package does not have."""


def cache_path(path: str, cache_root: str) -> Path:
    """Resolve a path of a YAML file: absolute, or relative to ``env.cache_root``."""
    return (user_path(cache_root) / user_path(path)).absolute()


def user_path(text: str | Path) -> Path:
    """A path as a user writes it: ``~`` and ``~name`` are home folders.

    Raises:
        ConfigError: there is no such user, or an environment variable was left to a shell.
    """
    if re.match(r"\$\w", str(text)):
        raise ConfigError(f"{text}: for an environment variable write ${{oc.env:NAME}}")
    expanded = os.path.expanduser(text)  # a Path would forget the ./ of ./~
    if str(expanded).startswith("~"):
        raise ConfigError(f"{text}: no such user has a home folder (a file: ./{text})")
    return Path(expanded)


def user_cache() -> Path:
    """Where things are kept that can be computed again: ``$XDG_CACHE_HOME/lavis``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lavis"


def is_file(path: Path) -> bool:
    """Whether a file is there. A name that is too long for the file system names none."""
    return os.path.isfile(path)


def require(path: Path, key: str, error: type[LavisError], *, directory: bool = False) -> Path:
    """Return ``path`` if it exists.

    Args:
        key: dotted name of the setting that led here, for the message.
        error: the exception class to raise.

    Raises:
        LavisError: the path is missing or of the wrong kind; the message names the last part of
            the path that does exist.
    """
    if (os.path.isdir if directory else os.path.isfile)(path):
        return path
    kind = "folder" if directory else "file"
    if os.path.exists(path):
        raise error(f"{key}: {path} is not a {kind}{_checkpoint_in(path)}")
    nearest = next(p for p in (*path.parents, Path("/")) if os.path.exists(p))
    raise error(
        f"{key}: no {kind} {path} (the nearest existing folder is {nearest}). Put it there, set "
        f"{key}, or point env.cache_root at the folder that holds your weights and data"
    )


def require_checkpoint(path: str | Path, key: str = "") -> Path:
    """Return the path of a checkpoint if it is a file.

    Args:
        key: dotted name of the setting that led here, if there is one, for the message.

    Raises:
        WeightsError: it is missing, or a folder, in which the message offers the newest.
    """
    if is_file(path := user_path(path)):
        return path
    at = f"{key}: " if key else ""
    if os.path.isdir(path):
        inside = _checkpoint_in(path) or ", and holds no checkpoint_*.pth"
        raise WeightsError(f"{at}{path} is a folder, not a checkpoint{inside}")
    near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.pth")))
    raise WeightsError(f"{at}no checkpoint {path}{near}")


def _checkpoint_in(folder: Path) -> str:
    """What to name in place of a run's folder, or of the folder that holds runs, if anything."""
    found = [*folder.glob("checkpoint_*.pth"), *folder.glob("*/checkpoint_*.pth")]
    found.sort(key=lambda p: (p.name == "checkpoint_latest.pth", p.stat().st_mtime))
    return f"; it holds {found[-1]}" if found else ""


def require_writable(
    target: Path, key: str, error: type[LavisError], *, directory: bool = True
) -> None:
    """Check that a folder or a file can be made or written to, without making it.

    Raises:
        LavisError: the message names what is in the way.
    """
    at = f"{key}: " if key else ""
    if not directory and os.path.isdir(target):
        raise error(f"{at}{target} is a folder; name a file")
    folder = nearest = (target if directory else target.parent).absolute()
    with raised_as(error, f"{at}{target} cannot be written", OSError, ValueError):
        while not os.path.lexists(nearest):
            nearest = nearest.parent
        if not nearest.is_dir():
            kind = f"a broken link to {nearest.readlink()}" if nearest.is_symlink() else "a file"
            raise error(f"{at}{folder} cannot be a folder, since {nearest} is {kind}")
        for part in folder.relative_to(nearest).parts:
            with suppress(FileNotFoundError):
                (nearest / part).lstat()  # or its name is too long
        with tempfile.TemporaryFile(dir=nearest):  # asks for more than the permission bits say
            pass


@contextmanager
def replaces(target: Path) -> Iterator[Path]:
    """Make a file whole or not at all: give a path to write to, which takes the place of
    ``target`` when the block ends, once it is on disk. Nothing is left of a block that fails.

    Raises:
        OSError: such as a full disk; an old ``target`` is untouched.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    with suppress(OSError):  # not every file system can sync a folder
        _sync(target.parent)


@contextmanager
def makes_folder(target: Path) -> Iterator[Path]:
    """As :func:`replaces`, of a folder that is not there yet, or is empty."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        with suppress(OSError):
            target.rmdir()  # an empty one
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
