"""Errors that are addressed to the user: the message says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class LavisError(Exception):
    """Base of every error a user can cause. Entry points print its message without a traceback.

    Args:
        agreed: every process of the run raises it, so that one of them prints it for all.
    """

    def __init__(self, message: str, *, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed


class ConfigError(LavisError):
    """A YAML file or an ``--options`` item is wrong."""


class WeightsError(LavisError):
    """A weight file, a checkpoint or a vocabulary is missing, damaged or does not fit the model."""


class DataError(LavisError):
    """An annotation file or a sample is wrong."""


def listed(items: Sequence[str], separator: str = ", ", most: int = 8) -> str:
    """The first items of a list for a message, and how many more there are."""
    more = [f"and {len(items) - most} more"] * (len(items) > most)
    return separator.join([*items[:most], *more])


def in_lines(items: Sequence[str], most: int = 10) -> str:
    """As :func:`listed`, each on a line of its own after what the message says; maybe none."""
    return listed(["", *items], "\n  ", most + 1)


def first_line(error: Exception) -> str:
    """An error of a library, in a line."""
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:300]


@contextmanager
def at(place: str, kind: type[LavisError] = ConfigError) -> Iterator[None]:
    """Put a place in front of the message of an error of a kind from inside."""
    try:
        yield
    except kind as error:
        raise type(error)(f"{place}: {error}", agreed=error.agreed) from error


@contextmanager
def raised_as(kind: type[LavisError], what: str, *errors: type[Exception]) -> Iterator[None]:
    """Raise errors of the system or a library from inside as the user's: what is wrong, and why."""
    try:
        yield
    except errors as error:
        raise kind(f"{what}: {error}") from error
