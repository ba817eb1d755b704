"""Score sheets: figures by hand, and each benchmark's own files from the YAML to the sheet."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lavis.common.config import load_config
from lavis.common.errors import ConfigError, DataError
from lavis.common.registry import METRICS
from lavis.common.types import Reference
from lavis.models.vlm import VLM
from lavis.tasks.evaluate import evaluate, score_files
from lavis.tasks.image_text_pretrain import ImageTextPretrainTask
from lavis.tasks.scoring import Prediction, score, table
from lavis.tasks.sheets import Sheet, read_option
from lavis.tasks.vqa import normalize_textvqa, normalize_vqa, vqa_accuracy
from tests.conftest import TOY_YAML

SHORT = "\nAnswer the question using a single word or phrase."


def _said(answer: str, truth: str = "", kind: str = "question", **reference: Any) -> Prediction:
    return Prediction("id", kind, "-", "?", answer, truth, "", reference=Reference(**reference))


def _sheet(metric: str, *predictions: Prediction) -> Sheet:
    sheet: Sheet = METRICS.get(metric).sheet(predictions)
    return sheet


# --- VQA ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Two", "2"), ("none", "0"), ("eleven", "eleven"), ("A Dog", "dog"), ("the an a", ""),
        ("dont", "don't"), ("couldntve", "couldntve"), ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"), ("ow's'at", "'ow's'at"), ("'ows'at", "'ow's'at"),
        ("twas", "'twas"), ("somebody'd", "somebodyd"), ("yall'd've", "y'all'd've"),
        ("y'allll", "y'all'll"), ("lets", "lets"), ("Im", "im"), ("shes", "shes"), ("wed", "wed"),
        ("t-shirt", "t shirt"), ("red- blue", "red blue"), ("red -blue", "red blue"),
        ("black/white", "black white"), ("yes!", "yes"), ("a,b", "b"), ("1,000", "1000"),
        ("1,000 red/blue", "1000 redblue"), ("3.5", "3.5"), ("3.", "3"), (".5", ".5"),
        ("no. 1", "no 1"), ("U.S.A.", "usa"), ("5.a", "5a"), ("it's", "it's"),
        ("it's\nok", "it's ok"),
        ("a\tcat ", "cat"), ("50%", "50%"), ("$5", "$5"), ("what?", "what"), ("", ""),
    ],
)  # fmt: skip
def test_the_normalization_of_vqa(text: str, normal: str) -> None:
    assert normalize_vqa(text) == normal


@pytest.mark.parametrize(
    ("text", "normal"),
    [("Nike's", "nike 's"), ("a, b", "b"), ("a,b", "ab"), ("what?now", "whatnow"), ("Two", "2")],
)
def test_textvqa_splits_possessives_and_drops_commas_first(text: str, normal: str) -> None:
    assert normalize_textvqa(text) == normal


@pytest.mark.parametrize(
    ("agreeing", "credit"),
    [(0, 0.0), (1, 0.9 / 3), (2, (2 * 1 + 8 * 2) / 30), (3, (3 * 2 + 7 * 3) / 30), (4, 1), (10, 1)],
)
def test_an_answer_is_compared_with_every_nine_of_ten(agreeing: int, credit: float) -> None:
    """One of ten: himself left out nobody agrees, in the other nine cases one third does."""
    people = ["red"] * agreeing + ["blue"] * (10 - agreeing)
    assert vqa_accuracy("red", people) == pytest.approx(credit)


def test_the_sheet_of_vqa_goes_by_the_type_of_the_answer() -> None:
    colours = ("red",) * 3 + ("blue",) * 7
    sheet = _sheet(
        "vqa",
        _said("The red.", kind="other", score="vqa", answers=colours),
        _said("Blue", kind="other", score="vqa", answers=colours),
        _said("Two!", kind="number", score="vqa", answers=("2",) * 10),
    )
    assert sheet["other"] == {"accuracy": pytest.approx(95.0), "count": 2}
    assert sheet["number"] == {"accuracy": 100.0, "count": 1}
    assert sheet["all"] == {"accuracy": pytest.approx(100 * 2.9 / 3), "count": 3}


# --- GQA, POPE, MME, MMBench -------------------------------------------------------------------


def test_gqa_compares_strings_but_for_case_and_a_full_stop() -> None:
    sheet = _sheet(
        "gqa",
        _said(" Red. ", "red", "query", division="open"),
        _said("a red", "red", "query", division="open"),
        _said("Yes", "yes", "verify", division="binary"),
        _said("right", "left", "choose", division="binary"),
    )
    accuracies = {name: (f["accuracy"], f["count"]) for name, f in sheet.items()}
    assert accuracies == {
        "all": (50.0, 4), "binary": (50.0, 2), "open": (50.0, 2),
        "choose": (0.0, 1), "query": (50.0, 2), "verify": (100.0, 1),
    }  # fmt: skip
    assert next(iter(sheet)) == "all"


def test_pope_by_hand() -> None:
    """Random: 2 hits, 2 false alarms, 1 miss, 1 rejection. Popular: everything is called absent."""
    random = [("Yes", "yes"), ("A dog, yes.", "yes"), ("Maybe", "no"), ("No, it is", "yes")]
    random += [("", "no")]
    random += [("There is not. Yes", "no")]
    popular = [("no", "yes"), ("No", "no")]
    sheet = _sheet(
        "pope",
        *(_said(*pair, kind="random") for pair in random),
        *(_said(*pair, kind="popular") for pair in popular),
    )
    recall, f1 = 200 / 3, 400 / 7  # of precision 1/2 and recall 2/3
    assert sheet["random"] == pytest.approx(
        {"accuracy": 50, "precision": 50, "recall": recall, "f1": f1, "yes_ratio": 400 / 6,
         "count": 6}
    )  # fmt: skip
    assert sheet["popular"] == {
        "accuracy": 50, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0, "count": 2,
    }  # fmt: skip
    assert sheet["mean"] == pytest.approx(
        {"accuracy": 50, "precision": 25, "recall": recall / 2, "f1": f1 / 2, "yes_ratio": 200 / 6,
         "count": 8}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "yes"),
    [("Yes", 1), ("No", 0), ("no", 0), ("NO", 1), ("Nothing", 1), ("It does not.", 0), ("", 1),
     ("Yes. No.", 1), ("No. Yes.", 0), ("Well, no", 0), ("yes,no", 1)],
)  # fmt: skip
def test_pope_reads_answers_as_the_published_script(answer: str, yes: int) -> None:
    assert METRICS.get("pope").credit(answer, "yes", Reference()) == yes


def test_mme_by_hand() -> None:
    """Two images of a category, both questions of one right, one question of the other."""

    def asked(kind: str, image: str, *answers: tuple[str, str], division: str) -> list[Prediction]:
        more = {"group": f"{kind}/{image}", "group_size": 2, "division": division}
        return [_said(*pair, kind=kind, **more) for pair in answers]

    count = asked("count", "1", ("Yes.", "Yes"), ("no", "No"), division="perception")
    count += asked("count", "2", ("yes", "Yes"), ("Yes", "No"), division="perception")
    scene = asked("scene", "1", ("It is, yes", "Yes"), ("NO", "no"), division="perception")
    code = asked("code_reasoning", "1", ("Yes", "Yes"), ("No", "No"), division="cognition")
    sheet = _sheet("mme", *count, *scene, *code)
    assert sheet["count"] == {"accuracy": 75, "accuracy+": 50, "score": 125, "count": 4}
    assert sheet["scene"] == {"accuracy": 50, "accuracy+": 0, "score": 50, "count": 2}
    assert sheet["code_reasoning"]["score"] == 200
    assert sheet["perception"] == {"score": 175, "categories": 2, "count": 6}
    assert sheet["cognition"] == {"score": 200, "categories": 1, "count": 2}
    half = _sheet("mme", *count[:3])  # one question of the second image could not be asked
    assert half["count"] == {"accuracy": 100, "accuracy+": 100, "score": 200, "count": 3}
    none = _sheet("mme", count[0])
    assert none["count"] == {"accuracy": 100, "accuracy+": None, "score": None, "count": 1}
    assert none["perception"]["score"] is None


OPTIONS = {"A": "red", "B": "blue", "C": "light blue", "D": "grey"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("(B)", "B"), ("B: blue", "B"), ("The answer is D.", "D"),
        ("b", None), ("E", None), ("A or B", None), ("A", "A"), ("A car is there", None),
        ("A car is red", "A"), ("It is grey", "D"), ("light blue", None), ("red", "A"), ("", None),
        ("B is it because that one is far", None), ("red " + "really " * 9, None),
    ],
)  # fmt: skip
def test_options_are_read_from_answers(answer: str, letter: str | None) -> None:
    assert read_option(answer, OPTIONS) == letter


def test_mmbench_counts_a_question_that_is_right_in_every_order() -> None:
    def asked(group: str, size: int, *pairs: tuple[str, str], kind: str) -> list[Prediction]:
        more = {"options": OPTIONS, "group": group, "group_size": size, "division": "AR"}
        return [_said(answer, truth, kind, **more) for answer, truth in pairs]

    always = asked("1", 2, ("A", "A"), ("B", "B"), kind="colour")
    lucky = asked("2", 2, ("A", "A"), ("A", "D"), kind="colour")
    unread = asked("3", 2, ("hm", "C"), ("C", "C"), kind="place")
    part = asked("4", 2, ("A", "A"), kind="place")  # its other order was not asked
    sheet = _sheet("mmbench", *always, *lucky, *unread, *part)
    assert sheet["all"] == pytest.approx(
        {"accuracy": 75, "circular": 100 / 3, "unread": 100 / 7, "count": 4}
    )
    assert sheet["AR"] == sheet["all"]
    assert sheet["colour"] == {"accuracy": 100, "circular": 50, "unread": 0, "count": 2}
    assert sheet["place"]["circular"] == 0
    single = _sheet("mmbench", *asked("1", 1, ("A", "A"), kind="colour"))
    assert single["all"] == {"accuracy": 100, "unread": 0, "count": 1}


@pytest.mark.parametrize(
    ("metric", "truth", "reference", "message"),
    [
        ("vqa", "a", {"answers": ("a",)}, "answers of several people, not 1"),
        ("textvqa", "a", {}, "answers of several people, not 0"),
        ("pope", "maybe", {}, "must be yes or no, not 'maybe'"),
        ("mme", "left", {"group": "a"}, "must be yes or no, not 'left'"),
        ("mme", "yes", {}, "questions in pairs"),
        ("mmbench", "E", {"options": OPTIONS}, r"'E' is none of the options \(A, B, C, D\)"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    metric: str, truth: str, reference: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        METRICS.get(metric).check(truth, Reference(**reference))


# --- sheets among other scores ------------------------------------------------------------------


def test_benchmarks_stand_beside_the_users_own_questions() -> None:
    own = [_said("Red.", "red", "colour"), _said("blue", "red", "colour")]
    pope = [_said(a, "yes", "random", score="pope", dataset="pope") for a in ("Yes", "no")]
    gqa = [_said("x", "y", "query", score="gqa", dataset="mine", division="open")]
    both = score([*own, *pope, *gqa])
    assert (both["overall"], both["count"], set(both["kinds"])) == (50.0, 2, {"colour"})
    assert set(both["sheets"]) == {"pope", "mine"}
    assert "sheets" not in score(own)
    lines = [line.split() for line in table({"test": both, "test, blind": score(own)}).splitlines()]
    assert ["pope", "random", "recall", "50.0", "-"] in lines
    assert ["mine", "open", "accuracy", "0.0", "-"] in lines
    assert ["all", "questions", "50.0%", "50.0%"] in lines
    assert not any("count" in line for line in lines)
    assert "all questions" not in table({"test": score(gqa)})
    assert [p.right for p in (*own, *pope, *gqa)] == [True, False, True, False, False]


# --- the benchmarks' files ----------------------------------------------------------------------


def _png(level: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (60, 60), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def _write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes | str) else json.dumps(content)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def _task(tmp_path: Path, builder: str, storage: Any, *options: str, images: bool = True) -> Any:
    folder = f"images: {{storage: {tmp_path}/images}}" if images else ""
    (tmp_path / "images").mkdir(exist_ok=True)
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""{TOY_YAML}
datasets:
  {builder}:
    build_info:
      annotations: {{test: {{storage: {json.dumps(storage)}}}}}
      {folder}
run: {{device: cpu, batch_size_eval: 4, max_new_tokens: 2}}
""",
        encoding="utf-8",
    )
    return ImageTextPretrainTask(load_config(path, options))


