"""The step and the token at real size on a card that is not there: nothing waits, all fits.

A number of kernels is not a time, but a step that launches a third more does not get there
unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import lavis.models.compute.memory
import lavis.models.language.parts
from lavis.chat.cache import ConversationCache
from lavis.chat.engine import ChatEngine, TokenChooser
from lavis.chat.graph import TokenGraph
from lavis.chat.settings import ChatSettings
from lavis.common.config import load_config
from lavis.common.types import Batch, Sample, Spans
from lavis.datasets.collate import collate
from lavis.models import MiniGPT4QwenConfig
from lavis.models.build import Assembly, MiniGPT4Qwen
from lavis.models.compute.fake_cuda import on_card
from lavis.models.compute.quantized_linear import QuantizedLinear
from lavis.models.compute.schedule import StepSchedule
from lavis.models.config import EvaQFormerConfig, HfConfig, MlpConfig, VlmConfig
from lavis.models.language.causal import CausalLM
from lavis.models.language.quantize import quantize
from lavis.models.vlm import VLM
from tests.conftest import REPO, TOY
from tests.models.counted_cuda import CountedCuda
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
QWEN_14B = QWEN_7B | {
    "hidden_size": 5120, "intermediate_size": 27392, "num_hidden_layers": 40,
    "num_attention_heads": 40, "vocab_size": 152064,
}  # fmt: skip
RECIPES = sorted(
    path
    for folder in ("instruction_tuning", "deepspeed")
    for path in (REPO / "lavis" / "projects" / folder).glob("*.yaml")
    if "freeze_llm: false" not in path.read_text()  # whose gradients only sharding can hold
)
SHARES = {"train_fsdp2": 4, "train_14b_fsdp2": 2, "train_zero3_offload": 4}  # cards


@cache
def qwen(model_type: str, packed: str | None = None) -> tuple[VLM, CountedCuda]:
    """EVA ViT-g, Q-Former and a first-generation Qwen's sizes, on a card of their own."""
    config = MiniGPT4QwenConfig(
        arch="minigpt4qwen",
        llm_model=str(TOY / "cache" / "ckpt" / "Qwen7B-chat"),
        llm_config={"qwen7b_chat": QWEN_7B, "qwen14b_chat": QWEN_14B}[model_type],
        llm_precision="bf16",
        max_txt_len=256,
        from_scratch=("vit", "qformer", "llm"),
        **RANDOM,  # type: ignore[arg-type]
    )
    model = MiniGPT4Qwen.from_config(config, cache_root="", device="meta")
    if packed is not None:
        quantize(model.language, packed, device=torch.device("meta"), dtype=None)
    return placed(model)


@pytest.fixture(scope="module")
def qwen3_4b(tmp_path_factory: pytest.TempPathFactory) -> tuple[VLM, CountedCuda]:
    """``arch: vlm`` with a language model of Qwen3-4B's size, and grouped queries."""
    folder = tmp_path_factory.mktemp("qwen3")
    sizes = AutoConfig.for_model("qwen3", **QWEN3_4B)
    sizes.save_pretrained(folder)
    FAMILIES["qwen3"].save(folder)
    save_file({}, folder / "model.safetensors")

    def load(path: Path, *, device: torch.device, **_: Any) -> CausalLM:
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


