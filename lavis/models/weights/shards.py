"""What a language model's folder holds, without PyTorch and before a weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lavis.common.errors import ConfigError, WeightsError, listed, raised_as
from lavis.common.paths import is_file, require

_LFS = b"version https://git-lfs.github.com/spec/"
_UNFINISHED = (".incomplete", ".part", ".partial", ".aria2", ".crdownload")
_FAMILY = "first-generation Qwen such as Qwen-7B-Chat or Qwen-14B-Chat"


def llm_files(folder: Path, key: str, *, weights: bool) -> Iterator[Path]:
    """The files of a first-generation Qwen, checked; without ``weights``, only its vocabulary.

    Args:
        key: names the folder in messages.

    Raises:
        WeightsError, ConfigError: one is missing, or they are of another kind.
    """
    if is_file(folder):
        raise WeightsError(f"{key}: {folder} is not a folder{_instead(folder, key)}")
    require(folder, key, WeightsError, directory=True)
    if weights:
        path = folder / "config.json"
        if not path.exists() and (instead := _instead(folder, key)):
            raise WeightsError(f"{key}: no file {path}{instead}")
        yield require(path, key, WeightsError)
        _check_kind(path, read_json(path))
        yield from find_shards(folder, key)
    yield require(folder / "qwen.tiktoken", key, WeightsError)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object in UTF-8, with or without a byte order mark.

    Raises:
        WeightsError: it is none.
    """
    what = f"{path} is not a JSON object"
    with raised_as(WeightsError, what, ValueError, TypeError, RecursionError):
        return dict(**json.loads(path.read_text(encoding="utf-8-sig")))


def check_download(path: Path) -> None:
    """Check, without reading it, that all of a file is there.

    Raises:
        WeightsError: it is empty, a pointer of Git LFS, cannot be read or is being downloaded.
    """
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if head == _LFS:
        raise WeightsError(
            f"{path} is a Git LFS pointer; fetch the file behind it with: git lfs pull"
        )
    if not head:
        raise WeightsError(
            f"{path} is damaged or cut short (0 bytes): it is empty. Download it again"
        )
    for suffix in _UNFINISHED:
        if (rest := path.with_name(path.name + suffix)).exists():
            raise WeightsError(
                f"{rest}: the download of {path.name} has not ended; end it, or "
                "remove this file if it is old"
            )


def folder_files(folder: Path, key: str) -> Iterator[Path]:
    """The weight files of a folder of Transformers, checked as its small ones are.

    Raises:
        WeightsError: one is missing or not complete.
    """
    require(folder, key, WeightsError, directory=True)
    check_download(require(folder / "config.json", key, WeightsError))
    for shard in find_shards(folder, key):
        check_download(shard)
        yield shard


def find_shards(folder: Path, key: str = "the language model") -> list[Path]:
    """Weight files of a language model: safetensors if there are any, else ``.bin``.

    Raises:
        WeightsError: there are none, one of several is missing, or an index is damaged.
    """
    for kind, pattern in (("model", "*.safetensors"), ("pytorch_model", "*.bin")):
        shards = sorted(folder.glob(kind + pattern))
        for index in folder.glob(f"{kind}{pattern}.index.json"):
            check_download(index)
            shards = sorted(_named(index))
            if absent := [p.name for p in shards if not is_file(p)]:
                raise WeightsError(
                    f"{index} names {len(shards)} files, {len(absent)} of them missing: "
                    + listed(absent)
                )
        counts = [int(n) for p in shards for n in re.findall(r"-of-(\d+)\.", p.name)]
        if counts and len(counts) < max(counts):
            raise WeightsError(
                f"{folder} holds {len(counts)} of {max(counts)} weight files: "
                + listed([p.name for p in shards])
            )
        if shards:
            return shards
    raise WeightsError(
        f"{key}: {folder} holds neither model*.safetensors nor pytorch_model*.bin"
        + _instead(folder, key)
    )


def _named(index: Path) -> set[Path]:
    try:
        return {index.parent / name for name in read_json(index)["weight_map"].values()}
    except (WeightsError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is damaged: it has no weight_map of file names") from error


def _check_kind(path: Path, config: dict[str, Any]) -> None:
    """Refuse another family, and quantized weights."""
    for key, ours in (("model_type", "qwen"), ("architectures", ["QWenLMHeadModel"])):
        if (theirs := config.get(key) or ours) != ours:
            named = config.get("architectures") or "of another family"
            raise ConfigError(
                f"{path}: {key} is {theirs!r}; only {ours!r} is supported ({_FAMILY}). This model "
                f"is {named}"
            )
    if own := config.keys() & {"visual", "audio"}:
        raise ConfigError(
            f"{path}: a model with a part of its own for {own.pop()}; take a {_FAMILY}"
        )
    said = [config.get(key) for key in ("quantization_config", "compression_config")]
    said += [read_json(p) for p in path.parent.glob("quant*_config.json")]  # AutoGPTQ, AutoAWQ
    for quantized in filter(None, said):
        raise ConfigError(
            f"{path.parent}: the weights are quantized ({str(quantized)[:200]}), which is not "
            "supported; take the model in half precision, such as Qwen-7B-Chat instead of "
            "Qwen-7B-Chat-Int4"
        )


def _instead(path: Path, key: str) -> str:
    """What may be meant in place of a path that holds no model."""
    below = ("*", "snapshots/*", "models--*/snapshots/*")  # the last two: Hugging Face's cache
    if found := sorted(p for pattern in below for p in path.glob(f"{pattern}/config.json")):
        return f"; set {key} to {listed([str(p.parent) for p in found])}"
    if path.suffix == ".gguf" or any(path.glob("*.gguf")):
        return f"; GGUF files are made for llama.cpp: take the safetensors of a {_FAMILY}"
    return ""
