"""Ask a model every question of a split and compare the answers with the truth."""

from __future__ import annotations

import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from lavis.common import dist
from lavis.common.errors import DataError
from lavis.common.types import IMAGE_PLACEHOLDER, NO_FEATURES
from lavis.datasets.collate import stack_words
from lavis.datasets.instruction import InstructionDataset

DESCRIPTION = "description"
"""The ``kind`` whose answers are scored by BLEU, not by exact match."""


@dataclass(frozen=True)
class Prediction:
    """One question, what the model said and what is true.

    Attributes:
        kind: the annotation's ``kind``, or ``question``.
        language: the annotation's ``language``, or ``-``.
        image: the first image's path, empty without one.
    """

    sample_id: str
    kind: str
    language: str
    question: str
    answer: str
    truth: str
    image: str

    @property
    def right(self) -> bool:
        """Whether the answer is the truth, after normalization."""
        return normalize(self.answer) == normalize(self.truth)


def normalize(text: str) -> str:
    """Lower case, no articles, no punctuation, single spaces, full-width forms folded."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = "".join(" " if unicodedata.category(c)[0] in "PSZC" else c for c in text)
    return " ".join(w for w in text.split() if w not in ("a", "an", "the"))


def predict(
    model: Any,
    dataset: InstructionDataset,
    *,
    batch_size: int,
    max_new_tokens: int,
    blind: bool = False,
    seed: int = 0,
) -> list[Prediction]:
    """Answer the last question of every record, given the turns before it.

    The processes share the records; each of them returns all answers, in order of the records.

    Args:
        model: has ``encoder`` and ``generate_ids``.
        batch_size: questions at once.
        blind: shuffle the images among the records, for the score that text alone can reach.

    Raises:
        DataError: an image cannot be read.
    """
    records = dataset.records
    source = _shuffled(records, seed) if blind else range(len(records))
    predictions: dict[int, Prediction] = {}
    # Prompts of like length are answered together, so that little is padded.
    prompts = [model.encoder.prompt(dataset.turns(r)[:-1]) for r in records]
    order = _share(sorted(range(len(records)), key=lambda i: len(prompts[i])))
    bar = tqdm(
        total=len(order),
        desc="answering (blind)" if blind else "answering",
        unit="q",
        disable=not dist.is_main(),
    )
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        given = [dataset.images(records[source[i]], epoch=0, index=source[i]) for i in chosen]
        pixels = [p for p, _ in given if len(p)]
        features = [f for _, f in given if len(f)]
        ids = model.generate_ids(
            [prompts[i] for i in chosen],
            torch.cat(pixels) if pixels else None,
            max_new_tokens=max_new_tokens,
            query_features=torch.cat(features) if features else NO_FEATURES,
            word_ids=stack_words([dataset.word_ids(records[source[i]]) for i in chosen]),
        )
        for i, answer in zip(chosen, ids, strict=True):
            record = records[i]
            predictions[i] = Prediction(
                sample_id=record.sample_id,
                kind=record.tags.get("kind", "question"),
                language=record.tags.get("language", "-"),
                question=_plain(record.turns[-2].text),
                answer=model.tokenizer.decode(answer, skip_special_tokens=True).strip(),
                truth=record.turns[-1].text,
                image=str(record.images[0]) if record.images else "",
            )
        bar.update(len(chosen))
    bar.close()
    everyone = {i: p for told in dist.gather(predictions) for i, p in told.items()}
    return [everyone[i] for i in sorted(everyone)]


def score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Exact match in percent by kind and language and over all, and BLEU of descriptions.

    Returns:
        ``{"overall": .., "count": .., "kinds": {kind: {language: {"exact": .., "count": ..}}}}``;
        descriptions have ``bleu`` and do not count towards ``overall``.
    """
    groups: dict[tuple[str, str], list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        groups[prediction.kind, prediction.language].append(prediction)
    kinds: dict[str, dict[str, Any]] = {}
    for (kind, language), group in sorted(groups.items()):
        entry: dict[str, Any] = {"exact": _percent(group), "count": len(group)}
        if kind == DESCRIPTION:
            entry["bleu"] = _bleu(group, language)
        kinds.setdefault(kind, {})[language] = entry
    questions = [p for p in predictions if p.kind != DESCRIPTION]
    return {"overall": _percent(questions), "count": len(questions), "kinds": kinds}


def table(scores: dict[str, dict[str, Any]]) -> str:
    """A text table: a row per kind and language, a column per named score."""
    rows = sorted(
        {(k, lang) for s in scores.values() for k, by in s["kinds"].items() for lang in by}
    )
    widths = {name: max(len(name), 10) + 2 for name in scores}
    lines = [f"{'':<18}" + "".join(f"{name:>{width}}" for name, width in widths.items())]
    for kind, language in rows:
        cells = (_cell(s["kinds"].get(kind, {}).get(language)) for s in scores.values())
        row = "".join(f"{c:>{w}}" for c, w in zip(cells, widths.values(), strict=True))
        lines.append(f"{kind:<14}{language:<4}{row}")
    overall = "".join(f"{scores[n]['overall']:>{w - 1}.1f}%" for n, w in widths.items())
    return "\n".join([*lines, f"{'all questions':<18}{overall}"])


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    return f"BLEU {entry['bleu']:.1f}" if "bleu" in entry else f"{entry['exact']:.1f}%"


def _percent(group: Iterable[Prediction]) -> float:
    right = [p.right for p in group]
    return 100.0 * sum(right) / max(len(right), 1)


def _bleu(group: Sequence[Prediction], language: str) -> float:
    try:
        from sacrebleu import corpus_bleu
    except ImportError as error:
        raise DataError("scoring descriptions needs sacreBLEU: pip install sacrebleu") from error
    return corpus_bleu(
        [p.answer for p in group],
        [[p.truth for p in group]],
        tokenize="zh" if language == "zh" else "13a",
    ).score


def _share(order: list[int]) -> list[int]:
    """This process's part. All are equally long, so that sharded models stay in step; to that
    end a few records are answered twice and counted once."""
    count = -(-len(order) // dist.world_size())
    mine = order[dist.rank() :: dist.world_size()]
    return mine + order[: count - len(mine)]


def _shuffled(records: Sequence[Any], seed: int) -> list[int]:
    """A permutation that keeps the number of images of each record."""
    source = list(range(len(records)))
    by_count: dict[int, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        by_count[len(record.images)].append(i)
    rng = random.Random(seed)  # noqa: S311
    for same in by_count.values():
        shuffled = rng.sample(same, len(same))
        for i, j in zip(same, shuffled, strict=True):
            source[i] = j
    return source


def _plain(question: str) -> str:
    return re.sub(rf"\s*(<Img>)?({re.escape(IMAGE_PLACEHOLDER)})+(</Img>)?\s*", "", question)
