"""The toybox's SigLIP tower: what it is taught, and that its folder is a vision encoder."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.toybox import siglip
from examples.toybox.world.scenes import HELD_OUT, Thing
from lavis.common.config import load_config
from lavis.models.build import Assembly
from tests.conftest import REPO


def test_a_patch_is_asked_for_the_words_of_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = (Thing("big", "red", "circle", 5),)  # the right of the middle row
    monkeypatch.setattr(siglip, "random_scene", lambda rng, held_out: scene)
    pixels, words = siglip.pictures(random.Random(0), 1)
    assert words.shape == (1, 36, len(siglip.WORDS))
    found = [{siglip.WORDS[i] for i in patch.nonzero().flatten()} for patch in words[0]]
    red = pixels[0, 0].float() - pixels[0, 2] > 100
    inside = red.unfold(0, 14, 14).unfold(1, 14, 14).flatten(0, 1).flatten(1).any(1)
    assert inside.sum() == 4  # what a big circle covers
    for covered, said in zip(inside, found, strict=True):
        assert (said == {"east", "big", "red", "circle"}) == covered
        assert covered or (said > {"empty"} and len(said) == 2)


def test_no_held_out_pair_is_shown() -> None:
    _, words = siglip.pictures(random.Random(0), 300)
    for colour, shape in HELD_OUT:
        both = words[..., [siglip.WORDS.index(colour), siglip.WORDS.index(shape)]]
        assert both.any(0).any(0).all()
        assert not both.all(-1).any()


def test_its_folder_is_the_vision_encoder_of_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = ["--out", str(tmp_path), "--pictures", "40", "--steps", "12"]
    monkeypatch.setattr(sys, "argv", ["siglip", *setting])
    assert siglip.main() == 0
    file = REPO / "lavis" / "projects" / "toybox" / "siglip.yaml"
    config: Any = load_config(file, [f"model.vision.path={tmp_path}", f"env.cache_root={REPO}"])
    vision = Assembly.build_vision(config.model, cache_root=str(REPO), device=torch.device("cpu"))
    assert (vision.tokens, vision.width) == (36, 96)
    transform = config.model.transform(str(REPO))
    assert (transform.image_size, transform.mean, transform.std) == (84, (0.5,) * 3, (0.5,) * 3)
    picture = torch.rand(1, 3, 84, 84, generator=torch.Generator().manual_seed(0)) * 2 - 1
    stock = siglip.SiglipVisionModel.from_pretrained(tmp_path)(picture).last_hidden_state
    torch.testing.assert_close(vision(picture), stock)
