"""A folder of LLaVA or BLIP-2 of Transformers is a model here, and the same one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from lavis.common.config import load_config
from lavis.common.errors import ConfigError, LavisError, WeightsError
from lavis.common.types import Sample, Spans
from lavis.datasets.collate import collate
from lavis.models import load_model
from lavis.models.vision.eva_qformer import EvaQFormer
from lavis.models.vision.hf import HfVision
from lavis.models.vlm import VLM
from lavis.processors.conversation import Turn
from tests.models.towers import SIZES as TOWER
from tests.models.towers import new_processor, pictures, randomize
from tests.processors.families import FAMILIES
from tests.test_parts import SIZES as LANGUAGE
from tests.test_parts import save_language

IMAGE = "<image>"
PROJECTORS = "model.multi_modal_projector", "language_projection"
# 22 * (49 / 22) is under 49 in floating point: the width of the ViT's MLP must not lose one.
EVA = TOWER | {"hidden_size": 22, "intermediate_size": 49, "qkv_bias": True}
QFORMER = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
    "encoder_hidden_size": 22, "vocab_size": 5,
    # not the defaults:
    "cross_attention_frequency": 1, "layer_norm_eps": 1e-2, "hidden_dropout_prob": 0.2,
    "attention_probs_dropout_prob": 0.3, "initializer_range": 0.04,
}  # fmt: skip
BLIP_IMAGES = {
    "size": {"height": 28, "width": 28}, "image_mean": [0.3, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4], "resample": 2,
}  # fmt: skip
FOLDERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "siglip": ("llava", "qwen3", "chatml in parts", {"vision_feature_select_strategy": "full"}),
    "clip": ("llava", "llama", "chatml in parts", {"vision_feature_layer": -2}),
    "clip keeps class": ("llava", "llama", "chatml in parts", {
        "vision_feature_layer": 2, "vision_feature_select_strategy": "full",
        "projector_hidden_act": "linear"}),
    "opt": ("blip-2", "opt", "chatml", {}),
    "qwen2": ("blip-2", "qwen2", "chatml in parts", {}),
}  # fmt: skip


def stock_model(name: str) -> Any:
    """A stock model with random weights by which everything matters."""
    family, spoken, _, options = FOLDERS[name]
    torch.manual_seed(5)
    sizes = LANGUAGE | ({"ffn_dim": 96, "word_embed_proj_dim": 32} if spoken == "opt" else {})
    text = hf.AutoConfig.for_model(spoken, **sizes)
    if family == "llava":
        kind = "clip_vision_model" if name.startswith("clip") else "siglip_vision_model"
        config: Any = hf.LlavaConfig(
            vision_config=hf.AutoConfig.for_model(kind, **TOWER), text_config=text,
            image_token_index=text.vocab_size - 1, **options,
        )  # fmt: skip
        return randomize(hf.LlavaForConditionalGeneration(config))
    config = hf.Blip2Config(
        vision_config=EVA, qformer_config=QFORMER, text_config=text,
        num_query_tokens=3, image_token_index=text.vocab_size - 1,
    )  # fmt: skip
    return randomize(hf.Blip2ForConditionalGeneration(config))


def tokens(name: str) -> int:
    """How often the template has to write the image's token: LLaVA's processor does that itself."""
    return 3 if FOLDERS[name][0] == "blip-2" else 1


def save(name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The folder, as a user downloads it."""
    family, _, template, _ = FOLDERS[name]
    model = stock_model(name).to(dtype)
    model.save_pretrained(folder)
    made = FAMILIES[template]
    backend = made.backend()
    backend.add_tokens(made.added)
    while backend.get_vocab_size() < model.config.image_token_id:
        backend.add_tokens([AddedToken(f"<|{backend.get_vocab_size()}|>", special=True)])
    backend.add_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    source = made.template.replace(f"'{IMAGE}'", repr(IMAGE * tokens(name)))
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=source.lstrip("\n"), **made.names
    )
    assert tokenizer.convert_tokens_to_ids(IMAGE) == model.config.image_token_id
    tokenizer.save_pretrained(folder)
    if family == "llava":
        images = new_processor("clip" if name.startswith("clip") else "siglip")
        if name.startswith("clip"):
            images = hf.CLIPImageProcessor(size={"height": 28, "width": 28}, do_center_crop=False)
        strategy = model.config.vision_feature_select_strategy
        hf.LlavaProcessor(
            images, tokenizer, patch_size=TOWER["patch_size"], chat_template=source.lstrip("\n"),
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=int(name.startswith("clip")),
        ).save_pretrained(folder)  # fmt: skip
    else:
        images = hf.BlipImageProcessor(**BLIP_IMAGES)
        hf.Blip2Processor(images, tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model


def load(name: str, folder: Path, **model: Any) -> VLM:
    """It as a model here, in fp32; ``model`` has more keys."""
    precision = "vit_precision" if FOLDERS[name][0] == "blip-2" else "precision"
    section = {"arch": "vlm", "from_pretrained": str(folder), "vision": {precision: "fp32"}}
    path = folder.with_name("run.yaml")
    path.write_text(yaml.safe_dump({"model": section | model}), encoding="utf-8")
    return load_model("", is_eval=True, cfg_path=path)


def picture(size: int) -> Image.Image:
    noise = torch.rand(size, size + 9, 3, generator=torch.Generator().manual_seed(size))
    return Image.fromarray((noise * 255).byte().numpy())


@pytest.mark.parametrize("name", FOLDERS)
def test_it_is_the_stock_model(name: str, tmp_path: Path) -> None:
    """Prompt, pixels, features, logits, answer, loss and gradients are the stock class's."""
    folder = tmp_path / "stock"
    stock = save(name, folder)
    processor = hf.AutoProcessor.from_pretrained(folder, backend="pil")
    model = load(name, folder)
    shown = [picture(40), picture(65)]

    content: list[dict[str, str]] = [
        {"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"},
        {"type": "text", "text": " differ. How?"},
    ]  # fmt: skip
    said: Any = content
    if FOLDERS[name][2] == "chatml":
        said = "".join(part.get("text", IMAGE * 3) for part in content)
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": said}], add_generation_prompt=True, tokenize=False
    )
    given = processor(text=text, images=shown, return_tensors="pt", add_special_tokens=False)
    turns = [Turn("user", "<ImageHere>and<ImageHere> differ. How?")]
    ours = torch.tensor([model.encoder.prompt(turns)])
    image = ours == model.tokenizer.image_id
    assert int(image.sum()) == 2 * model.encoder.num_query_token
    assert torch.equal(ours.where(~image, stock.config.image_token_id), given["input_ids"])

    assert model.vis_processor is not None
    pixels = torch.stack([model.vis_processor(p) for p in shown])
    torch.testing.assert_close(pixels, given["pixel_values"], rtol=0, atol=1e-5)

    answer = model.generate_ids([ours[0].tolist()], pixels, {"max_new_tokens": 4})[0]
    theirs = stock.generate(
        **given, max_new_tokens=len(answer), do_sample=False,
        suppress_tokens=[stock.config.image_token_id],
    )  # fmt: skip
    assert theirs[0, ours.shape[1] :].tolist() == answer

    encoded = model.encoder.encode([*turns, Turn("assistant", "A lot.")])
    ids, labels = torch.tensor(encoded.input_ids), torch.tensor(encoded.labels)
    batch = collate([Sample("a", ids, labels, Spans(pixels))])
    loss = model.train()(batch).loss_sum / (labels[1:] != -100).sum()
    loss.backward()
    image = ids == model.tokenizer.image_id
    parts = [stock.get_submodule(n) for n in PROJECTORS if n in dict(stock.named_modules())]
    stock.requires_grad_(False)
    parts[0].requires_grad_(True)
    whole = ids.where(~image, stock.config.image_token_id)[None]
    wanted = stock(
        input_ids=whole, pixel_values=pixels, labels=labels[None],
        attention_mask=torch.ones_like(whole),
    ).loss  # fmt: skip
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    first, *rest = layers(parts[0])
    if name == "clip keeps class":  # two layers without a bend between them are one here
        second = rest[0]
        torch.testing.assert_close(
            layers(model.connector)[0].bias.grad @ second.weight, first.bias.grad,
            rtol=1e-4, atol=1e-6,
        )  # fmt: skip
        return
    for mine, their in zip(layers(model.connector), layers(parts[0]), strict=True):
        torch.testing.assert_close(mine.weight.grad, their.weight.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(mine.bias.grad, their.bias.grad, rtol=1e-3, atol=1e-6)


def layers(connector: Any) -> list[Any]:
    return [m for m in connector.modules() if isinstance(m, torch.nn.Linear)]


def test_what_the_yaml_says_goes_first(tmp_path: Path) -> None:
    folder = tmp_path / "stock"
    stock = save("siglip", folder)
    model = load("siglip", folder, connector={"name": "pool", "depth": 1})
    assert model.encoder.num_query_token == 4
    assert model.config.parts[1].path is None
    other = load("siglip", folder, vision={"layer": -2, "precision": "fp32"})
    pixels = pictures(28)
    tower = stock.model.vision_tower(pixels, output_hidden_states=True)
    wanted = stock.model.multi_modal_projector(tower.hidden_states[-2])
    torch.testing.assert_close(other.encode_image(pixels), wanted, rtol=0, atol=2e-5)
    shutil.copytree(folder, tmp_path / "wide")
    spoken = save_language(tmp_path / "wide", "qwen3", "chatml", hidden_size=48)
    with pytest.raises(WeightsError, match="vision encoder or language model are others"):
        load("siglip", folder, language={"path": str(spoken)})
    fresh = load("siglip", folder, language={"path": str(spoken)}, connector={"path": None})
    assert fresh.language.width == 48


def test_pictures_are_taken_as_the_folder_says_in_training_too(tmp_path: Path) -> None:
    """Not cropped and flipped at random, of which the model knows nothing."""
    save("siglip", tmp_path / "stock")
    load("siglip", tmp_path / "stock")
    chosen = load_config(tmp_path / "run.yaml").preprocess.vis_processor
    assert (chosen.train, chosen.eval) == (chosen.eval, chosen.eval)
    assert chosen.eval is not None
    assert chosen.eval.name == "blip_image_eval"


def test_pictures_that_are_not_normalized(tmp_path: Path) -> None:
    folder = tmp_path / "stock"
    save("siglip", folder)
    change(folder / "processor_config.json", {"image_processor.do_normalize": False})
    process, shown = load("siglip", folder).vis_processor, picture(40)
    assert process is not None
    stock = hf.AutoProcessor.from_pretrained(folder, backend="pil").image_processor
    wanted = stock(shown, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(process(shown), wanted, rtol=0, atol=1e-5)


def test_positions_of_another_size_are_interpolated(tmp_path: Path) -> None:
    stock = save("qwen2", tmp_path / "stock")
    model = load("qwen2", tmp_path / "stock", vision={"vit_precision": "fp32", "image_size": 42})
    assert model.vis_processor is not None
    assert model.vis_processor(picture(50)).shape == (3, 42, 42)
    pixels = pictures(42)
    with torch.no_grad():
        seen = stock.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
        queries = stock.query_tokens.expand(len(pixels), -1, -1)
        wanted = stock.language_projection(
            stock.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
        )
        torch.testing.assert_close(model.encode_image(pixels), wanted, rtol=0, atol=2e-5)


def test_a_template_that_only_the_processor_has(tmp_path: Path) -> None:
    folder = tmp_path / "stock"
    save("siglip", folder)
    wanted = load("siglip", folder).encoder.prompt([Turn("user", "<ImageHere>Why?")])
    source = folder / "chat_template.jinja"
    older = folder / "chat_template.json"
    older.write_text(json.dumps({"chat_template": source.read_text(encoding="utf-8")}))
    source.unlink()
    assert load("siglip", folder).encoder.prompt([Turn("user", "<ImageHere>Why?")]) == wanted
    older.write_text("[]")
    with pytest.raises(WeightsError, match=r"chat_template\.json: no JSON object with a chat"):
        load("siglip", folder)


def test_what_matters_only_in_training_is_the_folders_too(tmp_path: Path) -> None:
    save("qwen2", tmp_path / "stock")
    vision: Any = load("qwen2", tmp_path / "stock").vision
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"):
        assert getattr(vision.Qformer.config, name) == QFORMER[name]


def test_half_precision_files(tmp_path: Path) -> None:
    stock = save("qwen2", tmp_path / "stock", dtype=torch.bfloat16)
    model = load("qwen2", tmp_path / "stock", vision={"vit_precision": "bf16"})
    assert isinstance(model.vision, EvaQFormer)
    assert model.vision.ln_vision.eps == stock.vision_model.post_layernorm.eps
    assert model.vision.visual_encoder.pos_embed.dtype == torch.bfloat16
    assert model.vision.query_tokens.dtype == torch.float32
    assert model.language.head.weight.dtype == torch.bfloat16
    assert model.connector.weight.dtype == torch.float32


def test_features_are_known_by_weights_and_settings(tmp_path: Path) -> None:
    folder = tmp_path / "stock"
    save("qwen2", folder)
    first = load("qwen2", folder).config
    cpu = torch.device("cpu")
    vision: Any = first.parts[0]
    known = EvaQFormer.fingerprint(vision, "cache", cpu)
    assert known == EvaQFormer.fingerprint(load("qwen2", folder).config.parts[0], "cache", cpu)
    others = [
        replace(vision, image_size=42),
        replace(vision, vit_precision="bf16"),
        replace(vision, num_query_token=4),
        replace(vision, vit_config=replace(vision.vit_config, num_heads=1)),
        *(
            replace(vision, qformer_config=replace(vision.qformer_config, **change))
            for change in (
                {"layer_norm_eps": 1e-3}, {"cross_attention_frequency": 2},
                {"num_attention_heads": 1},
            )
        ),
    ]  # fmt: skip
    prints = {EvaQFormer.fingerprint(other, "cache", cpu) for other in others}
    assert len(prints - {known}) == len(others)
    weights = load_file(folder / "model.safetensors")
    weights["query_tokens"][0, 0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert known != EvaQFormer.fingerprint(first.parts[0], "cache", cpu)


def test_features_of_a_tower_are_known_by_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "stock"
    save("siglip", folder)
    config: Any = load("siglip", folder).config.parts[0]
    cpu = torch.device("cpu")
    prints = [HfVision.fingerprint(config, "cache", cpu)]
    change(folder / "config.json", {"vision_config.layer_norm_eps": 1e-3})
    prints.append(HfVision.fingerprint(config, "cache", cpu))
    weights = load_file(folder / "model.safetensors")
    next(w for name, w in weights.items() if "vision_tower" in name)[0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    prints.append(HfVision.fingerprint(config, "cache", cpu))
    assert len(set(prints)) == 3


@pytest.mark.parametrize("tied", [False, True])
def test_the_last_layer_is_before_the_norm_unless_tied(tmp_path: Path, tied: bool) -> None:
    """As the stock class has it in a folder of LLaVA; what ``layer: -1`` gives is normed."""
    folder = tmp_path / "stock"
    save("siglip", folder)
    settings = {"vision_feature_layer": -1, "vision_config.tie_last_hidden_states": tied}
    change(folder / "config.json", settings)
    stock: Any = hf.LlavaForConditionalGeneration.from_pretrained(folder)
    seen = stock.model.vision_tower(pictures(28), output_hidden_states=True)
    models = [
        load("siglip", folder, vision={"precision": "fp32", **m}) for m in ({}, {"layer": -1})
    ]
    own, last = (model.vision(pictures(28)) for model in models)
    torch.testing.assert_close(own, seen.hidden_states[-1])
    torch.testing.assert_close(last, seen.last_hidden_state)
    assert torch.allclose(own, last) == tied
    configs: list[Any] = [model.config.parts[0] for model in models]
    prints = [HfVision.fingerprint(c, "cache", torch.device("cpu")) for c in configs]
    assert (prints[0] == prints[1]) == tied  # features that differ are kept apart


def change(file: Path, values: dict[str, Any]) -> None:
    """Set values of a JSON file, whose places have dots."""
    config = json.loads(file.read_text(encoding="utf-8"))
    for path, value in values.items():
        *parents, key = path.split(".")
        at = config
        for parent in parents:
            at = at[parent]
        at[key] = value
    file.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (
            "qwen2",
            {"vision_config.hidden_act": "quick_gelu"},
            "hidden_act is quick_gelu; only gelu",
        ),
        ("qwen2", {"vision_config.layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05; only 1e-06"),
        ("qwen2", {"vision_config.qkv_bias": False}, "qkv_bias is False; only True"),
        ("qwen2", {"qformer_config.hidden_act": "relu"}, "hidden_act is relu; only gelu"),
        ("qwen2", {"qformer_config.use_qformer_text_input": True}, "text_input is True; only Fal"),
        ("qwen2", {"text_config.model_type": "t5"}, "no causal language model"),
        ("siglip", {"vision_feature_layer": [-2, -1]}, r"the layers \[-2, -1\] side by side"),
        ("siglip", {"projector_hidden_act": "relu"}, "has 'relu' between its layers"),
        ("siglip", {"model_type": "llava_onevision"}, "holds llava_onevision; folders of llava"),
        ("siglip", {"model_type": "nonsense"}, "model_type 'nonsense' is unknown to Transformers"),
    ],
)
def test_what_is_computed_nowhere_here_is_refused(
    name: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "stock"
    save(name, folder)
    change(folder / "config.json", changes)
    with pytest.raises(LavisError, match=said):
        load(name, folder)


@pytest.mark.parametrize(
    ("name", "given", "right"), [("clip", "keep", "drop"), ("clip keeps class", "drop", "keep")]
)
def test_a_class_token_that_the_folder_is_not_made_for(
    name: str, given: str, right: str, tmp_path: Path
) -> None:
    save(name, tmp_path / "stock")
    with pytest.raises(ConfigError, match=rf"class_token: {given}, but .* set {right}"):
        load(name, tmp_path / "stock", vision={"class_token": given})


def test_weights_that_lack_a_name_or_have_one_more(tmp_path: Path) -> None:
    folder = tmp_path / "stock"
    save("qwen2", folder)
    weights = load_file(folder / "model.safetensors")
    taken = weights.pop("qformer.layernorm.bias")
    weights["vision_model.encoder.layers.0.more.weight"] = taken
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 not part of the model: vision_model\.encoder\.lay"):
        load("qwen2", folder)
    del weights["vision_model.encoder.layers.0.more.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 missing: qformer\.layernorm\.bias"):
        load("qwen2", folder)


def test_a_folder_that_is_not_there_and_other_spellings(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"model\.from_pretrained: no folder .*nowhere"):
        load("siglip", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"from_pretrained is a key of arch: vlm"):
        load("siglip", tmp_path / "nowhere", arch="minigpt4qwen", vision=None)
    save("qwen2", tmp_path / "stock")
    with pytest.raises(ConfigError, match=r"vision\.from_scratch: weights come from path"):
        load("qwen2", tmp_path / "stock", vision={"from_scratch": ["vit"]})
    (tmp_path / "stock/model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model\.from_pretrained"):
        load("qwen2", tmp_path / "stock")
