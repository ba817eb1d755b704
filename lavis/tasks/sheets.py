"""Score sheets of public benchmarks: each benchmark's own figures, by their published rules.

A metric is registered under the name that ``score`` has in a block of ``datasets``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from lavis.common.errors import DataError
from lavis.common.types import Reference
from lavis.tasks.vqa import normalize_textvqa, normalize_vqa, vqa_accuracy

if TYPE_CHECKING:
    from lavis.tasks.scoring import Prediction

T = TypeVar("T")
K = TypeVar("K")
Figures = dict[str, float | None]
"""Percentages, sums of percentages (MME's scores), and ``count``; ``None`` is one of nothing."""
Sheet = dict[str, Figures]
"""Figures of all questions and of their kinds and divisions."""


class Metric:
    """How the answers to a benchmark are scored: by their accuracy, unless a subclass says more."""

    def check(self, truth: str, reference: Reference) -> None:
        """Refuse a question that cannot be scored.

        Raises:
            DataError: saying what it lacks.
        """

    def credit(self, answer: str, truth: str, reference: Reference) -> float:
        """What a single answer earns, 0 to 1."""
        raise NotImplementedError

    def sheet(self, predictions: Sequence[Prediction]) -> Sheet:
        """Figures of the answers that were given, at least one: of all, by division, by kind."""
        divisions = _by(predictions, lambda p: p.reference.division)
        kinds = _by(predictions, lambda p: "" if p.kind == "question" else p.kind)
        parts = {"all": predictions, **divisions, **kinds}
        return {name: self.figures(part) for name, part in parts.items()}

    def figures(self, predictions: Sequence[Prediction]) -> Figures:
        """Figures of a part of the answers."""
        return {"accuracy": _mean(map(self.earned, predictions)), "count": len(predictions)}

    def earned(self, prediction: Prediction) -> float:
        """What an answer earns, 0 to 1."""
        return self.credit(prediction.answer, prediction.truth, prediction.reference)


def _mean(values: Iterable[float]) -> float | None:
    """Of shares, in percent."""
    values = list(values)
    return 100.0 * sum(values) / len(values) if values else None


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by their key; keys in the order in which they come."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _by(
    predictions: Iterable[Prediction], key: Callable[[Prediction], str]
) -> dict[str, list[Prediction]]:
    groups = grouped(predictions, key)
    groups.pop("", None)
    return dict(sorted(groups.items()))


def _complete(predictions: Sequence[Prediction]) -> list[list[Prediction]]:
    """Groups of questions that count together and were all asked."""
    groups = _by(predictions, lambda p: p.reference.group).values()
    return [group for group in groups if len(group) == group[0].reference.group_size]


@dataclass(frozen=True)
class PeoplesAccuracy(Metric):
    """VQA accuracy by the answers of several people.

    Attributes:
        normalize: what of an answer is compared.
    """

    normalize: Callable[[str], str]

    def check(self, truth: str, reference: Reference) -> None:
        if len(reference.answers) < 2:
            raise DataError(
                f"VQA accuracy needs the answers of several people, not {len(reference.answers)}"
            )

    def credit(self, answer: str, truth: str, reference: Reference) -> float:
        return vqa_accuracy(self.normalize(answer), [self.normalize(a) for a in reference.answers])


class StringMatch(Metric):
    """GQA's accuracy: the answer is the truth, but for case and a full stop."""

    def credit(self, answer: str, truth: str, reference: Reference) -> float:
        return float(_bare(answer) == _bare(truth))


def _bare(text: str) -> str:
    return text.strip().rstrip(".").lower()


def _check_yes_or_no(truth: str) -> None:
    if truth.strip().lower() not in ("yes", "no"):
        raise DataError(f"the true answer must be yes or no, not {truth!r:.60}")


class YesNoDetection(Metric):
    """POPE (Li et al. 2023): yes is the class that is looked for.

    As the published script has it, an answer is no if its first sentence holds one of the words
    ``No``, ``no`` and ``not``, and yes otherwise.
    """

    def check(self, truth: str, reference: Reference) -> None:
        _check_yes_or_no(truth)

    def credit(self, answer: str, truth: str, reference: Reference) -> float:
        return float(_says_yes(answer) == _is_yes(truth))

    def sheet(self, predictions: Sequence[Prediction]) -> Sheet:
        """Figures of each setting, and their means."""
        settings = {k: self.figures(v) for k, v in _by(predictions, lambda p: p.kind).items()}
        figures = list(settings.values())
        means: Figures = {
            name: sum(f[name] or 0.0 for f in figures) / len(figures)
            for name in figures[0]
            if name != "count"
        }
        return {"mean": {**means, "count": len(predictions)}, **settings}

    def figures(self, predictions: Sequence[Prediction]) -> Figures:
        pairs = [(_says_yes(p.answer), _is_yes(p.truth)) for p in predictions]
        hits, said = pairs.count((True, True)), sum(s for s, _ in pairs)
        true = sum(t for _, t in pairs)
        precision, recall = (hits / n if n else 0.0 for n in (said, true))
        both = precision + recall
        return {
            "accuracy": _mean(said == true for said, true in pairs),
            "precision": 100 * precision,
            "recall": 100 * recall,
            "f1": 100 * 2 * precision * recall / both if both else 0.0,
            "yes_ratio": _mean(said for said, _ in pairs),
            "count": len(pairs),
        }


