"""The front door: which model, from where, on what."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from lavis.chat.command import add_chat_arguments, choose_model, load_chat
from lavis.common.config import default_model_config
from lavis.common.errors import ConfigError, WeightsError
from lavis.common.paths import REPOSITORY, TOYBOX
from lavis.models import load_model, load_model_and_preprocess
from lavis.models.build import MiniGPT4Qwen
from tests.conftest import TOY_YAML

COUNT = "图里有几个物体？"


def test_the_toybox_answers_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, processors, _ = load_model_and_preprocess("minigpt4qwen", "toybox", is_eval=True)
    scene = TOYBOX / "image" / "scene.png"
    question = f"<Img><ImageHere></Img> {COUNT}"
    assert model.chat(question, None, scene)[0] == "三个。"
    assert model.generate({"image": scene, "prompt": COUNT}) == ["三个。"]
    assert model.generate({"image": [scene, TOYBOX / "image" / "four.png"], "prompt": COUNT}) == [
        "三个。", "四个。"
    ]  # fmt: skip
    assert set(processors) == {"train", "eval"}


def test_the_toybox_to_be_trained_begins_untrained() -> None:
    trained = torch.load(TOYBOX / "checkpoint.pth", weights_only=True)["model"]
    first = load_model("minigpt4qwen", "toybox")
    assert not torch.equal(first.connector.weight, trained["llm_proj.weight"])
    for options in ({"is_eval": True}, {"checkpoint": TOYBOX / "checkpoint.pth"}):
        weight = load_model("minigpt4qwen", "toybox", **options).connector.weight
        assert torch.equal(weight, trained["llm_proj.weight"])


def test_a_toybox_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's folder wins, also over that of an installed package, which has none."""
    (tmp_path / "examples").symlink_to(TOYBOX.parent)
    monkeypatch.setattr("lavis.models.loading.TOYBOX", tmp_path / "none")
    with pytest.raises(WeightsError) as caught:
        load_model("minigpt4qwen", "toybox")
    assert str(caught.value) == (
        f"no folder {tmp_path / 'none'}: the toybox comes with the repository, not with an "
        "installed package. Point env.cache_root at the top of a clone"
    )
    model = load_model("minigpt4qwen", "toybox", options=[f"env.cache_root={tmp_path}"])
    assert str(model.tokenizer.path).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("yaml", "argument", "used"),
    [("auto", None, "auto"), ("cpu", None, "cpu"), ("auto", "cpu", "cpu"), ("cpu", "auto", "auto")],
)
def test_the_yaml_is_overridden_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yaml: str, argument: str | None, used: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(TOY_YAML.replace("model:\n", f"model:\n  llm_device_map: {yaml}\n"))
    seen = []

    def spy(config: Any, **arguments: Any) -> Any:
        seen.append(config.llm_device_map)
        raise InterruptedError

    monkeypatch.setattr(MiniGPT4Qwen, "from_config", spy)
    with pytest.raises(InterruptedError):
        load_model_and_preprocess("minigpt4qwen", None, True, "cpu", argument, cfg_path=path)
    assert seen == [used]


def test_another_model_than_the_yaml_has(toy_yaml: Path) -> None:
    config = default_model_config("minigpt4qwen", None, (), toy_yaml)
    assert config.model.model_type == "qwen7b_chat"
    with pytest.raises(ConfigError) as caught:
        load_model("minigpt4qwen", "qwen14b_chat", cfg_path=toy_yaml)
    assert str(caught.value) == (
        f"{toy_yaml}: model.model_type is qwen7b_chat, but qwen14b_chat is asked for"
    )


@pytest.mark.parametrize(
    ("flags", "model_type"),
    [
        ([], "toybox"),
        (["-c", "x.pth"], "qwen7b_chat"),
        (["-c", "x.pth", "--cfg-path", "a.yaml"], None),
        (["-c", "x.pth", "--model-type", "toybox"], "toybox"),
    ],
)
def test_model_type_of_a_command(flags: list[str], model_type: str | None) -> None:
    add_chat_arguments(parser := argparse.ArgumentParser())
    args = parser.parse_args(flags)
    choose_model(args)
    assert (args.model_type, args.llm_device_map, args.options) == (model_type, None, [])


@pytest.mark.parametrize(
    ("flags", "device"),
    [
        ([], "auto"),
        (["--cpu-only"], "cpu"),
        (["--gpu_id", "1"], "cuda:1"),
        (["--gpu-id", "0"], "cuda:0"),
        (["--device", "cuda"], "cuda"),
        (["--device", "cuda", "--cpu-only"], None),
        (["--gpu_id", "-1"], None),
        (["--gpu_id", "a"], None),
    ],
)
def test_device_of_a_command(
    flags: list[str], device: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    add_chat_arguments(parser := argparse.ArgumentParser())
    if device is not None:
        assert parser.parse_args(flags).device == device
        return
    with pytest.raises(SystemExit):
        parser.parse_args(flags)
    assert ": error: argument --" in capsys.readouterr().err


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, toy_yaml: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for device in ("cuda", torch.device("cuda", 1)):
        with pytest.raises(ConfigError) as caught:
            load_model("minigpt4qwen", "qwen7b_chat", device=device, cfg_path=toy_yaml)
        assert str(caught.value).startswith(f"device is {device} but 0 CUDA devices are visible. ")
        assert str(caught.value).endswith('On a machine without a GPU: device="cpu"')
    assert load_model("minigpt4qwen", device="auto", cfg_path=toy_yaml).device.type == "cpu"


def test_a_command_takes_a_model_of_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_chat_arguments(parser)
    monkeypatch.chdir(REPOSITORY)
    path = "lavis/projects/toybox/smollm2.yaml"
    words = ["--cfg-path", path, "--checkpoint", str(TOYBOX / "checkpoint.pth")]
    options = ["--options", f"model.language.path={tmp_path}/none"]
    with pytest.raises(WeightsError, match=r"model\.language\.path"):  # all but this is found
        load_chat(parser.parse_args([*words, *options]))


def test_where_a_language_model_computes_reaches_the_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(REPOSITORY)
    options = [f"model.language.path={tmp_path}/none"]
    with pytest.raises(WeightsError, match=r"model\.language\.path"):
        load_model_and_preprocess(
            "vlm", None, llm_device_map="cpu", options=options,
            cfg_path="lavis/projects/toybox/smollm2.yaml",
        )  # fmt: skip
