"""Named extension points."""

from __future__ import annotations

import pytest

from lavis.common.errors import ConfigError
from lavis.common.registry import (
    BUILDERS,
    LR_SCHEDULERS,
    MODELS,
    PROCESSORS,
    RUNNERS,
    TASKS,
    Registry,
    did_you_mean,
)


@pytest.fixture()
def pets() -> Registry[object]:
    registry: Registry[object] = Registry("pet", home="lavis.common")
    registry.register("cat", 3)
    registry.register("python", "fractions:Fraction")
    return registry


def test_object_and_lazy_target(pets: Registry[object]) -> None:
    from fractions import Fraction

    assert pets.get("cat") == 3
    assert pets.get("python") is Fraction
    assert pets.names() == ["cat", "python"]
    assert "cat" in pets
    assert "dog" not in pets


def test_unknown_name_lists_the_known_and_the_nearest(pets: Registry[object]) -> None:
    with pytest.raises(ConfigError) as caught:
        pets.get("cta")
    assert str(caught.value) == "unknown pet 'cta'; did you mean 'cat'? (known: cat, python)"
    with pytest.raises(ConfigError) as caught:
        pets.check("zebra")
    assert str(caught.value) == "unknown pet 'zebra' (known: cat, python)"


def test_decorator_returns_the_class(pets: Registry[object]) -> None:
    @pets.register("dog")
    class Dog:
        Config = int

    assert pets.get("dog") is Dog
    assert pets.config("dog") is int


def test_config_argument_goes_before_the_class(pets: Registry[object]) -> None:
    @pets.register("dog", config=float)
    class Dog:
        Config = int

    assert pets.config("dog") is float


def test_entry_without_a_configuration(pets: Registry[object]) -> None:
    with pytest.raises(ConfigError, match=r"^pet 'cat' has no configuration: give its class a "):
        pets.config("cat")


def test_a_name_is_taken_once(pets: Registry[object]) -> None:
    pets.register("cat", 3)  # the same thing again is no conflict
    with pytest.raises(ConfigError, match=r"^pet 'cat' is registered twice$"):
        pets.register("cat", 4)
    assert pets.get("cat") == 3


def test_did_you_mean() -> None:
    assert did_you_mean("init_rl", ["init_lr", "min_lr"]) == "; did you mean 'init_lr'?"
    assert did_you_mean("zzz", ["init_lr"]) == ""
    assert did_you_mean("x", []) == ""


def test_names_of_the_original_are_registered() -> None:
    assert "minigpt4qwen" in MODELS
    assert {
        "minigpt4_instruction",
        "llava_instruction",
        "llava_pretrain",
        "llava_instruct_100k",
        "llava_instruct_156k",
        "videochatgpt_100k",
    } <= set(BUILDERS.names())
    assert {
        "blip2_image_train",
        "blip_image_eval",
        "base_instruction",
        "base_text",
        "blip_caption",
    } <= set(PROCESSORS.names())
    assert {
        "linear_warmup_cosine_lr",
        "linear_warmup_step_lr",
        "constant_lr",
        "linear_warmup_cosine_lr_step-wise",
    } <= set(LR_SCHEDULERS.names())
    assert "image_text_pretrain" in TASKS
    assert "runner_base" in RUNNERS


@pytest.mark.parametrize("registry", [MODELS, BUILDERS, PROCESSORS, TASKS, RUNNERS, LR_SCHEDULERS])
def test_every_entry_can_be_imported(registry: Registry[object]) -> None:
    for name in registry.names():
        if not name.startswith("my_"):  # what a test of third parties registered
            assert callable(registry.get(name)), name
