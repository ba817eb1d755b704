"""Values that a user may type."""

from __future__ import annotations

from typing import Any

import pytest

from lavis.chat import ChatEngine, ChatSettings, Conversation
from lavis.common.errors import ConfigError


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
@pytest.mark.parametrize("value", [1e-40, 1e40, 10**400], ids=["small", "large", "huge"])
def test_what_would_overflow_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"generation setting {name} must be "):
        ChatSettings(**{name: value})


@pytest.mark.parametrize(
    "values",
    [
        {"do_sample": True, "temperature": 2, "top_p": 1, "repetition_penalty": 2},
        {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1e6},
        {"do_sample": True, "temperature": 1e6, "repetition_penalty": 1e-6},
        {"num_beams": 2, "repetition_penalty": 2},
    ],
)
def test_whole_numbers_and_the_ends_of_ranges_answer(
    toybox: ChatEngine, values: dict[str, Any]
) -> None:
    answer = Conversation(toybox, ChatSettings(max_new_tokens=6, seed=1, **values)).ask("Hello.")
    answer.read()
    assert answer.finished and answer.exchange.finish in ("stop", "length")


def test_any_name_can_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="unknown generation setting 'self'"):
        ChatSettings().changed(self=1)
