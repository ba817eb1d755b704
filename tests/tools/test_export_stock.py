"""A model that was trained here is the same model in Transformers, and comes back from there."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from lavis.common.config import load_config
from lavis.common.errors import ConfigError, LavisError, WeightsError
from lavis.models import load_model
from lavis.models.config import Qwen1Config
from lavis.models.export import check, folder, probe
from lavis.models.export.folder import Export, language_weights
from lavis.models.export.shards import Weight, write_shards
from lavis.models.export.targets import Llava
from lavis.models.export.text import stock_tokenizer
from lavis.models.language.parts import Qwen1
from lavis.models.weights.trained import trainable_state
from lavis.processors.templates import TokenizerTemplate
from lavis.runners.checkpoint import Checkpoint, Progress
from lavis.tools.merge import require_empty
from tests.conftest import REPO, TOY, TOY_YAML
from tests.models import towers
from tests.test_parts import LANGUAGES, save_language

TOYBOX = REPO / "lavis/projects/toybox/train.yaml"


class OwnTemplate(TokenizerTemplate):
    """What a YAML may name."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("export")
    for name in ("siglip", "clip", "dinov2"):
        towers.save(name, home)
    for name, (template, options) in LANGUAGES.items():
        save_language(home / name, name, template, **options)
    return home


@pytest.fixture()
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison in this process, which starts sooner."""

    def reload(out: Path, recorded: Path) -> probe.Proof:
        said = json.loads((recorded / "record.json").read_text(encoding="utf-8"))
        try:
            return probe.Proof(said["class"], **check.check(out, recorded))
        except check.DifferenceError as difference:
            raise WeightsError(f"another model: {difference}") from difference

    monkeypatch.setattr(folder, "reload", reload)


def run_yaml(home: Path, tmp: Path, *names: str, **changes: dict[str, Any]) -> Path:
    """A run's YAML: vision encoder, connector, language model; ``changes`` by part."""
    model = towers.model_of(home, *names)
    for part, keys in changes.items():
        model[part] = model[part] | keys
    size = {"image_size": 84} if names[0] == "eva_qformer" else {}
    processor = {"name": "blip_image_eval"} | size
    content = {
        "model": model,
        "env": {"cache_root": str(REPO)},
        "preprocess": {"vis_processor": {"train": processor, "eval": processor}},
    }
    path = tmp / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def trained(path: Path, arch: str = "vlm") -> Path:
    """A checkpoint by which what learns matters."""
    model = load_model(arch, is_eval=True, cfg_path=path)
    torch.manual_seed(3)
    for parameter in model.trainable_parameters().values():
        parameter.data += torch.randn_like(parameter) * 0.1
    checkpoint = path.with_name("checkpoint_0.pth")
    tree = load_config(path).tree
    Checkpoint(trainable_state(model), {}, tree, progress=Progress(1, 1)).write(checkpoint)
    return checkpoint


def export(path: Path, kind: str, checkpoint: Path, out: Path, **settings: Any) -> probe.Proof:
    settings = {"dtype": None, "limit": 5e9, "device": "cpu"} | settings
    return Export.of(load_config(path, [f"env.cache_root={REPO}"] * (path == TOYBOX)), kind).write(
        checkpoint, out, **settings
    )


def assert_same(proof: probe.Proof, features: float = 0.0, logits: float = 1e-5) -> None:
    assert proof.same == proof.conversations >= 4
    assert proof.features <= features
    assert proof.logits <= logits


