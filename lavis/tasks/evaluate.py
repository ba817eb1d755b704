"""Score a checkpoint on splits, beside what text alone and an untrained projection reach."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lavis.common import dist
from lavis.common.errors import DataError, LavisError, raised_as
from lavis.common.schema import RunConfig
from lavis.common.typed import parse
from lavis.datasets.instruction import InstructionDataset
from lavis.tasks.data import Splits
from lavis.tasks.report import draw_answers
from lavis.tasks.scoring import Prediction, predict, require_bleu, score, table

if TYPE_CHECKING:
    from lavis.models.vlm import VLM

logger = logging.getLogger(__name__)
Answers = Mapping[str, list[Prediction]]


def evaluate(
    model: VLM,
    splits: Splits,
    run: RunConfig,
    out: Path,
    *,
    blind: bool = False,
    before: Answers | None = None,
) -> str:
    """Answer, score, and write ``<split>.jsonl``, ``<split>.png`` and ``scores.json`` to ``out``.

    Every process must call it.

    Args:
        run: batch size, length of answers, seed, and what becomes of bad samples.
        blind: also score shuffled images.
        before: answers to be scored beside them.

    Returns:
        The table of scores, in percent of exact match, and the files' folder.

    Raises:
        LavisError: with what to mend. What was answered until then is in ``<split>.part.jsonl``.
    """
    answers = dict(before or {})
    for split, datasets in splits.items():
        answers[split] = answer(model, datasets, run, out, split)
        if blind:
            name = f"{split}, blind"
            answers[name] = answer(model, datasets, run, out, name, blind=True)
    scored = _score(answers, out)
    for split in splits if dist.is_main() else ():
        try:
            draw_answers(answers[split], out / f"{split}.png")
        except (LavisError, OSError) as error:
            logger.error("no picture of the answers to %s: %s", split, error)
    return f"{scored}\nanswers, pictures and scores: {out}"


def score_files(paths: Sequence[Path], out: Path | None) -> str:
    """Score the answers of files that :func:`evaluate` has written, without a model.

    Args:
        out: folder that gets ``scores.json``.

    Returns:
        The table of scores.

    Raises:
        DataError, ConfigError: a file does not hold answers; sacreBLEU is missing.
    """
    unique = len({p.stem for p in paths}) == len(paths)
    return _score({p.stem if unique else str(p): _read(p) for p in paths}, out)


def _score(answers: Answers, out: Path | None) -> str:
    require_bleu(p.kind for predictions in answers.values() for p in predictions)
    scores = {name: score(answers[name]) for name in sorted(answers)}
    if out is not None:
        _write(out / "scores.json", json.dumps(scores, ensure_ascii=False, indent=1) + "\n")
    return table(scores)


def answer(
    model: VLM,
    datasets: Sequence[InstructionDataset],
    run: RunConfig,
    out: Path,
    name: str,
    *,
    blind: bool = False,
) -> list[Prediction]:
    """Answers in the records' order, which are always on disk.

    While they come they are in ``<name>.part.jsonl``, at the end in ``<name>.jsonl``.
    """
    part = out / f"{name}.part.jsonl"
    answers: list[Prediction] = []
    count = 0

    def keep(batch: Sequence[Prediction]) -> None:
        nonlocal count
        _write_answers(part, batch, mode="a" if count else "w")
        count += len(batch)

    try:
        for dataset in datasets:
            answers += predict(
                model,
                dataset,
                batch_size=run.batch_size_eval,
                max_new_tokens=run.max_new_tokens,
                blind=blind,
                seed=run.seed,
                on_bad=run.on_bad_sample,
                keep=keep,
            )
        _write_answers(out / f"{name}.jsonl", answers)
    except BaseException:
        if count and dist.is_main():
            logger.error("%d of %d answers are in %s", count, sum(map(len, datasets)), part)
        raise
    if dist.is_main():
        part.unlink(missing_ok=True)
    return answers


def _read(path: Path) -> list[Prediction]:
    answers: list[Prediction] = []
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):  # not at U+2028, as splitlines
            if line.strip():
                row = {k: v for k, v in json.loads(line).items() if k != "right"}
                answers.append(
                    parse(Prediction, row, f"answer {len(answers) + 1}", lambda _: str(path))
                )
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: answer {len(answers) + 1} cannot be read: {error}. A file that "
            "evaluate.py has written holds an answer a line"
        ) from error
    if not answers:
        raise DataError(f"{path} holds no answer")
    return answers


def _write_answers(path: Path, predictions: Iterable[Prediction], mode: str = "w") -> None:
    rows = [dataclasses.asdict(p) | {"right": p.right} for p in predictions]
    for row in rows:
        if not row["reference"]["score"]:
            del row["reference"]
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), mode)


def _write(path: Path, text: str, mode: str = "w") -> None:
    """In the main process; if it fails, all raise."""
    with dist.raise_together(), raised_as(LavisError, f"{path} cannot be written", OSError):
        if dist.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Half a surrogate pair has no UTF-8; its backslash escape is JSON's, too.
            with path.open(mode, encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
