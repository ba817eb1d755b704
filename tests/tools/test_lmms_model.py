"""The model behind ``lmms-eval --model lavis``: by its documented protocol, and in its own run.

Where lmms-eval is not installed, the parts of it that the model touches are made here, with the
signatures of version 0.7.3.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.server import server
from examples.toybox.world.__main__ import write_split
from lavis.common.errors import ConfigError, DataError
from lavis.processors.conversation import IMAGE, Turn
from tests.conftest import REPO, TOY

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
GREEDY = {"max_new_tokens": 4, "do_sample": False, "temperature": 0.0, "until": ["\n\n"]}


def _stand_in() -> dict[str, ModuleType]:
    class Lmms:
        is_simple = True

        def __init__(self) -> None:
            self._rank, self._world_size = 0, 1
            self.task_dict: dict[str, Any] = {}

    class ChatMessages:
        def __init__(self, *, messages: list[dict[str, Any]]) -> None:
            self.messages = [
                SimpleNamespace(
                    role=m["role"],
                    content=[
                        SimpleNamespace(**{"start_time": None, "end_time": None} | part)
                        for part in m["content"]
                    ],
                )
                for m in messages
            ]

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple[str, ...] = ()

    made = {}
    for name, members in {
        "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.models": {},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.protocol": {"ChatMessages": ChatMessages},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }.items():  # fmt: skip
        made[name] = ModuleType(name)
        vars(made[name]).update(members)
    return made


@pytest.fixture(scope="module")
def kind() -> Any:
    """The class that the manifest names."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in ({} if INSTALLED else _stand_in()).items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "lavis.tools.lmms_model", raising=False)
        from lavis.tools import lmms_manifest

        manifest = lmms_manifest()
        assert manifest.model_id == "lavis"
        module, _, name = str(manifest.chat_class_path).rpartition(".")
        found = getattr(importlib.import_module(module), name)
        assert not found.is_simple
        yield found
        del sys.modules["lavis.tools.lmms_model"]


