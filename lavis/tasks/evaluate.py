"""Score a checkpoint on splits, beside what text alone and an untrained projection reach."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lavis.common import dist
from lavis.common.schema import RunConfig
from lavis.datasets.instruction import InstructionDataset
from lavis.tasks.report import draw_answers
from lavis.tasks.scoring import Prediction, predict, score, table


def evaluate(
    task: Any,
    *,
    checkpoint: str | None,
    splits: Sequence[str],
    limit: int | None,
    baselines: bool,
    out: Path,
    device: torch.device,
) -> str:
    """Answer, score, and write ``<split>.json``, ``<split>.png`` and ``scores.json`` to ``out``.

    Args:
        task: builds the model and the data sets.
        checkpoint: trained weights, or ``None`` for those the configuration builds.
        limit: records of each split.
        baselines: also score shuffled images and the projection before training.

    Returns:
        The table of scores, in percent of exact match, and the files' folder.

    Raises:
        LavisError: with what to mend.
    """
    run = task.config.run
    for split in splits:
        task.evaluation_split(split, limit)
    torch.manual_seed(run.seed)
    model = task.build_model(device).eval()
    untrained = {}
    if baselines:
        datasets = {split: task.evaluation_split(split, limit) for split in splits}
        untrained = {s: score(_answer(run, model, parts)) for s, parts in datasets.items()}
    if checkpoint is not None:
        model.load_checkpoint(checkpoint)
    return answer_splits(
        task, model, splits=splits, limit=limit, blind=baselines, untrained=untrained, out=out
    )


def answer_splits(
    task: Any,
    model: Any,
    *,
    splits: Sequence[str],
    out: Path,
    limit: int | None = None,
    blind: bool = False,
    untrained: Mapping[str, dict[str, Any]] | None = None,
) -> str:
    """What :func:`evaluate` does once the model is there. Every process must call it.

    Args:
        blind: also score shuffled images.
        untrained: scores of each split before training.
    """
    run = task.config.run
    scores: dict[str, dict[str, Any]] = {}
    for split in splits:
        datasets = task.evaluation_split(split, limit)
        predictions = _answer(run, model, datasets)
        scores[split] = score(predictions)
        if blind:
            scores[f"{split}, blind"] = score(_answer(run, model, datasets, blind=True))
        if untrained:
            scores[f"{split}, untrained"] = untrained[split]
        if dist.is_main():
            out.mkdir(parents=True, exist_ok=True)
            rows = [dataclasses.asdict(p) | {"right": p.right} for p in predictions]
            _write_json(out / f"{split}.json", rows)
            draw_answers(predictions, out / f"{split}.png")
    if dist.is_main():
        _write_json(out / "scores.json", scores)
    return f"{table(scores)}\nanswers, pictures and scores: {out}"


def _answer(
    run: RunConfig, model: Any, datasets: Sequence[InstructionDataset], *, blind: bool = False
) -> list[Prediction]:
    return [
        p
        for dataset in datasets
        for p in predict(
            model,
            dataset,
            batch_size=run.batch_size_eval,
            max_new_tokens=run.max_new_tokens,
            blind=blind,
            seed=run.seed,
        )
    ]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
