"""Turn plain YAML values into frozen dataclasses, naming every mistake by its dotted path."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

from lavis.common.errors import ConfigError, at
from lavis.common.registry import Registry, did_you_mean

T = TypeVar("T")
Where = Callable[[str], str]
"""Maps a dotted path to the name of the file (or ``--options``) that set it."""

_EXPECTED = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    tuple: "a list",
    dict: "a mapping",
}


def only(value: Any, why: str) -> Any:
    """A dataclass field for a key of the original's dialect that allows one value here.

    Args:
        value: the default and only accepted value.
        why: one sentence for the user: why other values are refused and what to use instead.
    """
    return dataclasses.field(default=value, metadata={"why": why})


def ranged(default: T, *, least: float, below: float = math.inf) -> T:
    """A field of a :class:`Checked` dataclass: if set, it lies in [``least``, ``below``).

    NaN lies nowhere.
    """
    return dataclasses.field(default=default, metadata={"range": (least, below)})


class Checked:
    """Base of dataclasses with fields that are :func:`ranged`."""

    def __post_init__(self) -> None:
        """Check these.

        Raises:
            ConfigError: naming the field.
        """
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if "range" not in field.metadata or value is None:
                continue
            least, below = field.metadata["range"]
            if not least <= value < below:
                wanted = f"at least {least}" if value < least else f"in [{least}, {below})"
                raise ConfigError(f"{field.name} must be {wanted}, not {value}")


class Selected(Checked):
    """Base of dataclasses of which one of the keys selects the subclass.

    Attributes:
        REGISTRY: has the subclasses, by the values of the key.
        KEY: the key.
    """

    REGISTRY: ClassVar[Registry[Any]]
    KEY: ClassVar[str] = "name"

    @classmethod
    def __select__(cls, data: Mapping[str, Any], path: str, where: Where) -> type:
        """The subclass for what YAML holds at ``path``; arguments and errors as :func:`parse`."""
        registry, dotted = cls.REGISTRY, f"{path}.{cls.KEY}"
        if data.get(cls.KEY) is None:
            known, source = ", ".join(registry.names()), where(path)
            add = f"`{cls.KEY}: ...` to {path}"
            if source == "--options":
                add = f"--options {dotted}=..."
            raise ConfigError(
                f"{source}: {dotted} is missing (known: {known}); it says which {registry.kind} "
                f"the other keys are of: add {add}"
            )
        name = convert(str, data[cls.KEY], dotted, where)
        with at(f"{where(dotted)}: {dotted}"):
            return registry.config(name)


def parse(cls: type[T], data: Any, path: str, where: Where) -> T:
    """Build the dataclass ``cls`` from a mapping.

    Args:
        cls: a dataclass type; of :class:`Selected`, the subclass is built.
        data: what YAML holds at ``path``.
        path: dotted path of ``data``, for messages (empty at the top).
        where: names the source of a dotted path, for messages.

    Raises:
        ConfigError: unknown key, wrong type, missing key or refused value.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where(path)}: {path or 'file'} must be a mapping, not {data!r}")
    if issubclass(cls, Selected):
        cls = cls.__select__(data, path, where)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            dotted = _join(path, key)
            hint = did_you_mean(key, fields) or f" (known: {', '.join(sorted(fields))})"
            if issubclass(cls, Selected) and (others := cls.REGISTRY.having(key)):
                hint = f", which is of {cls.KEY}: {' or '.join(others)}"
            raise ConfigError(f"{where(dotted)}: unknown key {dotted!r}{hint}")
    values = {}
    for name, field in fields.items():
        dotted = _join(path, name)
        if name in data:
            values[name] = convert(hints[name], data[name], dotted, where)
            if "why" in field.metadata and values[name] != field.default:
                raise ConfigError(
                    f"{where(dotted)}: {dotted}: {data[name]!r} is refused: {field.metadata['why']}"
                )
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where(path)}: {dotted!r} is missing")
    try:
        return cls(**values)
    except ConfigError as error:  # raised by __post_init__, which knows field names only
        first = str(error).split(maxsplit=1)[0].rstrip(":")
        if first.partition(".")[0] in fields:
            dotted = _join(path, first)
            raise ConfigError(f"{where(dotted)}: {_join(path, error)}") from error
        here = f"{path}: " if path else ""
        raise ConfigError(f"{where(path)}: {here}{error}") from error


def convert(hint: Any, value: Any, path: str, where: Where) -> Any:
    """Check ``value`` against a type hint and convert it where YAML has several spellings.

    Raises:
        ConfigError: if the value does not fit the hint.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        options = [a for a in args if a is not type(None)]
        if value is None and len(options) < len(args):
            return None
        if len(options) == 1:
            return convert(options[0], value, path, where)
        if isinstance(value, Mapping) and sum(map(dataclasses.is_dataclass, options)) == 1:
            return convert(next(filter(dataclasses.is_dataclass, options)), value, path, where)
        for option in options:
            try:
                return convert(option, value, path, where)
            except ConfigError:
                continue
        raise _wrong(" or ".join(_describe(o) for o in options), value, path, where)
    if origin is Literal:
        if value not in args:
            near = did_you_mean(str(value), [str(a) for a in args])
            listed = ", ".join(str(a) for a in args)
            raise ConfigError(f"{where(path)}: {path}: {value!r} is not one of {listed}{near}")
        return value
    if origin is tuple:  # only tuple[X, ...]
        if not isinstance(value, list | tuple):
            raise _wrong("a list", value, path, where)
        return tuple(convert(args[0], v, f"{path}[{i}]", where) for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong("a mapping", value, path, where)
        return {k: convert(args[1], v, _join(path, k), where) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), value, path, where)
    return _convert_scalar(hint, value, path, where)


def _convert_scalar(hint: Any, value: Any, path: str, where: Where) -> Any:
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, int | float) and not is_bool:
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # YAML reads 2e8 as a float
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not is_bool):
        return value
    raise _wrong(_describe(hint), value, path, where)


def _describe(hint: Any) -> str:
    hint = typing.get_origin(hint) or hint
    return _EXPECTED.get(hint, getattr(hint, "__name__", str(hint)))


def _wrong(expected: str, value: Any, path: str, where: Where) -> ConfigError:
    kind = "nothing" if value is None else f"{value!r} ({type(value).__name__})"
    hint = ""
    if expected == _EXPECTED[str] and value is not None:
        text = str(value) if type(value) in (int, float) else "..."
        hint = f"; text that looks like something else needs quotes: {quoted(path, text, where)}"
    return ConfigError(f"{where(path)}: {path} must be {expected}, not {kind}{hint}")


def quoted(path: str, text: str, where: Where) -> str:
    """How to write a string where its source would read something else."""
    value = json.dumps(text, ensure_ascii=False)
    if where(path) == "--options":
        return f"--options {shlex.quote(f'{path}={value}')}"
    return f"{path.rpartition('.')[2]}: {value}"


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