def _records(task: Any) -> list[Any]:
    task.check_paths(("test",))
    return list(task.build_questions(["test"])["test"][0].records)


def _asked(task: Any) -> list[tuple[str, str, str]]:
    """Questions, true answers and kinds."""
    marks = "<Img><ImageHere></Img> "
    return [
        (r.turns[0].text.removeprefix(marks), r.turns[1].text, r.tags["kind"])
        for r in _records(task)
    ]


def _vqav2(tmp_path: Path) -> list[str]:
    questions = [{"image_id": 42, "question": "What?", "question_id": 420}]
    people = ["red"] * 6 + ["blue"] * 4
    answers = [{"answer": a, "answer_id": i} for i, a in enumerate(people)]
    _write(
        tmp_path,
        {
            "q.json": {"data_subtype": "val2014", "questions": questions},
            "a.json": {"annotations": [
                {"question_id": 420, "answers": answers, "answer_type": "other"}]},
            "images/COCO_val2014_000000000042.jpg": _png(),
        },
    )  # fmt: skip
    return [f"{tmp_path}/q.json", f"{tmp_path}/a.json"]


def _gqa(tmp_path: Path) -> str:
    row = {"question": "Is it red?", "answer": "yes", "imageId": "n7"}
    rows = {
        "1": row | {"types": {"structural": "verify"}, "isBalanced": True},
        "2": row | {"types": {"structural": "verify"}, "isBalanced": False},
        "3": row | {"types": {"structural": "query"}, "answer": "red"},
    }
    _write(tmp_path, {"gqa.json": rows, "images/n7.jpg": _png()})
    return f"{tmp_path}/gqa.json"