@pytest.fixture(autouse=True)
def _plain_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake weight is no plain tensor, which a sharded one is not either."""
    monkeypatch.setattr(CausalLM, "chunked", True)


def placed(model: VLM) -> tuple[VLM, CountedCuda]:
    """With weights and the constant prefix on the card, which happens once in a run."""
    with CountedCuda() as card:
        on_card(model)
        model.set_schedule(StepSchedule())
        for amp in (False, True):
            with card.autocast(torch.bfloat16) if amp else nullcontext():
                model.constant_prefix()
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    return model.train(), card


def batch_of(model: VLM, count: int, length: int = 142) -> Batch:
    """Samples of an image and as many tokens each, half of them supervised."""
    prefix, _ = model.encoder.constant_prefix()
    ids = torch.tensor([*prefix, *[model.tokenizer.image_id] * 32, *[5] * length])[:length]
    labels = ids.where(torch.arange(length) >= length // 2, -100)
    return collate(
        [Sample(str(i), ids, labels, Spans(torch.zeros(1, 3, 224, 224))) for i in range(count)]
    )


def forward(model: VLM, card: CountedCuda, batch: Batch, *, amp: bool = False) -> Any:
    card.restart()
    with card.autocast(torch.bfloat16) if amp else nullcontext():
        return model(batch.pin_memory())


@pytest.mark.parametrize(("count", "amp", "kernels"), [(1, False, 2100), (7, True, 2200)])
def test_a_micro_batch_of_7b(count: int, amp: bool, kernels: int) -> None:
    model, card = qwen("qwen7b_chat")
    batch = batch_of(model, count)
    with card:
        output = forward(model, card, batch, amp=amp)
    assert not card.blocks
    assert output.num_tokens == batch.num_supervised + 3 * count  # of the prefix
    assert card.kernels["_varlen_attn"] == 32
    assert card.kernels["_to_copy"] <= 160  # two a norm, and none of weights
    assert sum(card.kernels.values()) <= kernels


def test_autocast_reaches_the_card() -> None:
    """Without it, the ceilings under autocast would say nothing."""
    with CountedCuda() as card:
        linear = torch.nn.Linear(4, 5, device="cuda", dtype=torch.float16)
        x = torch.empty(3, 4, device="cuda", dtype=torch.float16)
        card.restart()
        with card.autocast(torch.bfloat16):
            out = linear(x)
    assert out.dtype == torch.bfloat16
    assert card.kernels == {"_to_copy": 3, "addmm": 1}


def test_a_micro_batch_of_a_qwen3(qwen3_4b: tuple[VLM, CountedCuda]) -> None:
    model, card = qwen3_4b
    batch = batch_of(model, 7)
    with card:
        output = forward(model, card, batch)
    assert not card.blocks
    assert output.num_tokens == batch.num_supervised
    assert card.kernels["_varlen_attn"] == 36
    assert sum(card.kernels.values()) <= 2850


DRAWN = {"repetition_penalty": 1.1, "do_sample": True, "top_p": 0.9, "seed": 1}


@pytest.mark.parametrize(("settings", "kernels"), [({}, 1400), (DRAWN, 2150)])
def test_a_token_of_chat(
    settings: dict[str, Any], kernels: int, qwen3_4b: tuple[VLM, CountedCuda]
) -> None:
    model, card = qwen3_4b if settings else qwen("qwen7b_chat")
    model.eval()
    engine = ChatEngine(model, lambda image: torch.zeros(3, 224, 224))
    cache, choose = ConversationCache(), TokenChooser(ChatSettings(**settings))
    with card:
        image = engine.encode_image(torch.zeros(3, 224, 224))
        span = [engine.tokenizer.image_id] * 32
        prompt = engine.content([*[5] * 20, *span, *[5] * 20], [image])
        answer = [choose(engine.extend(cache, prompt, [image]), [])]
        card.restart()
        choose(engine.extend(cache, [*prompt, *answer], [image]), answer)
    assert sum(card.blocks.values()) == 1  # the token itself
    assert sum(card.kernels.values()) <= kernels


@pytest.mark.parametrize("shape", ["qwen7b_chat", "qwen3_4b"])
def test_a_token_can_be_recorded(shape: str, request: pytest.FixtureRequest) -> None:
    """A CUDA graph takes nothing of the host, and waits for nothing."""
    model, card = request.getfixturevalue(shape) if shape == "qwen3_4b" else qwen(shape)
    cache, device = ConversationCache(), torch.device("cuda")

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        card.restart()
        with card.recording():
            return list, run()

    with card, torch.no_grad():
        llm = model.language
        ids = torch.zeros(1, 9, dtype=torch.int64, device=device)
        llm.hidden(llm.embed(ids), torch.arange(9, device=device)[None], cache=cache)
        cache.content = [5] * 9
        graph = TokenGraph.of(llm, cache, record, device)
        assert graph is not None
        assert not card.blocks
        assert sum(card.kernels.values()) > 500
        card.restart()
        graph(cache, 5)
    assert not card.blocks
    assert sum(card.kernels.values()) <= 4  # beside the graph: its two numbers


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_on_a_card(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its own packed length, with the recomputation that it chooses."""
    config = load_config(path)
    run, made = config.run, config.model
    kind = made.model_type or "qwen14b_chat", made.parts[2].quantize
    model, _ = qwen(*kind)
    assert (made.parts[0].image_size, made.training) == (224, model.config.training)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    held, moving = weights, 0
    if layers := [m for m in model.language.modules() if isinstance(m, QuantizedLinear)]:
        moving = 2 * max(m.in_features * m.out_features for m in layers)  # unpacked, in a kernel
    if path.stem in SHARES:  # a slice, a block in use, and the next one on its way
        held = weights // SHARES[path.stem]
        moving = 2 * max(sum(p.nbytes for p in b.parameters()) for b in model.shardable_blocks())
    tokens = run.max_tokens_per_batch or run.batch_size_train * made.max_txt_len
    count = -(-tokens // made.max_txt_len)
    with monkeypatch.context() as patch:
        patch.setattr(model, "config", made)
        patch.setattr(lavis.models.compute.memory, "free_memory", lambda device: CARD - held)
        schedule = StepSchedule.from_run(run, model, reserved=moving)
    needed = peak(kind, schedule, count, tokens // count)
    assert needed - weights + held + moving < CARD


@cache
def peak(kind: tuple[str, str | None], schedule: StepSchedule, count: int, length: int) -> int:
    """Bytes of forward and backward pass. Autocast, which casts no weights, changes nothing."""
    model, card = qwen(*kind)
    model.train().set_schedule(schedule)
    batch = batch_of(model, count, length)
    try:
        with card:
            forward(model, card, batch).loss_sum.backward()
            model.zero_grad(set_to_none=True)
    finally:
        model.set_schedule(StepSchedule())
    return card.peak
