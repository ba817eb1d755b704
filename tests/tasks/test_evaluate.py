"""evaluate.py from the configuration to the files it leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import evaluate as command
from lavis.common.config import load_config
from lavis.common.errors import ConfigError, DataError, LavisError
from lavis.models.vlm import VLM
from lavis.tasks.evaluate import evaluate, score_files
from lavis.tasks.image_text_pretrain import ImageTextPretrainTask
from tests.conftest import TOY, TOY_YAML


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _evaluate(task: Any, out: Path) -> str:
    splits = task.build_questions(["test"])
    model = task.build_model(torch.device("cpu")).eval()
    model.load_checkpoint(TOY / "checkpoint_9.pth")
    return evaluate(model, splits, task.config.run, out)


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    return command.main()


def _arguments(task: Any, out: Path) -> tuple[str, ...]:
    """Those of the command that does what :func:`_evaluate` does."""
    checkpoint = ("--checkpoint", str(TOY / "checkpoint_9.pth"))
    return ("--cfg-path", task.config.source, *checkpoint, "--out", str(out))


@pytest.fixture()
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(ImageTextPretrainTask, "build_model", refuse)


def _task(tmp_path: Path, *options: str, truth: str = "Red.", kind: str = "") -> Any:
    records = []
    for i, (own_kind, language) in enumerate([("colour", "en"), ("colour", "zh"), ("shape", "en")]):
        Image.new("RGB", (60, 60), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
        records.append(
            {
                "image": f"{i}.png",
                "instruction": "<Img><ImageHere></Img> $What?",
                "output": truth,
                "kind": kind or own_kind,
                "language": language,
            }
        )
    (tmp_path / "test.json").write_text(json.dumps(records), encoding="utf-8")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""{TOY_YAML}
datasets:
  mine:
    builder: instruction
    build_info:
      annotations: {{test: {{storage: {tmp_path / "test.json"}}}}}
      images: {{storage: {tmp_path}}}
run: {{device: cpu, batch_size_eval: 2, max_new_tokens: 4}}
""",
        encoding="utf-8",
    )
    return ImageTextPretrainTask(load_config(path, options))


def test_writes_answers_scores_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _run(monkeypatch, *_arguments(_task(tmp_path), out), "--baselines") == 0
    text = capsys.readouterr().out.removesuffix("\n")
    assert "test, blind" in text
    assert "test, untrained" in text
    names = ["test", "test, blind", "test, untrained"]
    files = [out / f"{name}.jsonl" for name in names]
    assert {p.name for p in out.iterdir()} == {"test.png", "scores.json", *(p.name for p in files)}
    answers = _rows(out / "test.jsonl")
    assert [a["sample_id"] for a in answers] == [f"test.json[{i}]" for i in range(3)]
    assert [a["question"] for a in answers] == ["$What?"] * 3
    assert {a["truth"] for a in answers} == {"Red."}
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert set(scores) == {"test", "test, blind", "test, untrained"}
    assert scores["test"]["count"] == 3
    assert set(scores["test"]["kinds"]) == {"colour", "shape"}
    with Image.open(out / "test.png") as picture:
        assert picture.width > 500
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 24)
        assert colours is not None
        assert {(0, 0, 0), (80, 0, 0), (160, 0, 0)} <= {colour for _, colour in colours}
    again = score_files(files, tmp_path / "again")
    assert text == f"{again}\nanswers, pictures and scores: {out}"
    assert json.loads((tmp_path / "again" / "scores.json").read_text(encoding="utf-8")) == scores


def test_an_unknown_split_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no split 'tst'; did you mean 'test'"):
        _task(tmp_path).check_paths(("tst",))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("out", ["file", "file/below", "link", "x" * 300])
def test_a_destination_that_cannot_be_written_is_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    with pytest.raises(SystemExit, match="2"):
        _run(monkeypatch, *_arguments(_task(tmp_path), tmp_path / out))
    assert f"{tmp_path / out} cannot be " in capsys.readouterr().err


@pytest.mark.usefixtures("no_model")
def test_the_default_destination_is_looked_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = _arguments(_task(tmp_path), tmp_path)[:4]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").touch()
    with pytest.raises(ConfigError, match=r"^--out: .*output/evaluation cannot be "):
        _run(monkeypatch, *arguments)