def _textvqa(tmp_path: Path) -> str:
    row = {"question": "what brand?", "image_id": "ab", "answers": ["nike"] * 4 + [""] * 6}
    _write(tmp_path, {"t.json": {"data": [row]}, "images/ab.jpg": _png()})
    return f"{tmp_path}/t.json"


def _pope(tmp_path: Path) -> list[str]:
    """JSON lines in a file that ends in .json."""
    row = {"question_id": 1, "image": "1.jpg", "text": "Is there a dog?"}
    names = []
    for setting in ("random", "adversarial"):
        lines = "".join(json.dumps(row | {"label": x}) + "\n" for x in ("yes", "no"))
        names.append(f"coco_pope_{setting}.json")
        _write(tmp_path, {names[-1]: lines, "images/1.jpg": _png()})
    return [f"{tmp_path}/{name}" for name in names]


def _mme(tmp_path: Path) -> str:
    pair = "Is it one? Please answer yes or no.\tYes\nIs it two? Please answer yes or no.\tNo\n\n"
    _write(
        tmp_path / "MME",
        {
            "count/0001.txt": pair, "count/0001.jpg": _png(),
            "scene/questions_answers_YN/x.txt": pair, "scene/images/x.png": _png(),
            "eval_tool/readme.txt": "no category",
        },
    )  # fmt: skip
    return f"{tmp_path}/MME"


