"""Ask a model every question of a split and compare the answers with the truth."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lavis.common import dist
from lavis.common.cli import printable
from lavis.common.errors import ConfigError, DataError, in_lines
from lavis.common.registry import METRICS
from lavis.common.types import IMAGE_PLACEHOLDER, BadSample, Reference, Spans
from lavis.datasets.annotations import Record
from lavis.datasets.collate import settle_bad
from lavis.datasets.instruction import InstructionDataset
from lavis.models.decode import Prompts
from lavis.tasks.sheets import grouped

if TYPE_CHECKING:
    from lavis.models.vlm import VLM

DESCRIPTION = "description"
"""The ``kind`` whose answers are scored by BLEU, not by exact match."""


@dataclass(frozen=True)
class Prediction:
    """One question, what the model said and what is true.

    Attributes:
        kind: the annotation's ``kind``, or ``question``.
        language: the annotation's ``language``, or ``-``.
        image: the first image's path, empty without one.
        skipped: why it could not be asked; empty if it was.
        reference: what the answer is scored by.
    """

    sample_id: str
    kind: str
    language: str
    question: str
    answer: str
    truth: str
    image: str
    skipped: str = ""
    reference: Reference = Reference()

    @property
    def right(self) -> bool:
        """Whether the answer is the truth, after normalization; whether a benchmark's metric gives
        it half of the credit or more."""
        if self.reference.score:
            metric = METRICS.get(self.reference.score)
            return bool(metric.credit(self.answer, self.truth, self.reference) >= 0.5)
        return normalize(self.answer) == normalize(self.truth)


_FOLDED = dict.fromkeys(map(ord, "‐‑‒–−"), "-") | {0x2044: "/", 0xFE0E: None, 0xFE0F: None}
_ARTICLE = re.compile(r"\b(?:an?|the)\s+(?=[^\w\s]*(?:\w[\w-]|\d))")
_CJK = r"\u2e80-\u9fff\uac00-\ud7af"
_MEANT = re.compile(
    rf"""[%‰/&@§†‡′″※\U000e0020-\U000e007f]         # of these, the last spell emoji flags
    | (?<=\d)[.:](?=\d) | (?<![\w.])\.(?=\d)      # 3.5, 12:30, .5
    | (?<=\d)-(?=\.?\d) | (?<=\d[ ])-(?=[ ]\.?\d)  # 5-3, 5 - 3
    | (?<![\w-])-(?=\w|[.$€£¥]\d)                # -5, -x, -$5
    | (?<=[{_CJK}])-(?=[.$€£¥]?\d)               # Chinese puts no space before it
    | (?:^|(?<=[=<>+*/(][ ]))-(?=[ ]\.?\d)        # - 5, x = - 5
    | (?<=[^\W_])-(?![\w-])                     # O-
    | (?<=\w)[#] | [#](?=\w)                     # C#, #1
    | (?<=\w)\*(?=\w) | (?<=\w[ ])\*(?=[ ]\w)     # 3*4, but not **bold**
    | !(?=[=]) | ~(?=[ ]?\d)                     # !=, ~5
    """,
    re.VERBOSE,
)
"""Punctuation that means something where it stands."""


def normalize(text: str) -> str:
    """What of an answer is compared: ``A red-ish cat!`` and ``red ish CAT`` are the same.

    Case, full-width forms and spaces are folded; articles before a word, quotes, brackets and
    sentence punctuation of any language are dropped. What means something stays: signs of
    mathematics and currencies, emoji, ``% / & @``, a minus, the point of ``3.5``, the ``#`` of
    ``C#``, a lone ``A``. A text of nothing else stays whole: ``?`` is not ``!``.
    """
    text = re.sub(r"(?<=\w)(?=[¼-¾⅐-⅞]|[⁺⁻]?[⁰¹²³⁴-⁹])", " ", text)  # 10² is not 102, nor 1½ 11/2
    text = unicodedata.normalize("NFKC", text).casefold().translate(_FOLDED)
    text = " ".join(text.split())
    plain = _ARTICLE.sub("", text)
    meant = {m.start() for m in _MEANT.finditer(plain)}
    words = "".join(_spaced(c, i in meant) for i, c in enumerate(plain)).split()
    return " ".join(words) or text


def _spaced(character: str, meant: bool) -> str:
    """A letter, a mark or a digit as it is, a sign between spaces, a space for anything else."""
    kind = unicodedata.category(character)
    if kind[0] in "LMN":
        return character
    dropped = kind[0] in "PZ" or kind in ("Cc", "Cf", "Cs") or character in "`´~"
    return " " if dropped and not meant else f" {character} "


def predict(
    model: VLM,
    dataset: InstructionDataset,
    *,
    batch_size: int,
    max_new_tokens: int,
    blind: bool = False,
    seed: int = 0,
    on_bad: str = "error",
    keep: Callable[[Sequence[Prediction]], object] = len,
) -> list[Prediction]:
    """Answer the last question of every record, given the turns before it.

    The processes share the records; each of them returns all answers, in order of the records.

    Args:
        batch_size: questions at once. An answer that ends makes room for the next question.
        blind: shuffle the images among the records, for the score that text alone can reach.
        on_bad: what an image that cannot be read does: ``error`` or ``skip``.
        keep: called in every process with the new answers of all, once for each batch that is read.

    Raises:
        DataError: in every process, an image cannot be read.
    """
    records = dataset.records
    shown = _shuffled(records, seed) if blind else records
    # Prompts of like length are answered together, so that little room is left in the buffers.
    prompts = [model.encoder.prompt(dataset.turns(r)[:-1]) for r in shown]
    order = _share(sorted(range(len(records)), key=lambda i: len(prompts[i])))
    answered = _Answered(keep)
    asked: list[int] = []
    failed: list[DataError] = []

    def batches() -> Iterator[Prompts]:
        for start in range(0, len(order), batch_size):
            answered.publish()
            chosen = order[start : start + batch_size]
            given, bad = _spans(dataset, {i: shown[i] for i in chosen})
            try:
                settle_bad((BadSample(records[i].sample_id, why) for i, why in bad.items()), on_bad)
            except DataError as error:  # of all processes; what was asked before is answered first
                failed.append(error)
                return
            answered.fresh.update({i: _prediction(records[i], None, why) for i, why in bad.items()})
            bar.update(len(bad))
            asked.extend(given)
            yield Prompts([prompts[i] for i in given], Spans.join(list(given.values())))

    title = "answering (blind)" if blind else "answering"
    with tqdm(total=len(order), desc=title, unit="q", disable=not dist.is_main()) as bar:
        answers = model.answers(batches(), max_new_tokens=max_new_tokens, size=batch_size)
        for number, ids in answers:
            text = model.tokenizer.decode(ids, skip_special_tokens=True).strip()
            answered.fresh[asked[number]] = _prediction(records[asked[number]], text, None)
            bar.update()
        answered.publish()
    if failed:
        raise failed[0]
    return [answered.all[i] for i in sorted(answered.all)]


class _Answered:
    """Predictions by the number of their record.

    Attributes:
        fresh: this process's since the last call of :meth:`publish`.
        all: those of all processes until then.
    """

    def __init__(self, keep: Callable[[Sequence[Prediction]], object]) -> None:
        self.fresh: dict[int, Prediction] = {}
        self.all: dict[int, Prediction] = {}
        self._keep = keep

    def publish(self) -> None:
        """Every process must call it."""
        everyone = {i: p for share in dist.gather(self.fresh) for i, p in share.items()}
        self._keep([p for i, p in everyone.items() if i not in self.all])
        self.all.update(everyone)
        self.fresh.clear()


def _spans(
    dataset: InstructionDataset, shown: dict[int, Record]
) -> tuple[dict[int, Spans], dict[int, str]]:
    """What records show by their numbers; or why there is nothing."""
    given: dict[int, Spans] = {}
    bad: dict[int, str] = {}
    for i, record in shown.items():
        try:
            given[i] = dataset.spans(record, epoch=0, index=i)
        except DataError as error:
            bad[i] = str(error)
    return given, bad


def _prediction(record: Record, answer: str | None, skipped: str | None) -> Prediction:
    return Prediction(
        sample_id=record.sample_id,
        kind=record.tags.get("kind", "question"),
        language=record.tags.get("language", "-"),
        question=_plain(record.turns[-2].text),
        answer=answer or "",
        truth=record.turns[-1].text,
        image=str(record.pictures[0].path) if record.pictures else "",
        skipped=skipped or "",
        reference=record.reference,
    )


def score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Exact match in percent by kind and language and over all, and BLEU of descriptions.

    Returns:
        ``{"overall": .., "count": .., "kinds": {kind: {language: {"exact": .., "count": ..}}},
        "skipped": [{"sample_id": .., "reason": ..}]}``; descriptions have ``bleu`` and do not count
        towards ``overall``, which is ``None`` without a question. Of public benchmarks, which do
        not count there, ``"sheets": {data set: Sheet}``.
    """
    scored = [p for p in predictions if p.reference.score and not p.skipped]
    benchmarks = grouped(scored, lambda p: (p.reference.dataset, p.reference.score))
    asked = [p for p in predictions if not p.skipped and not p.reference.score]
    kinds: dict[str, dict[str, Any]] = {}
    for (kind, language), group in sorted(grouped(asked, lambda p: (p.kind, p.language)).items()):
        entry: dict[str, Any] = {"exact": _percent(group), "count": len(group)}
        if kind == DESCRIPTION:
            entry["bleu"] = _bleu(group)
        kinds.setdefault(kind, {})[language] = entry
    questions = [p for p in asked if p.kind != DESCRIPTION]
    skipped = [{"sample_id": p.sample_id, "reason": p.skipped} for p in predictions if p.skipped]
    scores = {"overall": _percent(questions), "count": len(questions), "kinds": kinds}
    sheets = {name: METRICS.get(m).sheet(group) for (name, m), group in benchmarks.items()}
    return scores | ({"sheets": sheets} if sheets else {}) | {"skipped": skipped}


def table(scores: dict[str, dict[str, Any]]) -> str:
    """A text table: a row per kind and language, or figure, and a column per named score."""
    keys = sorted(
        {(k, lang) for s in scores.values() for k, by in s["kinds"].items() for lang in by}
    )
    rows = {
        f"{k:<13} {lang:<3}": [_cell(s["kinds"].get(k, {}).get(lang)) for s in scores.values()]
        for k, lang in keys
    }
    sheets = [s.get("sheets", {}) for s in scores.values()]
    figures = {
        (data, part, name): None  # a dictionary keeps the order of the sheets
        for sheet in sheets
        for data, parts in sheet.items()
        for part, values in parts.items()
        for name in values
        if name != "count"
    }
    for data, part, name in figures:
        values = [sheet.get(data, {}).get(part, {}).get(name) for sheet in sheets]
        rows[f"{data} {part} {name}"] = ["-" if v is None else f"{v:.1f}" for v in values]
    if keys or not figures:
        rows["all questions"] = [_cell({"exact": s["overall"]}) for s in scores.values()]
    if any(s["skipped"] for s in scores.values()):
        rows["skipped"] = [str(len(s["skipped"])) for s in scores.values()]
    left = max(18, *(len(label) + 1 for label in rows))
    widths = [max(len(name), 10) + 2 for name in scores]
    return printable(
        "\n".join(
            f"{label:<{left}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
            for label, cells in ({"": list(scores)} | rows).items()
        )
    )


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["exact"] is None:
        return "-"
    return f"BLEU {entry['bleu']:.1f}" if "bleu" in entry else f"{entry['exact']:.1f}%"


def _percent(group: Sequence[Prediction]) -> float | None:
    return 100.0 * sum(p.right for p in group) / len(group) if group else None


def check_scores(records: Iterable[Record]) -> None:
    """Check that the answers to records can be scored.

    Raises:
        DataError: a question lacks what its metric needs.
        ConfigError: as :func:`require_bleu`.
    """
    wrong = []
    kinds = set()
    for record in records:
        kinds.add(record.tags.get("kind"))
        if (reference := record.reference).score:
            try:
                METRICS.get(reference.score).check(record.turns[-1].text, reference)
            except DataError as error:
                at = f"datasets.{reference.dataset}, {record.sample_id}"
                wrong.append(f"{at}: {error}")
    if wrong:
        raise DataError(f"{len(wrong)} questions cannot be scored{in_lines(wrong)}")
    require_bleu(kinds)


def require_bleu(kinds: Iterable[str | None]) -> None:
    """Check that sacreBLEU is there if descriptions are.

    Raises:
        ConfigError: it is not.
    """
    if DESCRIPTION in kinds:
        try:
            import sacrebleu  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"scoring descriptions needs sacreBLEU: pip install sacrebleu ({error})"
            ) from error


def _bleu(group: Sequence[Prediction]) -> float:
    from sacrebleu import corpus_bleu

    truths = [p.truth for p in group]
    return corpus_bleu([p.answer for p in group], [truths], tokenize=_tokenizer(truths)).score


def _tokenizer(texts: Iterable[str]) -> str:
    """sacreBLEU's name for a tokenizer. The script decides, whatever the language is called."""
    text = " ".join(texts)
    words, han, syllables = (
        len(re.findall(letters, text))
        for letters in ("[A-Za-z\u00c0-\u2e7f]+", "[\u3400-\u9fff]", "[\u3040-\u30ff\uac00-\ud7af]")
    )
    if han + syllables <= words:
        return "13a"
    return "char" if 4 * syllables > han else "zh"  # kana or Hangul


def _share(order: list[int]) -> list[int]:
    """This process's part. All are equally long, so that sharded models stay in step; to that
    end a few records are answered twice and counted once."""
    count = -(-len(order) // dist.world_size())
    mine = order[dist.rank() :: dist.world_size()]
    return mine + order[: count - len(mine)]


def _shuffled(records: Sequence[Record], seed: int) -> list[Record]:
    """Records that show what another one shows: as many images, or any video."""
    result = list(records)
    kinds = [(r.video is not None, len(r.images), len(r.words)) for r in records]
    rng = random.Random(seed)  # noqa: S311
    for same in grouped(range(len(records)), kinds.__getitem__).values():
        for i, j in zip(same, rng.sample(same, len(same)), strict=True):
            other = records[j]
            result[i] = replace(
                records[i],
                images=other.images, video=other.video, frames=other.frames, grids=other.grids,
                words=other.words,
            )  # fmt: skip
    return result


def _plain(question: str) -> str:
    return re.sub(rf"\s*(<Img>)?({re.escape(IMAGE_PLACEHOLDER)})+(</Img>)?\s*", "", question)
