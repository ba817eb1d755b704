"""Named extension points.

Each kind of building block has one :class:`Registry`. Built-in entries are registered by the
package that owns them as ``"module:attribute"`` strings, so that looking at a configuration
never imports PyTorch; third parties register with a decorator in a module that they name under
``imports:`` in their YAML.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lavis.common.errors import ConfigError

if TYPE_CHECKING:
    from lavis.common.optim import Schedule

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


class Registry(Generic[T]):
    """Maps names to objects of one kind.

    Args:
        kind: what the entries are, for error messages.
        home: package whose import registers the built-in entries; imported on first use.
    """

    def __init__(self, kind: str, home: str) -> None:
        self.kind = kind
        self._home: str | None = home
        self._targets: dict[str, T | str] = {}
        self._configs: dict[str, type] = {}

    def register(
        self, name: str, target: T | str | None = None, *, config: type | None = None
    ) -> Callable[[Any], Any]:
        """Register ``target`` (an object or a ``"module:attribute"`` string), or decorate a class.

        Args:
            config: the frozen dataclass that types the entry's YAML block. Without it the
                entry's own ``Config`` attribute is used.

        Raises:
            ConfigError: if the name is taken by something else.
        """

        def add(value: Any) -> Any:
            if name in self._targets and self._targets[name] != value:
                raise ConfigError(f"{self.kind} {name!r} is registered twice")
            self._targets[name] = value
            if config is not None:
                self._configs[name] = config
            return value

        return add if target is None else add(target)

    def names(self) -> list[str]:
        """All registered names, sorted."""
        if self._home is not None:
            home, self._home = self._home, None
            importlib.import_module(home)
        return sorted(self._targets)

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def get(self, name: str) -> T:
        """Return the entry, importing its module if needed.

        Raises:
            ConfigError: if the name is unknown; the message lists the known and nearest names.
        """
        self.check(name)
        target = self._targets[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = getattr(importlib.import_module(module), attribute)
            self._targets[name] = target
        return target

    def config(self, name: str) -> Any:
        """Return the dataclass that types the entry's configuration."""
        self.check(name)
        config = self._configs.get(name) or getattr(self.get(name), "Config", None)
        if config is None:
            raise ConfigError(
                f"{self.kind} {name!r} has no configuration: give its class a `Config` dataclass, "
                "or register it with config=..."
            )
        return config

    def having(self, key: str) -> list[str]:
        """Names of the entries whose registered configuration has a field ``key``."""
        kinds = sorted(self._configs.items())
        return [name for name, kind in kinds if key in {field.name for field in fields(kind)}]

    def check(self, name: str) -> None:
        """Raise :class:`ConfigError` unless ``name`` is registered."""
        if name not in self:
            raise ConfigError(
                f"unknown {self.kind} {name!r}{did_you_mean(name, self.names())} "
                f"(known: {', '.join(self.names())})"
            )


MODELS: Registry[Any] = Registry("model arch", home="lavis.models")
BUILDERS: Registry[Any] = Registry("dataset builder", home="lavis.datasets")
PROCESSORS: Registry[Any] = Registry("processor", home="lavis.processors")
VISION_ENCODERS: Registry[Any] = Registry("vision encoder", home="lavis.models")
CONNECTORS: Registry[Any] = Registry("connector", home="lavis.models")
LANGUAGE_MODELS: Registry[Any] = Registry("language model", home="lavis.models")
TASKS: Registry[Any] = Registry("task", home="lavis.tasks")
METRICS: Registry[Any] = Registry("score", home="lavis.tasks")
RUNNERS: Registry[Any] = Registry("runner", home="lavis.runners")
LR_SCHEDULERS: Registry[type[Schedule]] = Registry(
    "learning-rate schedule", home="lavis.common.optim"
)


def import_plugins(modules: Iterable[str]) -> None:
    """Import third-party modules, named by a YAML's ``imports:``, so that they can register.

    Raises:
        ConfigError: if a module cannot be found.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except (ValueError, TypeError) as error:  # empty or relative
            raise ConfigError(f"imports: {module!r} is no module name such as a.b") from error
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            raise ConfigError(
                f"imports: no module named {module!r}; install it or add its folder to PYTHONPATH"
            ) from error
