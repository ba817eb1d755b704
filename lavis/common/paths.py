"""Where the user's weights and data are."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lavis.common.errors import ConfigError, LavisError, WeightsError
from lavis.common.registry import did_you_mean

LIBRARY_ROOT = Path(__file__).resolve().parent.parent
"""The ``lavis`` package, which holds the default configurations."""


def cache_path(path: str, cache_root: str) -> Path:
    """Resolve a path of a YAML file: absolute, or relative to ``env.cache_root``."""
    return (user_path(cache_root) / user_path(path)).absolute()


def user_path(text: str | Path) -> Path:
    """A path as a user writes it: ``~`` and ``~name`` are home folders.

    Raises:
        ConfigError: there is no such user, or an environment variable was left to a shell.
    """
    variable = re.match(r"\$(\w+)", str(text))
    if variable and variable[1] in os.environ:
        raise ConfigError(
            f"{text}: no shell has put in ${variable[1]}; in YAML and --options write "
            f"${{oc.env:{variable[1]}}}"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{text}: no such user has a home folder here; ./{text} is below the working directory"
        ) from error


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
        raise error(f"{key}: {path} is not a {kind}")
    nearest = next(p for p in (*path.parents, Path("/")) if _answers(p.exists))
    raise error(
        f"{key}: no {kind} {path} (the nearest existing folder is {nearest}). Put it there, set "
        f"{key}, or point env.cache_root at the folder that holds your weights and data"
    )


def require_checkpoint(path: str | Path, key: str) -> Path:
    """The checkpoint file that a user names.

    Raises:
        WeightsError: it is missing; or it is a folder, whose newest checkpoint is offered.
    """
    path = user_path(path)
    if is_file(path):
        return path
    if not _answers(path.is_dir):
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.pth")))
        raise WeightsError(f"{key}: no checkpoint {path}{near}")
    name = "checkpoint_*.pth"  # of a run's folder, or of the folder that holds runs
    found = [p for pattern in (name, f"*/{name}") for p in path.glob(pattern)]
    if not found:
        raise WeightsError(f"{key}: {path} is a folder without any {name}; name a .pth file")
    best = max(found, key=lambda p: (p.name == "checkpoint_latest.pth", p.stat().st_mtime))
    raise WeightsError(f"{key}: {path} is a folder; its newest checkpoint is {best}, name that")


def require_writable(
    target: Path, key: str, error: type[LavisError], *, directory: bool = True
) -> None:
    """Check that a folder or a file can be made or written to, without making it.

    Raises:
        LavisError: the message names what is in the way.
    """
    if not directory and _answers(target.is_dir):
        raise error(f"{key}: {target} is a folder; name a file")
    folder = (target if directory else target.parent).absolute()
    nearest = folder
    try:
        while not os.path.lexists(nearest):
            nearest = nearest.parent
        if not nearest.is_dir():
            link = nearest.is_symlink()
            kind = f"a link to {os.readlink(nearest)}, no folder" if link else "a file"
            raise error(f"{key}: {target} cannot be a folder, since {nearest} is {kind}")
        for part in folder.relative_to(nearest).parts:
            with suppress(FileNotFoundError):
                (nearest / part).lstat()  # or its name is too long
        with tempfile.TemporaryFile(dir=nearest):  # asks for more than the permission bits say
            pass
    except (OSError, ValueError) as reason:
        raise error(f"{key}: {target} cannot be written: {reason}") from reason


def _answers(probe: Callable[[], bool]) -> bool:
    try:
        return probe()
    except OSError:
        return False
