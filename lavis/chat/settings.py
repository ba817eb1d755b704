"""How answers are chosen."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lavis.common.errors import ConfigError
from lavis.common.registry import did_you_mean
from lavis.models.generation_settings import plain_setting


@dataclass(frozen=True)
class ChatSettings:
    """Generation settings, under the names that Transformers gives them.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        max_window_size: longest prompt, in tokens; older turns beyond it are left out.
        do_sample: draw tokens instead of taking the likeliest.
        temperature: divides the logits before drawing; under 1 is more predictable.
        top_p: draw from the likeliest tokens that together have this probability (nucleus).
        top_k: draw from this many of the likeliest tokens; 0: from all.
        repetition_penalty: divides the scores of tokens that the answer already has
            (Keskar et al. 2019, section 4.1); 1: none.
        num_beams: beams of beam search; 1: none.
        seed: the same seed, conversation and settings give the same answer; ``None``: a new seed
            for every answer.
    """

    max_new_tokens: int = 512
    max_window_size: int = 6144
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: naming the setting and what it may be.
        """
        for name, value in dataclasses.asdict(self).items():
            if value is not None:
                object.__setattr__(self, name, plain_setting(name, value))
            elif name != "seed":
                raise ConfigError(f"generation setting {name} has no value")
        if self.do_sample and self.num_beams > 1:
            raise ConfigError(
                "beam search does not draw tokens: set do_sample to False or num_beams to 1"
            )

    def changed(self, /, **values: Any) -> ChatSettings:
        """A copy with other values.

        Raises:
            ConfigError: a name is unknown or a value does not fit.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"unknown generation setting {name!r}{did_you_mean(name, known)}; "
                    f"there are {', '.join(known)}"
                )
        return dataclasses.replace(self, **values)

    def without_effect(self) -> list[str]:
        """Names of settings that are changed but matter only with ``do_sample``."""
        drawing = ("temperature", "top_p", "top_k")
        default = ChatSettings()
        if self.do_sample:
            return []
        return [name for name in drawing if getattr(self, name) != getattr(default, name)]

    def generation(self) -> dict[str, Any]:
        """The settings that ``model.chat`` takes too."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "seed"}