@pytest.mark.usefixtures("no_model")
def test_missing_sacrebleu_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigError, match="needs sacreBLEU: pip install sacrebleu"):
        _run(monkeypatch, *_arguments(_task(tmp_path, kind="description"), tmp_path / "out"))
    row = {"sample_id": "1", "kind": "description", "language": "en", "question": "?"}
    row |= {"answer": "a", "truth": "b", "image": ""}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match="needs sacreBLEU"):
        score_files([tmp_path / "test.jsonl"], None)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], limit: int
) -> None:
    with pytest.raises(SystemExit, match="2"):
        _run(monkeypatch, *_arguments(_task(tmp_path), tmp_path / "out"), "--limit", str(limit))
    assert (
        f"argument --limit: must be an integer from 1 to 2^63 - 1, not {str(limit)!r}"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_an_interrupted_evaluation_keeps_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stop: Any
) -> None:
    """Two of three records are answered; an earlier evaluation's files are as they were."""
    task, out = _task(tmp_path, "run.batch_size_eval=1"), tmp_path / "out"
    before = _evaluate(task, out)
    files = {p: p.read_bytes() for p in out.iterdir()}
    original, calls = VLM.encode_spans, []

    def encode_spans(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise stop
        return original(self, *args)

    monkeypatch.setattr(VLM, "encode_spans", encode_spans)
    with pytest.raises(type(stop) if isinstance(stop, Exception) else stop):
        _evaluate(task, out)
    part = out / "test.part.jsonl"
    assert _rows(part) == _rows(out / "test.jsonl")[:2]
    assert f"2 of 3 answers are in {part}" in caplog.text
    assert {p: p.read_bytes() for p in files} == files
    assert _evaluate(task, out) == before
    assert not part.exists()


def test_half_a_surrogate_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In truths, answers, kinds: written as JSON's escape, beside readable Chinese."""
    monkeypatch.setattr(
        "lavis.processors.tokenizer.QwenTokenizer.decode", lambda *_, **__: "猫 \udc00."
    )
    text = _evaluate(_task(tmp_path, truth="猫 \ud83d.", kind="\ud800"), tmp_path / "out")
    text.encode()
    (row, *_) = _rows(tmp_path / "out" / "test.jsonl")
    assert (row["truth"], row["answer"], row["kind"]) == ("猫 \ud83d.", "猫 \udc00.", "\ud800")
    assert "猫 \\ud83d." in (tmp_path / "out" / "test.jsonl").read_text(encoding="utf-8")
    assert text.startswith(score_files([tmp_path / "out" / "test.jsonl"], tmp_path / "again"))
    scores = json.loads((tmp_path / "again" / "scores.json").read_text(encoding="utf-8"))
    assert list(scores["test"]["kinds"]) == ["\ud800"]


def test_a_picture_that_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It stops the evaluation, or its record is left out, counted and listed."""
    out = tmp_path / "out"
    skipping = _task(tmp_path, "run.on_bad_sample=skip")
    (tmp_path / "2.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"^test.json\[2\]: .*2.png is not an image that can be"):
        _evaluate(ImageTextPretrainTask(load_config(tmp_path / "run.yaml")), out)
    assert [r["sample_id"] for r in _rows(out / "test.part.jsonl")] == [
        "test.json[0]",
        "test.json[1]",
    ]
    text = _evaluate(skipping, out)
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))["test"]
    assert scores["count"] == 2
    assert (out / "test.png").exists()
    assert set(scores["kinds"]) == {"colour"}
    (skipped,) = scores["skipped"]
    assert skipped["sample_id"] == "test.json[2]"
    assert "2.png is not an image that can be read" in skipped["reason"]
    assert "skipped test.json[2]" in caplog.text
    assert ["skipped", "1"] in [line.split() for line in text.splitlines()]
    assert score_files([out / "test.jsonl"], None) in text


def test_nothing_to_ask_is_no_score(tmp_path: Path) -> None:
    task = _task(tmp_path, "run.on_bad_sample=skip")
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    lines = _evaluate(task, tmp_path / "out").splitlines()
    assert [line.split() for line in lines[1:3]] == [["all", "questions", "-"], ["skipped", "3"]]


def test_the_command_scores_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"kind": "k", "language": "-", "question": "?", "image": "", "sample_id": "1"}
    for name, answer in (("one", "Red."), ("two", "blue")):
        (tmp_path / name).mkdir()
        line = json.dumps(row | {"answer": answer, "truth": "red"})
        (tmp_path / name / "test.jsonl").write_text(f"{line}\n", encoding="utf-8")
    files = [str(tmp_path / name / "test.jsonl") for name in ("one", "two")]
    assert _run(monkeypatch, "--score", *files) == 0
    head, kind, overall = capsys.readouterr().out.splitlines()
    assert head.split() == files  # one name for two files would hide one of them
    assert kind.split() == ["k", "-", "100.0%", "0.0%"]
    assert overall.split() == ["all", "questions", "100.0%", "0.0%"]
    for arguments in (("--score", files[0], "--checkpoint", "x"), ()):
        with pytest.raises(SystemExit, match="2"):
            _run(monkeypatch, *arguments)
    assert "--cfg-path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sample_id": "1"}', "'answer 1.kind' is missing"),
        ("[1]", "answer 1 cannot be read"),
        ("{", "answer 1 cannot be read"),
        ("\n", "holds no answer"),
    ],
)
def test_files_that_hold_no_answers(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(LavisError, match=f"{tmp_path / 'x.jsonl'}.*{message}"):
        score_files([tmp_path / "x.jsonl"], None)