@pytest.fixture(scope="module")
def lm(kind: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.conftest import TOY_YAML

    path = tmp_path_factory.mktemp("lmms") / "toy.yaml"
    path.write_text(TOY_YAML, encoding="utf-8")
    checkpoint = str(TOY / "checkpoint_9.pth")
    made = kind(cfg=str(path), checkpoint=checkpoint, device="cpu", batch_size=2, max_frames=3)
    made.path = str(path)
    return made


def _picture(level: int) -> Image.Image:
    return Image.new("RGB", (56, 56), (level, 255 - level, 0))


def _user(*content: Any, role: str = "user") -> dict[str, Any]:
    """A message of texts and pictures."""
    parts = [
        {"type": "text", "text": c} if isinstance(c, str) else
        {"type": "image", "url": c} if isinstance(c, Image.Image) else c
        for c in content
    ]  # fmt: skip
    return {"role": role, "content": parts}


def _ask(lm: Any, *docs: list[dict[str, Any]], settings: Any = GREEDY) -> list[str]:
    """Answers to documents that are their own messages."""
    lm.task_dict = {"task": {"test": docs}}
    given = settings if isinstance(settings, list) else [settings] * len(docs)
    arguments = [("", lambda doc: doc, given[i], i, "task", "test") for i in range(len(docs))]
    answers: list[str] = lm.generate_until([SimpleNamespace(args=a) for a in arguments])
    return answers


def _expected(lm: Any, turns: list[Turn], pictures: list[Any], **settings: Any) -> str:
    """What the model answers alone."""
    pixels = torch.stack([lm.model.vis_processor(p) for p in pictures]) if pictures else None
    settings = {"max_new_tokens": 4} | settings
    (ids,) = lm.model.generate_ids([lm.model.encoder.prompt(turns)], pixels, **settings)
    return str(lm.model.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def test_each_request_gets_its_own_answer_in_order(lm: Any) -> None:
    """Five of different lengths, two at a time, one without a picture."""
    docs, expected = [], []
    for i, question in enumerate(
        ["What?", "What is in the picture here?", "Why", "Where is", "No"]
    ):
        shown = [] if i == 2 else [_picture(60 * i)]
        docs.append([_user(*shown, question)])
        text = f"{IMAGE} {question}" if shown else question
        expected.append(_expected(lm, [Turn("user", text)], shown))
    assert _ask(lm, *docs) == expected
    assert len(set(expected)) > 2


def test_pictures_turns_and_the_system_prompt_stand_where_they_are_given(lm: Any) -> None:
    one, two, three = (_picture(level) for level in (0, 120, 240))
    many = _user(one, two, "Which", three, "of them?")
    turns = [Turn("user", f"{IMAGE}{IMAGE} Which{IMAGE} of them?")]
    assert _ask(lm, [many]) == [_expected(lm, turns, [one, two, three])]
    talk = [_user(one, "What?"), _user("Red.", role="assistant"), _user("Sure?", two)]
    turns = [
        Turn("user", f"{IMAGE} What?"),
        Turn("assistant", "Red."),
        Turn("user", f"Sure?{IMAGE}"),
    ]
    assert _ask(lm, talk) == [_expected(lm, turns, [one, two])]
    prompt, _ = lm._prompt(sys.modules["lmms_eval.protocol"].ChatMessages(messages=talk))
    told = [_user("Be brief.", role="system"), *talk]
    with_system, _ = lm._prompt(sys.modules["lmms_eval.protocol"].ChatMessages(messages=told))
    assert prompt != with_system
    assert "Be brief." in lm.model.tokenizer.decode(with_system)


def test_a_video_is_its_frames_in_one_place(lm: Any, tmp_path: Path) -> None:
    frames = [_picture(level) for level in (0, 100, 200)]
    turns = [Turn("user", f"<Img>{'<ImageHere>' * 3}</Img> What?")]
    expected = _expected(lm, turns, frames)
    assert _ask(lm, [_user({"type": "video", "url": frames}, "What?")]) == [expected]
    av = pytest.importorskip("av")
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        for i in range(9):
            picture = Image.new("RGB", (64, 64), (25 * i,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    shown: list[int] = []
    original = lm.model.encode_image
    lm.model.encode_image = lambda pixels: shown.append(len(pixels)) or original(pixels)
    try:
        _ask(lm, [_user({"type": "video", "url": str(path)}, "What?")])
    finally:
        del lm.model.encode_image
    assert shown == [3]  # max_frames


def test_settings_of_a_task_are_followed(lm: Any, caplog: pytest.LogCaptureFixture) -> None:
    doc, turns, shown = (
        [_user(_picture(9), "What?")],
        [Turn("user", f"{IMAGE} What?")],
        [_picture(9)],
    )
    settings = [
        {"max_new_tokens": 2}, {"max_new_tokens": 9}, {}, None,
        {"max_new_tokens": 4, "num_beams": 3}, {"max_new_tokens": 4, "image_aspect_ratio": "pad"},
    ]  # fmt: skip
    lm.max_new_tokens = 6
    answers = _ask(lm, *[doc] * 6, settings=settings)
    lengths = [2, 9, 6, 6]
    assert answers[:4] == [_expected(lm, turns, shown, max_new_tokens=n) for n in lengths]
    assert answers[4] == _expected(lm, turns, shown, num_beams=3)
    assert answers[5] == _expected(lm, turns, shown)
    assert "no effect: image_aspect_ratio" in caplog.text
    torch.manual_seed(1)
    drawn = _ask(lm, doc, settings={"max_new_tokens": 4, "temperature": 5.0, "do_sample": True})
    torch.manual_seed(1)
    assert drawn == [_expected(lm, turns, shown, do_sample=True, temperature=5.0)]
    assert drawn != answers[5:]


def test_an_answer_ends_before_what_the_task_names(lm: Any) -> None:
    doc = [_user(_picture(9), "What?")]
    (whole,) = _ask(lm, doc, settings={"max_new_tokens": 9})
    stop = whole[len(whole) // 2 :][:2]
    (cut,) = _ask(lm, doc, settings={"max_new_tokens": 9, "until": ["", stop]})
    assert cut == whole[: whole.index(stop)].strip()
    assert _ask(lm, doc, settings={"max_new_tokens": 9, "until": stop}) == [cut]


@pytest.mark.parametrize(
    ("messages", "error", "what"),
    [
        ([_user("<ImageHere>")], DataError, "a text of the task holds <ImageHere>"),
        ([_user({"type": "audio", "url": "x.wav"})], DataError, "no audio"),
        ([_user({"type": "video", "url": "v", "start_time": 1.0})], DataError, "part of a video"),
        ([_user({"type": "video", "url": 7})], DataError, "a file or a list of pictures, not 7"),
        ([_user("a"), _user("b")], DataError, "user and assistant in turn"),
        ([_user("a"), _user("b", role="assistant")], DataError, "the last a user's"),
        ([_user("What? " * 9000)], ConfigError, "pass this language model's context"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_named(
    lm: Any, messages: list[dict[str, Any]], error: type[Exception], what: str
) -> None:
    with pytest.raises(error, match=rf"task task, test\[0\]: .*{what}"):
        _ask(lm, messages)


def test_wrong_arguments_are_named(kind: Any, lm: Any) -> None:
    with pytest.raises(ConfigError, match="cfg is missing"):
        kind()
    with pytest.raises(ConfigError, match=r"unknown: chekpoint \(known: cfg, checkpoint"):
        kind(cfg=lm.path, chekpoint="x", max_batch_size=None)
    with pytest.raises(ConfigError, match="--batch_size must be a positive number, not 'auto'"):
        kind(cfg=lm.path, batch_size="auto")
    with pytest.raises(ConfigError, match=r"unknown key 'model\.depht'"):
        kind(cfg=lm.path, device="cpu", options="model.max_txt_len=64; model.depht=1")
    for method in (lm.loglikelihood, lm.generate_until_multi_round):
        with pytest.raises(NotImplementedError):
            method([])


def test_the_entry_point_is_declared() -> None:
    project = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    module, name = re.search(r'"lmms_eval.models"\]\nlavis = "([\w.]+):(\w+)"', project).groups()  # type: ignore[union-attr]
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")
def test_its_own_command_scores_the_toybox_as_evaluate_does(tmp_path: Path) -> None:
    """``pip install -e '.[lmms-eval]'``, then the commands of docs/evaluate.md and docs/serve.md:
    the model in lmms-eval's process, and its client of OpenAI's protocol with a server."""
    if "lavis" not in entry_points(group="lmms_eval.models").names:
        pytest.skip("this package was installed before it had an entry point")
    write_split(tmp_path / "cache" / "toybox" / "demo", "test", 36, seed=3)
    cfg = REPO / "lavis" / "projects" / "toybox" / "train.yaml"
    checkpoint = REPO / "examples" / "toybox" / "checkpoint.pth"
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    offline |= {"OMP_NUM_THREADS": "1"}
    root = f"env.cache_root={tmp_path}"
    files = {"vit_weights": "eva_vit_g.pth", "pretrained": "blip2.pth", "llm_model": "llm"}
    parts = "; ".join(f"model.{k}={REPO / 'examples/toybox' / v}" for k, v in files.items())

    def run(*command: str) -> None:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=os.environ | offline,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    run(
        str(REPO / "evaluate.py"), "--cfg-path", str(cfg), "--checkpoint", str(checkpoint),
        "--out", str(tmp_path / "ours"), "--options", root, *parts.split("; "),
    )  # fmt: skip
    asked = (
        # Not with -m: here, in place of a package that it imports, it would find our evaluate.py.
        "-c", "from lmms_eval.__main__ import cli_evaluate; cli_evaluate()", "--tasks", "toybox",
        "--include_path", str(REPO / "examples" / "lmms_eval"),
    )  # fmt: skip
    run(
        *asked, "--model", "lavis", "--device", "cpu", "--batch_size", "16",
        "--model_args", f"cfg={cfg},checkpoint={checkpoint},options={root};{parts}",
        "--output_path", str(tmp_path / "here"),
    )  # fmt: skip
    with server(parallel=4) as (address, _, _):
        run(
            *asked, "--model", "openai", "--output_path", str(tmp_path / "served"),
            "--model_args", f"model=toybox,base_url={address},api_key=none,max_retries=1",
        )  # fmt: skip
    ours = json.loads((tmp_path / "ours" / "scores.json").read_text(encoding="utf-8"))["test"]
    for way in ("here", "served"):
        (file,) = (tmp_path / way).rglob("*_results.json")
        theirs = json.loads(file.read_text(encoding="utf-8"))["results"]["toybox"]
        assert 100 * theirs["exact,none"] == pytest.approx(ours["overall"]), way
    assert ours["overall"] > 80
