"""The model card of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from lavis.common.schema import Config
from lavis.models.config import PartsConfig
from lavis.models.export.probe import Proof
from lavis.models.export.targets import Target

_FRONT = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
---

# {name}

{proof}

## Parts

{parts}

Each part's weights stay under their own licence; what may be done with this folder is what all of \
them allow together.

## Training data

{data}

## Scores

{scores}

## Use

```python
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", backend="pil")
model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto")
messages = [{{"role": "user", "content": [
    {{"type": "image"}}, {{"type": "text", "text": "What is in the picture?"}},
]}}]
text = processor.tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=False
)
inputs = processor(
    text=text, images=[Image.open("picture.png").convert("RGB")], add_special_tokens=False,
    return_tensors="pt",
).to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1]:]
print(processor.tokenizer.decode(answer, skip_special_tokens=True))
```

{notes}
"""
_PIL = (
    '`backend="pil"` resizes pictures as in training; without it a few pixels differ by a grey '
    "level."
)


def write_card(
    folder: Path,
    name: str,
    config: Config,
    target: Target,
    proof: Proof,
    scores: Mapping[str, Any] | None,
) -> None:
    """Write ``README.md``. It names files by their last part alone.

    Args:
        name: of the folder, when it is finished.
        scores: what ``evaluate.py`` wrote to ``scores.json``.
    """
    model = config.model
    assert isinstance(model, PartsConfig)
    eyes, connector, llm = model.parts
    seen = getattr(eyes, "path", None)
    names = [seen] if isinstance(seen, str) else [eyes.vit_weights, eyes.pretrained]  # type: ignore[attr-defined]
    files = [PurePath(name).name for name in names]
    parts = [
        f"- vision: `{eyes.name}` ({', '.join(files)})",
        f"- connector: `{connector.name}`",
        f"- language model: {PurePath(llm.path).name}",
        f"- trained: {', '.join(model.training) or 'nothing'}",
    ]
    notes = [_PIL, *target.notes(), "Contexts end at the `max_position_embeddings` of its "
             "`config.json`; a longer one was never trained."]  # fmt: skip
    (folder / "README.md").write_text(
        _FRONT.format(
            name=name,
            proof=f"A vision language model, {proof}.",
            parts="\n".join(parts),
            data="\n".join(_data(config)) or "The configuration names none.",
            scores="\n".join(_scores(scores or {})) or "None were given.",
            notes="\n".join(f"- {note}" for note in notes),
        ),
        encoding="utf-8",
    )


def _data(config: Config) -> list[str]:
    return [
        f"- {name}: " + ", ".join(
            PurePath(path).name
            for split in config.run.train_splits
            if split in block.build_info.annotations
            for path in block.build_info.annotations[split].paths
        )
        for name, block in config.datasets.items()
    ]  # fmt: skip


def _scores(scores: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {name} | {split['overall']:.1f} | {split.get('count', '')} |"
        for name, split in scores.items()
        if isinstance(split, Mapping) and isinstance(split.get("overall"), int | float)
    ]
    return ["| split | overall | questions |", "|---|---|---|", *rows] if rows else []
