"""The versions this package was tried with, compared with what is installed."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from lavis.common.errors import ConfigError
from lavis.common.paths import LIBRARY_ROOT

_TOP = LIBRARY_ROOT.parent
_DISTRIBUTION = "lavis-minigpt4qwen"


def check_packages(extra: str = "", purpose: str = "") -> None:
    """Check that every package is there in a version that was tried; imports none of them.

    Args:
        extra: an extra of ``pyproject.toml``, such as ``lora``; without, what every run needs.
        purpose: what the extra is wanted for, such as ``model.get_lora: true``.

    Raises:
        ConfigError: with the versions and the command that installs them.
    """
    wrong = []
    for wanted in _requirements(extra):
        try:
            installed = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name}{wanted.specifier}, which is not installed")
            continue
        if not wanted.specifier.contains(installed, prereleases=True):
            wrong.append(f"{wanted.name}{wanted.specifier}, not {installed}")
    if wrong:
        clone = f".[{extra}]" if extra else "."
        target = f"'{clone}'" if _is_clone() else f"'{_DISTRIBUTION}{clone[1:]}'"
        raise ConfigError(
            f"{purpose or 'this package'} needs {'; '.join(wrong)}. Install with: pip install "
            f"{'-e ' * _is_clone()}{target}"
        )


def _is_clone() -> bool:
    return (_TOP / "pyproject.toml").is_file() and (_TOP / "requirements.txt").is_file()


def _requirements(extra: str) -> Iterator[Requirement]:
    if not _is_clone():  # an installed copy: core and extras stand in one list, told by markers
        for wanted in map(Requirement, metadata.requires(_DISTRIBUTION) or ()):
            marker = wanted.marker
            always = marker is None or marker.evaluate({"extra": ""})
            if always != bool(extra) and (marker is None or marker.evaluate({"extra": extra})):
                yield wanted
        return
    lines = (_TOP / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if extra:
        project = tomllib.loads((_TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        lines = project["optional-dependencies"][extra]
    yield from map(Requirement, lines)
