"""The step and the token at real size on a card that is not there: nothing waits, all fits.

A number of kernels is not a time, but a step that launches a third more does not get there
unnoticed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lavis.models.compute.memory
import lavis.models.language.parts
from lavis.chat.cache import ConversationCache
from lavis.chat.engine import ChatEngine, TokenChooser
from lavis.chat.settings import ChatSettings
from lavis.common.config import load_config
from lavis.common.schema import RunConfig
from lavis.common.types import Batch, Sample
from lavis.datasets.collate import collate
from lavis.models import MiniGPT4QwenConfig
from lavis.models.build import Assembly, MiniGPT4Qwen
from lavis.models.compute.schedule import StepSchedule
from lavis.models.config import EvaQFormerConfig, HfConfig, MlpConfig, VlmConfig
from lavis.models.language.causal import CausalLM
from lavis.models.vlm import VLM
from tests.conftest import REPO, TOY
from tests.fake_cuda import FakeCuda, on_card
from tests.processors.families import FAMILIES

GIB = 2**30
CARD = 22.8 * GIB  # of 24, what is left beside the driver's
RANDOM = {"bert_config": "none: BERT-base", "use_grad_checkpoint": True}
QWEN_7B = {
    "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 151936, "seq_length": 8192,
}  # fmt: skip
QWEN3_4B = {
    "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
    "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip
RECIPES = sorted(
    path for folder in ("instruction_tuning", "deepspeed")
    for path in (REPO / "lavis" / "projects" / folder).glob("*.yaml")
)  # fmt: skip


@cache
def qwen_7b() -> tuple[VLM, FakeCuda]:
    """EVA ViT-g, Q-Former and a language model of Qwen-7B's size, on a card of their own."""
    config = MiniGPT4QwenConfig(
        arch="minigpt4qwen",
        llm_model=str(TOY / "cache" / "ckpt" / "Qwen7B-chat"),
        llm_config=QWEN_7B,
        llm_precision="bf16",
        max_txt_len=256,
        from_scratch=("vit", "qformer", "llm"),
        **RANDOM,  # type: ignore[arg-type]
    )
    return placed(MiniGPT4Qwen.from_config(config, cache_root="", device="meta"))


@pytest.fixture(scope="module")
def qwen3_4b(tmp_path_factory: pytest.TempPathFactory) -> tuple[VLM, FakeCuda]:
    """``arch: vlm`` with a language model of Qwen3-4B's size, and grouped queries."""
    folder = tmp_path_factory.mktemp("qwen3")
    sizes = AutoConfig.for_model("qwen3", **QWEN3_4B)
    sizes.save_pretrained(folder)
    FAMILIES["qwen3"].save(folder)

    def load(path: Path, *, device: torch.device, dtype: torch.dtype | None) -> CausalLM:
        with device:
            return CausalLM(AutoModelForCausalLM.from_config(sizes, dtype=torch.bfloat16))

    config = VlmConfig(
        arch="vlm",
        vision=EvaQFormerConfig("eva_qformer", from_scratch=("vit", "qformer"), **RANDOM),  # type: ignore[arg-type]
        connector=MlpConfig("mlp", init="pytorch"),
        language=HfConfig("hf", path=str(folder)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lavis.models.language.parts, "load_hf", load)
        return placed(Assembly.from_config(config, cache_root="", device="meta"))


def placed(model: VLM) -> tuple[VLM, FakeCuda]:
    """With weights and the constant prefix on the card, which happens once in a run."""
    with FakeCuda() as card:
        on_card(model)
        model.schedule = StepSchedule()
        model.constant_prefix()
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    return model.train(), card


def batch_of(model: VLM, count: int, length: int = 142) -> Batch:
    """Samples of an image and as many tokens each, half of them supervised."""
    prefix, _ = model.encoder.constant_prefix()
    ids = torch.tensor([*prefix, *[model.tokenizer.image_id] * 32, *[5] * length])[:length]
    labels = ids.where(torch.arange(length) >= length // 2, -100)
    return collate([Sample(str(i), ids, labels, torch.zeros(1, 3, 224, 224)) for i in range(count)])


def forward(model: VLM, card: FakeCuda, batch: Batch, *, amp: bool = False) -> Any:
    card.restart()
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        return model(batch.pin_memory())


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("count", [1, 7])
def test_a_micro_batch_of_7b(count: int, amp: bool) -> None:
    model, card = qwen_7b()
    with card:
        output = forward(model, card, batch_of(model, count), amp=amp)
    print(count, amp, sum(card.kernels.values()), card.blocks, card.live/GIB, card.peak/GIB, card.kernels.most_common(40))
    assert not card.blocks
    assert output.num_tokens == count * 71


def test_a_micro_batch_of_a_qwen3(qwen3_4b: tuple[VLM, FakeCuda]) -> None:
    model, card = qwen3_4b
    with card:
        output = forward(model, card, batch_of(model, 7))
    print(sum(card.kernels.values()), card.blocks, card.live/GIB, card.peak/GIB, card.kernels.most_common(40))
    assert not card.blocks
    assert output.num_tokens == 7 * 71


@pytest.mark.parametrize(
    "settings", [{}, {"repetition_penalty": 1.1, "do_sample": True, "top_p": 0.9, "seed": 1}]
)
def test_a_token_of_chat(settings: dict[str, Any], qwen3_4b) -> None:
    for model, card in (qwen_7b(), qwen3_4b):
        engine = ChatEngine(model, lambda image: torch.zeros(3, 224, 224))
        model.eval()
        cache, choose = ConversationCache(), TokenChooser(ChatSettings(**settings))
        with card:
            image = engine.encode_image(torch.zeros(3, 224, 224))
            prompt = engine.content([5] * 20 + [engine.tokenizer.image_id] * 32 + [5] * 20, [image])
            answer = [choose(engine.extend(cache, prompt, [image]), [])]
            card.restart()
            choose(engine.extend(cache, [*prompt, *answer], [image]), answer)
        print(sum(card.kernels.values()), card.blocks, card.kernels.most_common(40))
        assert sum(card.blocks.values()) == 1


