"""The numbers that the original implementation computed, through the public loading path."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lavis.common.types import Sample, Spans
from lavis.datasets.collate import collate
from lavis.processors.conversation import ChatML, ConversationEncoder, Turn
from lavis.processors.tokenizer import QwenTokenizer
from tests.conftest import FIXTURES

TOLERANCE = 1e-5


def _samples(model: Any, expected: dict[str, Any]) -> list[Sample]:
    samples = []
    for i, conversation in enumerate(expected["conversations"]):
        encoded = model.encoder.encode([Turn(t["from"], t["value"]) for t in conversation])
        samples.append(
            Sample(
                sample_id=str(i),
                input_ids=torch.tensor(encoded.input_ids),
                labels=torch.tensor(encoded.labels),
                spans=Spans(expected["image"][i : i + 1]),
            )
        )
    return samples


def test_vision_side(toy_model: Any, expected: dict[str, Any]) -> None:
    with torch.no_grad():
        vit = toy_model.vision.encode_vit(expected["image"])
        projected = toy_model.encode_image(expected["image"])
    assert (vit - expected["vit_output"]).abs().max() < TOLERANCE
    assert (projected - expected["image_embeds_projected"]).abs().max() < TOLERANCE


def test_ids_and_labels(toy_model: Any, expected: dict[str, Any]) -> None:
    for i, sample in enumerate(_samples(toy_model, expected)):
        length = len(sample.input_ids)
        assert sample.input_ids.tolist() == expected["input_ids"][i, :length].tolist()
        assert sample.labels.tolist() == expected["labels"][i, :length].tolist()
        assert (expected["input_ids"][i, length:] == expected["eod"]).all()
        assert (expected["labels"][i, length:] == -100).all()


def test_loss_and_projector_gradient(toy_model: Any, expected: dict[str, Any]) -> None:
    samples = _samples(toy_model, expected)
    for sample, loss in zip(samples, expected["per_sample_loss"], strict=True):
        out = toy_model(collate([sample]))
        assert abs(out.loss_sum.item() / out.num_tokens - loss) < TOLERANCE
    out = toy_model(collate(samples))
    loss = out.loss_sum / out.num_tokens
    assert abs(loss.item() - expected["loss"]) < TOLERANCE
    loss.backward()
    proj = toy_model.connector
    assert (proj.weight.grad - expected["grad_llm_proj_weight"]).abs().max() < TOLERANCE
    assert (proj.bias.grad - expected["grad_llm_proj_bias"]).abs().max() < TOLERANCE
    assert [n for n, p in toy_model.named_parameters() if p.grad is not None] == [
        "connector.weight",
        "connector.bias",
    ]


@pytest.mark.parametrize(
    ("prompt", "images", "ids"),
    [
        ("prompt", [0], ("greedy_ids", 0)),
        ("prompt", [1], ("greedy_ids", 1)),
        ("multi_turn_prompt", [0], ("multi_turn_greedy_ids", None)),
        ("two_image_prompt", [0, 1], ("two_image_greedy_ids", None)),
    ],
)
def test_greedy_ids(
    toy_model: Any, expected: dict[str, Any], prompt: str, images: list[int], ids: tuple[str, Any]
) -> None:
    wanted = expected[ids[0]] if ids[1] is None else expected[ids[0]][ids[1]]
    sample = {"image": expected["image"][images], "text": expected[prompt]}
    assert toy_model.generate(sample, chat=True, max_new_tokens=len(wanted)) == [wanted]


def test_greedy_ids_in_one_batch(toy_model: Any, expected: dict[str, Any]) -> None:
    prompts = [expected["prompt"], expected["two_image_prompt"], expected["multi_turn_prompt"]]
    images = expected["image"][[0, 0, 1, 0]]
    wanted = [
        expected["greedy_ids"][0],
        expected["two_image_greedy_ids"],
        expected["multi_turn_greedy_ids"],
    ]
    got = toy_model.generate({"image": images, "text": prompts}, chat=True, max_new_tokens=24)
    assert got == wanted


def test_chat_asks_what_generate_asks(toy_model: Any, expected: dict[str, Any]) -> None:
    image = expected["image"][:1]
    history: list[tuple[str, str]] = [("<Img><ImageHere></Img> What is it?", "It is a cat.")]
    answer, new_history = toy_model.chat("再说一遍。", history, image, max_new_tokens=24)
    ids = expected["multi_turn_greedy_ids"]
    assert answer == toy_model.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert new_history[-1] == ("再说一遍。", answer)


def test_tokenizer_against_the_original() -> None:
    dashscope = pytest.importorskip("dashscope")
    from pathlib import Path

    tokenizer = QwenTokenizer(Path(dashscope.__file__).parent / "resources" / "qwen.tiktoken")
    cases = json.loads((FIXTURES / "qwen_tokenizer_expected.json").read_text(encoding="utf-8"))
    assert len(cases) >= 20
    for case in cases:
        assert tokenizer.encode_markup(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    encoder = ConversationEncoder(tokenizer, ChatML(tokenizer), 32)
    assert tokenizer.im_start_id == 151644
    assert encoder.prompt_from_markup("<ImageHere>") == [151646] * 32