def test_siglip_mlp_and_qwen3_in_a_process_without_this_package(home: Path, tmp_path: Path) -> None:
    path = run_yaml(home, tmp_path, "siglip", "mlp", "qwen3")
    out = tmp_path / "out"
    proof = export(path, "llava", trained(path), out, limit=40_000, scores={"test": {
        "overall": 71.25, "count": 8}})  # fmt: skip
    assert proof.family == "LlavaForConditionalGeneration"
    assert_same(proof)
    shards = sorted(out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(shards) > 3
    assert set(index["weight_map"].values()) == {p.name for p in shards}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            names = list(file.keys())
            sizes = [file.get_tensor(name).nbytes for name in names]
        assert sum(sizes) <= 40_000 or len(sizes) == 1
        assert {index["weight_map"][name] for name in names} == {shard.name}
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| test | 71.2 | 8 |" in card
    assert "vLLM" in card
    assert str(tmp_path) not in card
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("here")
def test_the_fixture_and_the_toybox(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(TOY_YAML, encoding="utf-8")
    fixture = export(tmp_path / "toy.yaml", "blip2", TOY / "checkpoint_9.pth", tmp_path / "a")
    assert_same(fixture, features=4e-6, logits=1e-5)
    toybox = REPO / "examples/toybox/checkpoint.pth"
    assert_same(export(TOYBOX, "blip2", toybox, tmp_path / "b"), features=1e-5, logits=3e-5)
    config = json.loads((tmp_path / "b/config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Blip2ForConditionalGeneration"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("kind", "names", "changes"),
    [
        ("llava", ("clip", "linear", "llama"), {}),
        ("llava", ("clip", "mlp", "qwen3"), {"vision": {"class_token": "keep", "layer": -1}}),
        ("llava", ("siglip", "linear", "qwen3"), {"vision": {"layer": -2}}),
        ("blip2", ("eva_qformer", "linear", "gemma2"), {}),
        ("blip2", ("eva_qformer", "linear", "qwen3"), {"language": {"system": '它是 "x"\n🙂'}}),
        ("blip2", ("eva_qformer", "linear", "llama"), {"train": {"language": {"lora": {"r": 4}}}}),
    ],
)
def test_families(
    home: Path, tmp_path: Path, kind: str, names: tuple[str, ...], changes: dict[str, Any]
) -> None:
    if "train" in changes:
        pytest.importorskip("peft")
    path = tmp_path / "run.yaml"
    train = changes.get("train", {})
    run_yaml(home, tmp_path, *names, **{k: v for k, v in changes.items() if k != "train"})
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["model"]["train"] = {"connector": 1e-3} | train
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    proof = export(path, kind, trained(path), tmp_path / "out")
    assert_same(proof, features=1e-5 if kind == "blip2" else 2e-6, logits=3e-5)


@pytest.mark.usefixtures("here")
def test_half_precision_and_a_vision_encoder_that_learned(home: Path, tmp_path: Path) -> None:
    path = run_yaml(home, tmp_path, "clip", "mlp", "llama")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["model"]["train"] = {"connector": 1e-3, "vision": 1e-4}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    checkpoint = trained(path)
    assert_same(export(path, "llava", checkpoint, tmp_path / "wide"), features=2e-6)
    export(path, "llava", checkpoint, tmp_path / "half", dtype=torch.bfloat16)
    wide, half = (load_file(tmp_path / n / "model.safetensors") for n in ("wide", "half"))
    assert all(torch.equal(wide[name].bfloat16(), half[name]) for name in wide)
    learned = torch.load(checkpoint, weights_only=True)["model"]
    name = "encoder.layers.0.mlp.fc1.weight"
    tower = next(t for k, t in learned.items() if k.endswith(name))
    assert torch.equal(wide[f"vision_tower.vision_model.{name}"], tower)


def test_the_vocabulary_as_tokenizer_json() -> None:
    config = Qwen1Config("qwen1", path=str(TOY / "cache/ckpt/Qwen7B-chat"))
    described = Qwen1(config, "", "model.language.{}".format)
    stock, rng = stock_tokenizer(described), random.Random(5)
    alphabet = "abc aB  \n\t\r'sS1239,.!?图里有什么é\u0301ñ🙂👩‍🚀\u3000\u00a0<|>_"
    for _ in range(1500):
        text = "".join(rng.choices(alphabet, k=rng.randrange(40)))
        if "<|" not in text and "<image>" not in text:
            assert stock(text, add_special_tokens=False).input_ids == described.tokenizer.encode(
                text
            )
    assert stock.convert_tokens_to_ids("<image>") == described.tokenizer.image_id
    assert stock.decode(described.tokenizer.encode("图里 a")) == "图里 a"


def test_new_rows_are_never_the_largest(home: Path) -> None:
    model = load_model("vlm", is_eval=True, cfg_path=run_yaml(home, home, "siglip", "mlp", "llama"))
    rows = model.language.vocab_size
    weights = language_weights(model.language, rows + 3)
    head = weights["lm_head.weight"]
    hidden = torch.randn(50, model.language.width)
    logits = hidden @ head.read().detach().T
    assert head.shape == tuple(head.read().shape) == (rows + 3, model.language.width)
    torch.testing.assert_close(logits[:, rows], logits[:, :rows].mean(1))
    assert weights["model.embed_tokens.weight"].read().shape[0] == rows + 3
    assert "lm_head.weight" not in language_weights(
        load_model("vlm", cfg_path=run_yaml(home, home, "siglip", "mlp", "qwen3")).language, rows
    )


def test_templates_take_texts_as_well_as_parts(home: Path, tmp_path: Path) -> None:
    path = run_yaml(home, tmp_path, "eva_qformer", "linear", "qwen3")
    made = Export.of(load_config(path), "blip2")
    tokenizer = AutoTokenizer.from_pretrained(home / "qwen3")

    def render(content: object) -> str:
        return str(tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=made.template, tokenize=False,
            add_generation_prompt=True,
        ))  # fmt: skip

    image = "<image>" * 9
    assert f"<Img>{image}</Img> what?" in render(
        [{"type": "image"}, {"type": "text", "text": "what?"}]
    )
    assert f"<Img>{image}</Img>\nwhat?" in render(
        [{"type": "image"}, {"type": "text", "text": "\nwhat?"}]
    )
    assert f"a {image} b" in render("a <image> b")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("system", [None, "Be <brief>."])
def test_a_template_that_takes_lists(home: Path, tmp_path: Path, system: str | None) -> None:
    spoken = save_language(tmp_path / "parts", "qwen3", "chatml in parts")
    path = run_yaml(
        home, tmp_path, "siglip", "mlp", "qwen3", language={"path": str(spoken), "system": system}
    )
    assert_same(export(path, "llava", trained(path), tmp_path / "out"))


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "names", "changes", "told"),
    [
        ("blip2", ("siglip", "linear"), {}, r"model\.vision\.name: hf: BLIP-2's class holds"),
        ("llava", ("eva_qformer", "linear"), {}, r"vision\.name: eva_qformer: LLaVA's class holds"),
        ("llava", ("dinov2", "linear"), {}, r"model\.vision\.path: dinov2: exported are sig"),
        ("llava", ("siglip+dinov2", "linear"), {}, r"vision\.name: fused: LLaVA's class holds one"),
        ("llava", ("siglip", "linear"), {"vision": {"image_size": 42}}, r"size: 42: .*interpolate"),
        ("llava", ("siglip", "merge"), {}, r"connector\.name: merge: LLaVA's class has at most"),
        ("llava", ("siglip", "deep"), {}, r"connector\.name: mlp of 3 layers: LLaVA's class has"),
        ("blip2", ("eva_qformer", "mlp"), {}, r"mlp of 2 layers: BLIP-2's class has one linear"),
        ("llava", ("siglip", "mlp"), {"language": {"quantize": "int8"}}, r"quantize: int8"),
        ("llava", ("siglip", "mlp"), {"language": {"template": f"{__name__}:OwnTemplate"}},
         r"model\.language\.template: OwnTemplate is a class of Python"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused_before_weights_are_read(
    home: Path,
    tmp_path: Path,
    kind: str,
    names: tuple[str, str],
    changes: dict[str, Any],
    told: str,
) -> None:
    path = run_yaml(home, tmp_path, *names, "qwen3", **changes)
    with pytest.raises(ConfigError, match=told):
        Export.of(load_config(path), kind)


def test_a_head_that_is_not_bare(home: Path, tmp_path: Path) -> None:
    path = run_yaml(home, tmp_path, "siglip", "mlp", "gemma2")
    with pytest.raises(ConfigError, match=r"language\.path: Gemma2ForCausalLM scales, caps or"):
        export(path, "llava", trained(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_prepared_in_another_way(home: Path, tmp_path: Path) -> None:
    path = run_yaml(home, tmp_path, "siglip", "mlp", "llama")
    checkpoint = trained(path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["preprocess"]["vis_processor"]["eval"] = {"name": "blip2_image_train"}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"vis_processor\.eval must be blip_image_eval"):
        export(path, "llava", checkpoint, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.usefixtures("here")
def test_another_model_is_not_kept(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_yaml(home, tmp_path, "siglip", "mlp", "llama")
    checkpoint, whole = trained(path), Llava.weights

    def damaged(self: Llava, *args: Any) -> dict[str, Weight]:
        names = whole(self, *args)
        first = names["multi_modal_projector.linear_1.weight"].read()
        return names | {"multi_modal_projector.linear_1.weight": Weight.of(first * 1.001)}

    monkeypatch.setattr(Llava, "weights", damaged)
    with pytest.raises(WeightsError, match="another model: conversation 1, image features: "):
        export(path, "llava", checkpoint, tmp_path / "out")
    monkeypatch.setattr(Llava, "weights", lambda *args: dict(list(whole(*args).items())[1:]))
    with pytest.raises(WeightsError, match="another model: weights, missing keys"):
        export(path, "llava", checkpoint, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_0.pth", "run.yaml"]


def test_numbers_that_half_precision_does_not_hold(tmp_path: Path) -> None:
    weights = {"x.weight": Weight.of(torch.full((2,), 1e6))}
    with pytest.raises(
        WeightsError, match=r"x\.weight is not finite in torch\.float16: see --dtype"
    ):
        write_shards(weights, tmp_path, dtype=torch.float16, limit=5e9)


def test_a_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(ConfigError, match="is not empty, and nothing is overwritten"):
        require_empty(tmp_path)


@pytest.mark.parametrize(
    ("got", "rows", "same"),
    [([5, 6, 9], 3, 1), ([5, 7, 9], 3, 0), ([5, 8, 9], 3, None), ([5, 6], 3, None)],
)
def test_another_answer_only_where_two_tokens_are_as_likely(
    got: list[int], rows: int, same: int | None
) -> None:
    logits = torch.zeros(rows, 10)
    logits[0, 5] = logits[1, 6] = logits[2, 9] = 2.0
    logits[1, 7] = 1.9
    if same is None:
        with pytest.raises(check.DifferenceError, match="answer: "):
            check._answers("answer", got, [5, 6, 9], logits, 0.06)
    else:
        assert check._answers("answer", got, [5, 6, 9], logits, 0.06) == same


# --- a folder of LLaVA goes on here ---------------------------------------------------------------


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("names", "vision"),
    [
        (("siglip", "mlp", "qwen3"), {}),
        (("siglip", "linear", "llama"), {"layer": -2}),
        (("clip", "mlp", "llama"), {}),
    ],
)
def test_parts_of_a_stock_folder(
    home: Path, tmp_path: Path, names: tuple[str, ...], vision: dict[str, Any]
) -> None:
    path = run_yaml(home, tmp_path, *names, vision=vision)
    out = tmp_path / "out"
    export(path, "llava", trained(path), out)
    stock: Any = LlavaForConditionalGeneration.from_pretrained(out)
    towers.randomize(stock.model.multi_modal_projector)
    towers.randomize(stock.model.vision_tower)
    other = tmp_path / "other"
    shutil.copytree(out, other)
    stock.save_pretrained(other)
    same = {"path": str(other)}
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for part in ("vision", "connector", "language"):
        content["model"][part] = {
            k: v for k, v in (content["model"][part] | same).items() if k != "layer"
        }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    model = load_model("vlm", is_eval=True, cfg_path=path)
    pixels = towers.pictures(28)
    with torch.no_grad():
        wanted = torch.stack(list(stock.get_image_features(pixels).pooler_output))
        torch.testing.assert_close(model.encode_image(pixels), wanted, rtol=0, atol=1e-4)
        ids = torch.tensor([[5, 9, 20, 3, 77, 41]])
        logits = model.language.model(input_ids=ids).logits
        torch.testing.assert_close(stock(input_ids=ids).logits, logits, rtol=1e-5, atol=2e-6)
    again = export(path, "llava", trained(path), tmp_path / "again")
    assert_same(again, features=2e-4, logits=1e-4)


def test_a_projector_of_other_layers(home: Path, tmp_path: Path) -> None:
    path = run_yaml(
        home, tmp_path, "siglip", "mlp", "llama", connector={"path": str(home / "llama")}
    )
    with pytest.raises(
        WeightsError, match=r"connector\.path: .* holds no projector of LLaVA or BL"
    ):
        load_model("vlm", cfg_path=path)
    from lavis.models.weights.projector import load_projector

    stock = tmp_path / "stock"
    stock.mkdir()
    weights = {
        f"multi_modal_projector.linear_{n}.{k}": Weight.of(
            torch.ones(4, 4) if k == "weight" else torch.ones(4)
        )
        for n in (1, 2)
        for k in ("weight", "bias")
    }
    write_shards(weights, stock, dtype=torch.float32, limit=5e9)
    (stock / "config.json").write_text("{}", encoding="utf-8")

    def key(part: str, name: str) -> str:
        return f"model.{part}.{name}"

    with pytest.raises(
        ConfigError, match=r"2 linear layers: set model\.connector\.name: mlp, depth: 2"
    ):
        load_projector(torch.nn.Linear(4, 4), stock, key)
    wide = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.GELU(), torch.nn.Linear(4, 4))
    with pytest.raises(
        LavisError, match=r"a layer of shape \(4, 4\), the connector one of \(4, 5\)"
    ):
        load_projector(wide, stock, key)
    (stock / "config.json").write_text('{"projector_hidden_act": "linear"}', encoding="utf-8")
    one = torch.nn.Linear(4, 4)
    load_projector(one, stock, key)
    assert torch.equal(one.weight, torch.full((4, 4), 4.0))
    assert torch.equal(one.bias, torch.full((4,), 5.0))
