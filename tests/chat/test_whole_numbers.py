"""Settings that may be any number take whole ones too."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 2, "repetition_penalty": 2, "top_p": 1},
        {"num_beams": 2, "repetition_penalty": 2},
    ],
)
def test_a_whole_number_is_a_number(toybox_engine: Any, settings: dict[str, Any]) -> None:
    from lavis.chat import ChatSettings, Conversation

    conversation = Conversation(toybox_engine, ChatSettings(max_new_tokens=2, seed=0))
    answer = conversation.ask("What?", **settings)
    answer.read()
    assert answer.ids
