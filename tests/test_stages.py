"""Training in stages: what begins to learn from a checkpoint that was trained without it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import evaluate
import train
from lavis.common.config import load_config
from lavis.common.errors import WeightsError
from lavis.models import load_model
from lavis.models.legacy import MiniGPT4QwenConfig
from lavis.models.weights.trained import trainable_state
from lavis.tools.merge import check_mergeable
from tests.conftest import TOY, TOY_YAML
from tests.test_parts import loss, make_home, prepare, state

pytest.importorskip("peft")
ADAPTERS = "language: {lora: {r: 4, dropout: 0}, lr: 1e-2}"
NEW = {
    "adapters": (ADAPTERS, "language", "lora_"),
    "dora": (ADAPTERS.replace("r: 4", "r: 4, use_dora: true"), "language", "lora_"),
    "language": ("language: 1e-3", "language", "llm_model."),
    "vision": ("vision: {parts: [qformer], lr: 1e-3}", "vision", "Qformer."),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("stages"), "llama")


@pytest.fixture(scope="module")
def first(home: Path) -> tuple[Path, float]:
    """A checkpoint of the connector alone, and its loss."""
    runner = prepare(home, "run.max_epoch=1", job="first")
    return runner.train(), loss(runner)


def second(checkpoint: Path, learns: str, out: Path) -> list[str]:
    return [
        f"model.train={{connector: 1e-3, {learns}}}",
        "model.load_finetuned=true",
        f"model.finetuned={checkpoint}",
        f"run.output_dir={out}",
        "run.max_epoch=1",
    ]


def without(checkpoint: Path, part: str, path: Path) -> Path:
    """A checkpoint without one of the tensors whose names have a part."""
    content = torch.load(checkpoint, weights_only=True)
    del content["model"][next(name for name in content["model"] if part in name)]
    torch.save(content, path)
    return path


@pytest.mark.parametrize("kind", NEW)
def test_what_is_new_starts_where_the_first_stage_ended(
    home: Path, first: tuple[Path, float], tmp_path: Path, kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    learns, part, named = NEW[kind]
    options = second(first[0], learns, tmp_path)
    with caplog.at_level("INFO"):
        runner = prepare(home, *options)
    assert loss(runner) == pytest.approx(first[1], rel=1e-6)
    told = f"{first[0]} has nothing of what is trained in {part}, which starts as its files have it"
    assert told in caplog.text
    before = {n: p.clone() for n, p in runner.model.trainable_parameters().items()}
    checkpoint = runner.train()
    after = runner.model.trainable_parameters()
    assert any(not torch.equal(after[n], p) for n, p in before.items() if n.startswith(part))
    assert abs(loss(runner) - first[1]) > 1e-3

    part_of = without(checkpoint, named, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=rf"part\.pth lacks .*{named}.*, which is trained"):
        runner.model.load_checkpoint(part_of, start=True)
    with pytest.raises(WeightsError, match=r"lacks .*, which is trained|lora\.r: nothing"):
        runner.model.load_checkpoint(first[0])
    runner.model.load_checkpoint(checkpoint, start=True)
    for name, tensor in state(checkpoint).items():
        assert torch.equal(trainable_state(runner.model)[name], tensor), name


def test_the_second_stage_goes_on_and_answers(
    home: Path, first: tuple[Path, float], tmp_path: Path
) -> None:
    """Its configuration still names the checkpoint that it began with."""
    options = second(first[0], ADAPTERS, tmp_path)
    runner = prepare(home, *options)
    checkpoint = runner.train()
    wanted = trainable_state(runner.model)
    resumed = prepare(home, *options, f"run.resume_ckpt_path={checkpoint}", job="resumed")
    answering = {"cfg_path": home / "run.yaml", "options": options[:3], "is_eval": True}
    model = load_model("", checkpoint=checkpoint, **answering)
    for other in (resumed.model, model):
        assert all(torch.equal(t, wanted[n]) for n, t in trainable_state(other).items())
    with pytest.raises(WeightsError, match=r"lora\.r: nothing \(now 4\)"):
        load_model("", **answering)


def test_what_stands_in_no_file_is_not_new(
    home: Path, first: tuple[Path, float], tmp_path: Path
) -> None:
    half = without(first[0], "llm_proj.bias", tmp_path / "half.pth")
    content = torch.load(half, weights_only=True)
    none = tmp_path / "none.pth"
    torch.save(content | {"model": {}}, none)
    model = prepare(home, *second(first[0], ADAPTERS, tmp_path)).model
    for path in (half, none):
        with pytest.raises(WeightsError, match=r"lacks llm_proj\..*, which is trained"):
            model.load_checkpoint(path, start=True)
    for scratch, new in (("llm", ("vision",)), ("qformer", ("language",)), ("vit", ("language",))):
        config = MiniGPT4QwenConfig(arch="minigpt4qwen", from_scratch=(scratch,))  # type: ignore[arg-type]
        assert config.new_parts == new
    assert MiniGPT4QwenConfig(arch="minigpt4qwen").new_parts == ("vision", "language")


def test_adapters_of_other_settings_are_not_new(
    home: Path, first: tuple[Path, float], tmp_path: Path
) -> None:
    adapted = prepare(home, *second(first[0], ADAPTERS, tmp_path)).train()
    for change, told in (
        (("r: 4", "r: 2"), r"set model\.train\.language\.lora\.r: 4 \(now 2\)"),
        (("r: 4", "r: 4, targets: [up_proj]"), r"lora\.targets: \['q_proj', 'v_proj'\] \(now"),
        (("r: 4", "r: 4, targets: all"), r"lacks .*lora_A.*, which is trained"),
    ):
        with pytest.raises(WeightsError, match=told):
            prepare(home, *second(adapted, ADAPTERS.replace(*change), tmp_path))
    content = torch.load(adapted, weights_only=True)
    del content["config"]  # it does not say what its adapters are
    torch.save(content, tmp_path / "mute.pth")
    up = ADAPTERS.replace("r: 4", "r: 4, targets: [up_proj]")
    with pytest.raises(WeightsError, match=r"holds 8 tensors that are not part of this model"):
        prepare(home, *second(tmp_path / "mute.pth", up, tmp_path))


def test_the_originals_keys(tmp_path: Path) -> None:
    """Its file does not say how it was trained."""
    path = tmp_path / "run.yaml"
    path.write_text(TOY_YAML, encoding="utf-8")
    options = ["model.get_lora=true", "model.load_finetuned=true"]
    options.append(f"model.finetuned={TOY / 'checkpoint_9.pth'}")
    model = load_model("minigpt4qwen", cfg_path=path, options=options)
    old = torch.load(TOY / "checkpoint_9.pth", weights_only=True)["model"]
    assert torch.equal(model.connector.weight, old["llm_proj.weight"].float())
    with pytest.raises(WeightsError, match=r"made without LoRA: set model\.get_lora: false"):
        load_model("minigpt4qwen", is_eval=True, cfg_path=path, options=options)


def test_commands(
    home: Path, first: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = second(first[0], ADAPTERS, tmp_path)

    def run(command: object, *more: object) -> str:
        start = [command.__name__, "--cfg-path", home / "run.yaml"]  # type: ignore[attr-defined]
        monkeypatch.setattr(sys, "argv", [*map(str, (*start, *more)), "--options", *options])
        assert command.main() == 0  # type: ignore[attr-defined]
        return capsys.readouterr().out

    checkpoint = Path(run(train).splitlines()[-1])
    assert sum("lora_" in name for name in state(checkpoint)) == 2 * 2 * 2
    run(evaluate, "--checkpoint", checkpoint, "--out", tmp_path / "scores", "--limit", 1)
    with pytest.raises(WeightsError, match=r"lora\.r: nothing \(now 4\)"):
        run(evaluate, "--out", tmp_path / "scores", "--limit", 1)
    options += ["run.evaluate=true", "run.test_splits=[test]"]
    run(train, "--options", f"run.resume_ckpt_path={checkpoint}")
    with pytest.raises(WeightsError, match=r"lora\.r: nothing \(now 4\)"):
        run(train)


def test_merging_after_two_stages(home: Path, first: tuple[Path, float], tmp_path: Path) -> None:
    """The merged model is where a third stage begins, with adapters that are new again."""
    from lavis.models.language.merged import merge

    options = second(first[0], ADAPTERS, tmp_path)
    runner = prepare(home, *options)
    checkpoint = runner.train()
    config = load_config(home / "run.yaml", options)
    check_mergeable(config, tmp_path / "merged")
    merge(config, checkpoint, tmp_path / "merged", dtype=None, device=torch.device("cpu"))
    merged, lora = tmp_path / "merged" / "run.yaml", f"model.train={{connector: 1e-3, {ADAPTERS}}}"
    plain = load_model("", cfg_path=merged)
    again = load_model("", cfg_path=merged, options=[lora])
    pixels = torch.rand(1, 3, 84, 84)
    assert torch.equal(plain.encode_image(pixels), runner.model.encode_image(pixels))
    assert torch.equal(again.encode_image(pixels), plain.encode_image(pixels))
    ids = torch.tensor([[5, 9, 20, 3]])
    logits = [m.eval().language.model(input_ids=ids).logits for m in (again, plain)]
    assert torch.equal(*logits)
