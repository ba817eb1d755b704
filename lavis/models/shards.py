"""Find the weight files of a language model, without PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

from lavis.common.errors import WeightsError

_SHOWN = 8  # names listed in one message


def find_shards(folder: Path) -> list[Path]:
    """Weight files of a language model: safetensors if there are any, else ``.bin``.

    Raises:
        WeightsError: there are none, one that an index names is missing, or an index is damaged.
    """
    for kind, pattern in (("model", "*.safetensors"), ("pytorch_model", "*.bin")):
        shards = sorted(folder.glob(kind + pattern))
        for index in folder.glob(f"{kind}{pattern}.index.json"):
            named = _named(index)
            if absent := sorted(named - set(shards)):
                raise WeightsError(
                    f"{index} names {len(named)} files, {len(absent)} of them missing: "
                    + ", ".join(p.name for p in absent[:_SHOWN])
                )
            shards = sorted(named)
        if shards:
            return shards
    raise WeightsError(
        f"model.llm_model: {folder} holds neither model*.safetensors nor pytorch_model*.bin"
    )


def _named(index: Path) -> set[Path]:
    try:
        return {
            index.parent / name for name in json.loads(index.read_text())["weight_map"].values()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is damaged: it has no weight_map of file names") from error
