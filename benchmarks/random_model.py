"""The model with random weights, built in memory in a few seconds, and samples like the data's."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.random_weights import fill, vocabulary
from lavis.common.errors import LavisError

if TYPE_CHECKING:
    import torch

    from lavis.common.types import Encoded, Sample
    from lavis.models import VLM

# Most are one token each, so that the lengths come out as drawn.
WORDS = [
    "the", "a", "of", "and", "in", "on", "with", "is", "there", "left", "red", "blue", "small",
    "large", "dog", "cat", "table", "house", "tree", "water", "street", "window", "people",
    "图片", "里", "有", "一", "只", "红色", "的", "桌子", "和", "人", "在", "左边",
]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of its samples.

    Attributes:
        llm: over Qwen-7B-Chat's ``config.json``.
        vit: over ViT-g's sizes.
        qformer: over BERT-base's sizes.
        matrix: sides of the square matrices whose products set the peak.
        samples: of an optimizer step.
        length: shortest and longest sample, in tokens, about those of the real data.
        precision: of the language model and the ViT.
        single: a step takes minutes: each rung is computed once.
    """

    llm: dict[str, int] = field(default_factory=dict)
    vit: dict[str, Any] = field(default_factory=dict)
    qformer: dict[str, int] = field(default_factory=dict)
    image_size: int = 224
    max_txt_len: int = 256
    matrix: tuple[int, ...] = (2048, 4096)
    samples: int = 16
    length: tuple[int, int] = (60, 250)
    precision: str = "bf16"
    single: bool = False


SHAPES = {
    "bench": Shape(
        llm={
            "hidden_size": 1024, "intermediate_size": 2 * 2816, "num_hidden_layers": 12,
            "num_attention_heads": 16,
        },
        vit={"depth": 4},
    ),
    "7b": Shape(samples=1, single=True),
    "tiny": Shape(
        llm={
            "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        vit={"embed_dim": 88, "depth": 2, "num_heads": 4},
        qformer={
            "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 96,
        },
        image_size=56,
        max_txt_len=128,
        matrix=(256,),
        samples=4,
        length=(60, 110),
        precision="fp32",
    ),
}  # fmt: skip


def build_model(shape: Shape, device: torch.device) -> VLM:
    """The model in training mode, with only the projection trainable; no second copy of a weight.

    Raises:
        LavisError: there is too little memory.
    """
    import torch
    from torch import nn

    from lavis.models import MiniGPT4QwenConfig
    from lavis.models.build import MiniGPT4Qwen
    from lavis.models.compute.cpu import widen_frozen_linears
    from lavis.models.compute.memory import free_memory
    from lavis.models.vision.config import QFormerConfig, ViTConfig

    folder = vocabulary().parent
    config = MiniGPT4QwenConfig(
        arch="minigpt4qwen",
        llm_model=str(folder),
        vit_config=ViTConfig(**shape.vit),
        qformer_config=QFormerConfig(**shape.qformer),
        image_size=shape.image_size,
        max_txt_len=shape.max_txt_len,
        vit_precision=shape.precision,  # type: ignore[arg-type]
        llm_precision=shape.precision,  # type: ignore[arg-type]
        llm_config=dict(shape.llm) or None,
        bert_config="no file: BERT-base",
        from_scratch=("vit", "qformer", "llm"),
    )
    model = MiniGPT4Qwen.from_config(config, cache_root="", device="meta")
    needed, free = sum(p.nbytes for p in model.parameters()), free_memory(device)
    if needed > 0.95 * free:
        raise LavisError(
            f"the weights take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free"
        )
    block = torch.randn(1_048_583, generator=torch.Generator().manual_seed(0)) * 0.02
    for path, module in model.named_modules():
        for name, like in list(module.named_parameters(recurse=False)):
            made = fill(f"{path}.{name}", like, block).to(device)
            setattr(module, name, nn.Parameter(made, requires_grad=False))
        for name, like in list(module.named_buffers(recurse=False)):
            kept = name not in module._non_persistent_buffers_set
            made = torch.zeros(like.shape, dtype=like.dtype, device=device)
            module.register_buffer(name, made, persistent=kept)
    base = model.language.base
    base.rotary_emb = type(base.rotary_emb)(model.language.model.config).to(device)  # no weights
    model.connector.requires_grad_(True)
    widen_frozen_linears(model)
    return model.train()


def draw_samples(model: VLM, shape: Shape, count: int) -> list[Sample]:
    """One image, a question and an answer each, drawn evenly over the shape's lengths.

    The same at every call.
    """
    import torch

    from lavis.common.types import Sample, Spans
    from lavis.processors.conversation import Turn

    rng = random.Random(0)
    generator = torch.Generator().manual_seed(0)

    def encode(words: list[str]) -> Encoded:
        question, answer = " ".join(words[0::4]), " ".join(w for i, w in enumerate(words) if i % 4)
        turns = [Turn("user", f"<Img><ImageHere></Img> {question}"), Turn("assistant", answer)]
        return model.encoder.encode(turns)

    samples = []
    for i in range(count):
        length = rng.randint(*shape.length)
        words = rng.choices(WORDS, k=2)
        while len(encode(words).input_ids) < length:
            words.append(rng.choice(WORDS))
        encoded = encode(words)
        side = shape.image_size
        samples.append(
            Sample(
                sample_id=str(i),
                input_ids=torch.tensor(encoded.input_ids),
                labels=torch.tensor(encoded.labels),
                spans=Spans(torch.randn(1, 3, side, side, generator=generator)),
            )
        )
    return samples
