"""Image and text processors, and the tokenizer's file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lavis.common.errors import WeightsError
from lavis.processors.config import (
    CLIP_MEAN,
    CLIP_STD,
    BaseInstructionConfig,
    BaseTextConfig,
    BlipCaptionConfig,
    ImageEvalConfig,
    ImageTrainConfig,
)
from lavis.processors.image import Blip2ImageTrain, BlipImageEval
from lavis.processors.text import BaseInstruction, BaseText, BlipCaption, process_around_images
from lavis.processors.tokenizer import QwenTokenizer
from tests.conftest import TOY

VOCABULARY = TOY / "cache" / "ckpt" / "Qwen7B-chat" / "qwen.tiktoken"


def gradient(width: int, height: int) -> Image.Image:
    rows = np.arange(height)[:, None] * np.ones(width)[None]
    columns = np.arange(width)[None] * np.ones(height)[:, None]
    return Image.fromarray(np.stack([rows, columns, rows * 0 + 51], -1).astype(np.uint8))


# --- images ---------------------------------------------------------------------------------


def test_eval_normalizes_like_clip() -> None:
    image = Image.new("RGB", (5, 9), (51, 102, 204))
    tensor = BlipImageEval(ImageEvalConfig("blip_image_eval", image_size=7))(image)
    assert tensor.shape == (3, 7, 7)
    assert tensor.dtype == torch.float32
    for channel, value in enumerate((0.2, 0.4, 0.8)):
        wanted = (value - CLIP_MEAN[channel]) / CLIP_STD[channel]
        assert tensor[channel] == pytest.approx(wanted, abs=1e-6)


def test_eval_resizes_to_a_square_without_cropping() -> None:
    plain = ImageEvalConfig("blip_image_eval", 6, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    tensor = BlipImageEval(plain)(gradient(12, 3)) * 255
    assert tensor[1, 0].tolist() == sorted(tensor[1, 0].tolist())
    assert tensor[1].min() < 2
    assert tensor[1].max() > 9
    assert tensor[2].eq(51).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (4, 4), "white").convert(mode)
    plain = ImageEvalConfig("blip_image_eval", 4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert BlipImageEval(plain)(image).eq(1).all()


def test_train_draws_from_pytorchs_generator() -> None:
    processor = Blip2ImageTrain(ImageTrainConfig("blip2_image_train", image_size=8))
    image = gradient(40, 30)
    torch.manual_seed(3)
    first, second = processor(image), processor(image)
    torch.manual_seed(3)
    assert torch.equal(processor(image), first)
    assert not torch.equal(first, second)
    assert first.shape == (3, 8, 8)


def test_train_flips_half_of_the_images_and_crops_nothing_at_scale_one() -> None:
    config = ImageTrainConfig(
        "blip2_image_train", 9, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), min_scale=1.0, max_scale=1.0
    )
    processor = Blip2ImageTrain(config)
    image = gradient(9, 9)
    straight = BlipImageEval(ImageEvalConfig("blip_image_eval", 9, config.mean, config.std))(image)
    flipped = straight.flip(-1)
    seen = [processor(image) for _ in range(40)]
    whole = [t for t in seen if torch.equal(t, straight) or torch.equal(t, flipped)]
    assert any(torch.equal(t, straight) for t in whole)
    assert any(torch.equal(t, flipped) for t in whole)


# --- text -----------------------------------------------------------------------------------


def test_base_instruction_changes_nothing() -> None:
    text = "  <Img><ImageHere></Img> What IS it? " + "word " * 200
    assert BaseInstruction(BaseInstructionConfig("base_instruction", max_words=3))(text) == text


def test_base_text() -> None:
    processor = BaseText(BaseTextConfig("base_text", max_words=3))
    assert processor("A Red. Square") == "a red. square"
    assert processor("A Red. Square here") == "a red. square"


def test_blip_caption() -> None:
    processor = BlipCaption(BlipCaptionConfig("blip_caption", prompt="a photo of ", max_words=3))
    assert processor("A  (Red) square!\n") == "a photo of a red square"
    assert processor("one two three four") == "a photo of one two three"


IMAGE = "<Img><ImageHere></Img>"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"{IMAGE} What IS it?", f"{IMAGE} what is"),
        ("<ImageHere>\n<ImageHere>What IS it?", "<ImageHere>\n<ImageHere>what is"),
        ("<Img> <ImageHere><ImageHere> </Img>  A B C", "<Img> <ImageHere><ImageHere> </Img>  a b"),
        (f"What IS it? {IMAGE}", f"what is {IMAGE}"),  # images past max_words stay
        (f"A B C {IMAGE} D E F {IMAGE}\n", f"a b {IMAGE} d e {IMAGE}\n"),
        ("A \ue000 <imagehere> B", "a \ue000"),
        (IMAGE, IMAGE),
        ("", ""),
    ],
)
def test_texts_are_processed_around_images(text: str, wanted: str) -> None:
    processor = BaseText(BaseTextConfig("base_text", max_words=2))
    assert process_around_images(processor, text) == wanted
    whole = BaseInstruction(BaseInstructionConfig("base_instruction"))
    assert process_around_images(whole, text) == text


def test_a_prompt_stands_before_text_and_not_before_an_image() -> None:
    caption = BlipCaption(BlipCaptionConfig("blip_caption", prompt="see ", max_words=2))
    assert process_around_images(caption, f"{IMAGE} (What) IS it") == f"{IMAGE} see what is"
    assert process_around_images(caption, "") == "see "


# --- the vocabulary -------------------------------------------------------------------------


def test_special_tokens_follow_the_ranks(tokenizer: Any) -> None:
    assert len(tokenizer.special_tokens) == 208
    assert (tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id) == (1200, 1201, 1202)
    assert tokenizer.image_id == 1203
    assert tokenizer.special_tokens["<|extra_204|>"] == 1407
    assert tokenizer.vocab_size == 1408
    assert tokenizer.encode("\n") == [198]


def test_markup_and_text(tokenizer: Any) -> None:
    assert tokenizer.encode_markup("a<|im_end|>b") == [64, 1202, 65]
    assert tokenizer.encode("a<|im_end|>b") == [64, 27, 91, 318, 62, 408, 91, 29, 65]


def test_decode(tokenizer: Any) -> None:
    assert tokenizer.decode([64, 1202, 65]) == "a<|im_end|>b"
    assert tokenizer.decode([64, 1202, 65], skip_special_tokens=True) == "ab"
    ids = tokenizer.encode("黑")
    assert tokenizer.decode(ids) == "黑"
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd")


def _refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        QwenTokenizer(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\nnot base64\n", ":2: not a base64 token and its rank"),
        (b"IQ== 0\n\xff\xfe 1\n", ":2: not a base64 token and its rank"),
        (b"IQ==\n", ":1: not a base64 token and its rank"),
        (b"IQ== 0\nIg== 5\n", ": the ranks are not 0 to 1 without gaps"),
        (b"IQ== 0\nIQ== 1\n", ": the ranks are not 0 to 0 without gaps"),
        (b"", " lacks 256 of the 256 single bytes: cut short, or no vocabulary of Qwen"),
        (b"IQ== 0\nIg== 1\n", " lacks 254 of the 256 single bytes: cut short, or no vocabulary "),
    ],
)
def test_damaged_vocabulary(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(content)
    assert _refusal(path).startswith(f"{path}{message}")


def test_missing_vocabulary(tmp_path: Path) -> None:
    assert _refusal(tmp_path / "x") == (
        f"no vocabulary {tmp_path / 'x'}; it comes with the language model's weights"
    )


def test_a_vocabulary_of_bytes_is_enough(tmp_path: Path) -> None:
    lines = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)]
    path = tmp_path / "qwen.tiktoken"
    path.write_text("\n".join(lines))
    tokenizer = QwenTokenizer(path)
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 0x0A]
    assert tokenizer.image_id == 259