def _mmbench(tmp_path: Path, **changes: str) -> str:
    """A question in two orders, the second of which names the first one's image; a picture's
    field is longer than the csv module takes by default."""
    long = base64.b64encode(_png() + bytes(200_000)).decode()
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category"]
    row = {"index": "7", "question": '"Which" colour?', "hint": "Look.", "A": "red", "B": "blue",
           "C": "", "D": "nan", "answer": "A", "category": "colour", "l2-category": "AR",
           "image": long}  # fmt: skip
    rows = [row | changes]
    rows.append(row | {"index": "1000007", "A": "blue", "B": "red", "answer": "B", "image": "7"})
    lines = ["\t".join([*head, "image"])]
    lines += ["\t".join(f'"{r[k]}"'.replace('"Which"', '""Which""') for k in [*head, "image"])
              for r in rows]  # fmt: skip
    _write(tmp_path, {"mmbench.tsv": "\n".join(lines) + "\n"})
    return f"{tmp_path}/mmbench.tsv"


FILES = {
    "vqav2": _vqav2, "gqa": _gqa, "textvqa": _textvqa, "pope": _pope, "mme": _mme,
    "mmbench": _mmbench,
}  # fmt: skip
MME_1, MME_2 = (f"Is it {n}? Please answer yes or no." for n in ("one", "two"))
LETTER = "\nAnswer with the option's letter from the given choices directly."
ASKED = {
    "vqav2": [(f"What?{SHORT}", "red", "other")],
    "gqa": [(f"Is it red?{SHORT}", "yes", "verify"), (f"Is it red?{SHORT}", "red", "query")],
    "textvqa": [(f"what brand?{SHORT}", "nike", "question")],
    "pope": [
        (f"Is there a dog?{SHORT}", truth, setting)
        for setting in ("random", "adversarial")
        for truth in ("yes", "no")
    ],
    "mme": [(MME_1, "Yes", "count"), (MME_2, "No", "count"),
            (MME_1, "Yes", "scene"), (MME_2, "No", "scene")],
    "mmbench": [
        (f'Look.\n"Which" colour?\nA. red\nB. blue{LETTER}', "A", "colour"),
        (f'Look.\n"Which" colour?\nA. blue\nB. red{LETTER}', "B", "colour"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("builder", FILES)
def test_questions_are_read_from_the_benchmarks_own_files(tmp_path: Path, builder: str) -> None:
    task = _task(tmp_path, builder, FILES[builder](tmp_path), images=builder != "mme")
    assert _asked(task) == ASKED[builder]
    assert all(r.images[0].is_file() for r in _records(task))


def test_references_are_read(tmp_path: Path) -> None:
    (vqa,) = _records(_task(tmp_path, "vqav2", _vqav2(tmp_path)))
    assert vqa.reference.answers == ("red",) * 6 + ("blue",) * 4
    assert (vqa.reference.score, vqa.reference.dataset) == ("vqa", "vqav2")
    assert [r.reference.division for r in _records(_task(tmp_path, "gqa", _gqa(tmp_path)))] == [
        "binary", "open",
    ]  # fmt: skip
    (text,) = _records(_task(tmp_path, "textvqa", _textvqa(tmp_path)))
    assert (text.reference.score, len(text.reference.answers)) == ("textvqa", 10)
    pairs = _records(_task(tmp_path, "mme", _mme(tmp_path), images=False))
    assert [(p.reference.group, p.reference.group_size) for p in pairs] == [
        ("count/0001", 2), ("count/0001", 2), ("scene/x", 2), ("scene/x", 2),
    ]  # fmt: skip
    first, second = _records(_task(tmp_path, "mmbench", _mmbench(tmp_path)))
    assert first.reference.options == {"A": "red", "B": "blue"}
    assert first.images == second.images
    assert [r.reference.group for r in (first, second)] == ["7", "7"]
    assert first.reference.group_size == 2
    assert len(list((tmp_path / "images").glob("*"))) == 4  # one unpacked, three of others


def test_the_prompt_and_the_score_may_be_others(tmp_path: Path) -> None:
    storage = _gqa(tmp_path)
    options = ("datasets.gqa.prompt=Q {question} A", "datasets.gqa.score=textvqa")
    with pytest.raises(DataError, match=r"gqa.json\[1\]: VQA accuracy needs the answers of"):
        _asked(_task(tmp_path, "gqa", storage, *options))
    assert _asked(_task(tmp_path, "gqa", storage, options[0]))[0][0] == "Q Is it red? A"
    with pytest.raises(ConfigError, match=r"datasets.gqa.prompt must hold \{question\} once"):
        _task(tmp_path, "gqa", storage, "datasets.gqa.prompt=What?")
    with pytest.raises(ConfigError, match=r"datasets.gqa.score: unknown score 'vqa2'.*'vqa'"):
        _task(tmp_path, "gqa", storage, "datasets.gqa.score=vqa2")
    with pytest.raises(ConfigError, match=r"datasets.gqa.format: 'llava' is refused"):
        _task(tmp_path, "gqa", storage, "datasets.gqa.format=llava")


@pytest.mark.parametrize(
    ("builder", "files", "message"),
    [
        ("gqa", {"gqa.json": []}, "gqa.json must hold an object"),
        ("gqa", {"gqa.json": {"1": {"question": "x"}}}, r"gqa.json\[1\]: must be an object"),
        ("gqa", {"images/n7.jpg": None}, r"gqa.json\[1\]: no image .*n7.jpg"),
        ("vqav2", {"a.json": {"annotations": []}}, "none with `annotations`"),
        ("vqav2", {"q.json": {}}, "none with `questions`"),
        ("vqav2", {"a.json": {"annotations": [{"question_id": 1, "answers": []}]}},
         r"questions\[0\]: has no answers \(a test split"),
        ("textvqa", {"t.json": {"data": [{"question": "x", "image_id": "../a"}]}},
         r"`image_id` must be the name of an image, not '../a'"),
        ("pope", {"coco_pope_random.json": "{"}, r"coco_pope_random.json\[0\]: not valid JSON"),
        ("pope", {"coco_pope_random.json": '{"image": "1.jpg", "text": "x", "label": ""}'},
         "`label` must be a text, not ''"),
        ("pope",
         {"coco_pope_random.json": '{"image": "1.jpg", "text": "<ImageHere>", "label": "no"}'},
         "the question holds <ImageHere>"),
        ("mme", {"MME/count/0001.txt": "Is it?\tYes\n"}, "0001.txt must hold two lines"),
        ("mme", {"MME/count/0001.txt": "Is it?\tLeft\nIs it?\tNo"}, "be yes or no, not 'Left'"),
        ("mmbench", {"mmbench.tsv": "index\tquestion\nx\ty\n"}, "must be a number, not 'x'"),
        ("mmbench", {"mmbench.tsv": "index\tquestion\timage\n1\ty\t!\n"}, "no image in base64"),
        ("mmbench", {"mmbench.tsv": "index\tquestion\n1\ty\n"}, "`image` is empty"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(
    tmp_path: Path, builder: str, files: dict[str, Any], message: str
) -> None:
    storage = FILES[builder](tmp_path)
    _write(tmp_path, {name: content for name, content in files.items() if content is not None})
    for name, content in files.items():
        if content is None:
            (tmp_path / name).unlink()
    with pytest.raises(DataError, match=message):
        _asked(_task(tmp_path, builder, storage, images=builder != "mme"))


def test_folders_are_asked_for_where_they_belong(tmp_path: Path) -> None:
    missing = _task(tmp_path, "pope", _pope(tmp_path), images=False)
    with pytest.raises(ConfigError, match=r"datasets.pope.build_info.images.storage is missing"):
        missing.check_paths(("test",))
    extra = _task(tmp_path, "mme", _mme(tmp_path))
    with pytest.raises(ConfigError, match=r"mme.build_info.images.storage: .* remove it"):
        extra.check_paths(("test",))
    (tmp_path / "MME" / "other").mkdir()
    other = _task(tmp_path, "mme", f"{tmp_path}/MME/other", images=False)
    with pytest.raises(DataError, match="has no category of MME"):
        _asked(other)
    with pytest.raises(DataError, match=r"MME/count/0001.txt is not a folder"):
        _task(tmp_path, "mme", f"{tmp_path}/MME/count/0001.txt", images=False).check_paths(
            ("test",)
        )


def test_a_sheet_is_written_and_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that answers yes to everything: half of POPE, all recall; one half of MME."""
    monkeypatch.setattr("lavis.processors.tokenizer.QwenTokenizer.decode", lambda *_, **__: " Yes")
    model: VLM | None = None
    for builder, name, part, expected in (
        ("pope", "pope", "random",
         {"accuracy": 50, "precision": 50, "recall": 100, "f1": 200 / 3, "yes_ratio": 100,
          "count": 2}),
        ("mme", "mme", "perception", {"score": 100, "categories": 2, "count": 4}),
    ):  # fmt: skip
        task = _task(tmp_path, builder, FILES[builder](tmp_path), images=builder != "mme")
        splits = task.build_questions(["test"])
        model = model or task.build_model(torch.device("cpu")).eval()
        out = tmp_path / f"out_{builder}"
        text = evaluate(model, splits, task.config.run, out)
        scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
        assert scores["test"]["sheets"][name][part] == pytest.approx(expected)
        assert scores["test"]["overall"] is None
        assert (out / "test.png").exists()
        again = score_files([out / "test.jsonl"], tmp_path / "again")
        assert text.startswith(again)
        assert json.loads((tmp_path / "again" / "scores.json").read_text()) == scores
