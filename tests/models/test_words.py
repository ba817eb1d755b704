"""Spans that are described in words in place of an image."""

from __future__ import annotations

from typing import Any

import torch

from lavis.common.types import Spans


def test_a_position_is_the_sum_of_its_words(toy_model: Any) -> None:
    table = toy_model.language.model.get_input_embeddings().weight
    words = torch.tensor([[[5, 6, -1], [7, -1, -1]]])
    embeds = toy_model.embed_words(words)
    assert torch.equal(embeds[0, 0], table[5] + table[6])
    assert torch.equal(embeds[0, 1], table[7])


def test_pictures_and_words_in_the_order_of_the_text(toy_model: Any) -> None:
    size, width = toy_model.config.image_size, toy_model.config.num_query_token
    pixels = torch.rand(2, 3, size, size)
    words = torch.arange(3, 3 + width).reshape(1, width, 1)
    spans = toy_model.encode_spans(Spans(pixels, words=words, described=(False, True, False)))
    images = toy_model.encode_image(pixels)
    assert torch.equal(spans[0], images[0])
    assert torch.equal(spans[1], toy_model.embed_words(words)[0])
    assert torch.equal(spans[2], images[1])
    words = torch.cat([words, words + 1])
    spans = toy_model.encode_spans(Spans(pixels[:1], words=words, described=(True, True, False)))
    assert torch.equal(spans[:2], toy_model.embed_words(words))
    assert torch.equal(spans[2], toy_model.encode_image(pixels[:1])[0])


def test_gradients_reach_the_words_and_the_projection(toy_model: Any) -> None:
    toy_model.language.model.get_input_embeddings().weight.requires_grad_(True)
    size, width = toy_model.config.image_size, toy_model.config.num_query_token
    words = torch.arange(3, 3 + width).reshape(1, width, 1)
    shown = Spans(torch.rand(1, 3, size, size), words=words, described=(True, False))
    spans = toy_model.encode_spans(shown)
    spans.square().sum().backward()
    table = toy_model.language.model.get_input_embeddings().weight
    assert table.grad[3 : 3 + width].abs().sum() > 0
    assert toy_model.connector.weight.grad.abs().sum() > 0
