"""Values that a user may type."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

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


def test_numbers_of_other_libraries_become_pythons() -> None:
    given = ChatSettings(
        temperature=np.float32(0.5), top_k=np.int64(3), do_sample=np.bool_(True),
        top_p=torch.tensor(0.25), repetition_penalty=2, seed=np.uint32(7),
    )  # fmt: skip
    assert given == ChatSettings(
        temperature=0.5, top_k=3, do_sample=True, top_p=0.25, repetition_penalty=2.0, seed=7
    )
    assert json.loads(json.dumps(dataclasses.asdict(given)))["seed"] == 7
    for wrong in (np.array([0.5]), np.float32("nan"), np.str_("1"), True):
        with pytest.raises(ConfigError, match=r"^generation setting temperature must be positive"):
            ChatSettings(temperature=wrong)


def test_any_name_can_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="unknown generation setting 'self'"):
        ChatSettings().changed(self=1)
