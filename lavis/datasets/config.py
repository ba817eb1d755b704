"""What a block of ``datasets`` may hold besides what every block does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lavis.common.errors import ConfigError
from lavis.common.schema import DatasetConfig
from lavis.common.typed import only


@dataclass(frozen=True)
class BenchmarkConfig(DatasetConfig):
    """A block of ``datasets`` whose files are a public benchmark's; ``builder`` says which."""

    format: Literal["minigpt4qwen", "llava"] = only(
        "minigpt4qwen", "a benchmark's files have their own format; remove the key"
    )
    prompt: str | None = None  # with {question} in it; without, the benchmark's usual one

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.prompt.count("{question}") != 1:
            raise ConfigError(f"prompt must hold {{question}} once, not {self.prompt!r}")
