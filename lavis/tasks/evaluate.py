"""Score a checkpoint on splits, beside what text alone and an untrained projection reach."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lavis.common.device import pick_device
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
    datasets = {split: _first(task.build_split(split, train=False), limit) for split in splits}
    torch.manual_seed(run.seed)
    model = task.build_model(pick_device(run.device)).eval()

    def answer(split: str, *, blind: bool = False) -> list[Prediction]:
        answers = []
        for dataset in datasets[split]:
            answers += predict(
                model,
                dataset,
                batch_size=run.batch_size_eval,
                max_new_tokens=run.max_new_tokens,
                blind=blind,
                seed=run.seed,
            )
        return answers

    scores: dict[str, dict[str, Any]] = {}
    untrained = {split: score(answer(split)) for split in splits} if baselines else {}
    if checkpoint is not None:
        model.load_checkpoint(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    for split in splits:
        predictions = answer(split)
        scores[split] = score(predictions)
        if baselines:
            scores[f"{split}, blind"] = score(answer(split, blind=True))
            scores[f"{split}, untrained"] = untrained[split]
        rows = [dataclasses.asdict(p) | {"right": p.right} for p in predictions]
        _write_json(out / f"{split}.json", rows)
        draw_answers(predictions, out / f"{split}.png")
    _write_json(out / "scores.json", scores)
    return f"{table(scores)}\nanswers, pictures and scores: {out}"


def _first(datasets: list[InstructionDataset], limit: int | None) -> list[InstructionDataset]:
    for dataset in datasets:
        dataset.records = dataset.records[:limit]
    return datasets


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