def _says_yes(answer: str) -> bool:
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def _is_yes(truth: str) -> bool:
    return truth.strip().lower() == "yes"


class PairedYesNo(Metric):
    """MME (Fu et al. 2023): two questions to an image.

    ``accuracy`` is over questions, ``accuracy+`` over images both of whose questions are answered
    right, ``score`` their sum, up to 200; a division's is the sum of its categories'.
    """

    def check(self, truth: str, reference: Reference) -> None:
        _check_yes_or_no(truth)
        if not reference.group:
            raise DataError("score: mme needs questions in pairs; use builder: mme")

    def credit(self, answer: str, truth: str, reference: Reference) -> float:
        start = answer.strip().lower()[:4]  # as published: yes is looked for first
        said = "yes" if "yes" in start else "no" if "no" in start else "other"
        return float(said == truth.strip().lower())

    def sheet(self, predictions: Sequence[Prediction]) -> Sheet:
        categories = {k: self.figures(v) for k, v in _by(predictions, lambda p: p.kind).items()}
        divisions: Sheet = {}
        for name, part in _by(predictions, lambda p: p.reference.division).items():
            scores = [categories[kind]["score"] for kind in sorted({p.kind for p in part})]
            total = None if None in scores else sum(s for s in scores if s is not None)
            divisions[name] = {"score": total, "categories": len(scores), "count": len(part)}
        return {**divisions, **categories}

    def figures(self, predictions: Sequence[Prediction]) -> Figures:
        accuracy = _mean(map(self.earned, predictions))
        plus = _mean(all(map(self.earned, pair)) for pair in _complete(predictions))
        score = None if accuracy is None or plus is None else accuracy + plus
        return {
            "accuracy": accuracy, "accuracy+": plus, "score": score, "count": len(predictions),
        }  # fmt: skip


class MultipleChoice(Metric):
    """MMBench (Liu et al. 2023): the option is read from the answer without another model.

    ``accuracy`` is over questions with their options in the first order; ``circular`` counts a
    question if it is answered right in every order. An answer that names no option, or several, is
    wrong, and counted as ``unread``.
    """

    def check(self, truth: str, reference: Reference) -> None:
        if truth not in reference.options:
            letters = ", ".join(reference.options) or "none"
            raise DataError(f"the true answer {truth!r:.60} is none of the options ({letters})")

    def credit(self, answer: str, truth: str, reference: Reference) -> float:
        return float(read_option(answer, reference.options) == truth)

    def figures(self, predictions: Sequence[Prediction]) -> Figures:
        groups = _by(predictions, lambda p: p.reference.group).values()
        unread = (read_option(p.answer, p.reference.options) is None for p in predictions)
        figures: Figures = {"accuracy": _mean(self.earned(group[0]) for group in groups)}
        if any(p.reference.group_size > 1 for p in predictions):
            whole = _complete(predictions)
            figures["circular"] = _mean(all(map(self.earned, group)) for group in whole)
        return figures | {"unread": _mean(unread), "count": len(groups)}


def read_option(answer: str, options: dict[str, str]) -> str | None:
    """The letter that an answer names, or whose text it holds, if it is a single one.

    As VLMEvalKit's exact matching: an ``A`` among more than three words may be the article, and a
    letter counts near the end of the answer only.
    """
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1:
        (letter,) = letters
        article = letter == "A" and len(words) > 3
        if not article and words.index(letter) > len(words) - 5:
            return letter
    lowered = answer.lower()
    if len(lowered) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, text in options.items() if text.lower() in lowered]
    return named[0] if len(named) == 1 else None


GQA = StringMatch()
VQA = PeoplesAccuracy(normalize_vqa)
TEXTVQA = PeoplesAccuracy(normalize_textvqa)
POPE = YesNoDetection()
MME = PairedYesNo()
MMBENCH = MultipleChoice()
