"""Stock models of Transformers: their configuration, and their weights with nothing left over."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from lavis.common.errors import ConfigError, LavisError, WeightsError, first_line, listed, raised_as
from lavis.common.packages import check_packages


def build_stock(
    family: type[PreTrainedModel],
    config: PreTrainedConfig,
    path: Path,
    folder: Path | None = None,
    **options: object,
) -> PreTrainedModel:
    """A stock model with its weights, every one of which has a place.

    Raises:
        WeightsError: they do not fit.
    """
    try:
        model, info = family.from_pretrained(
            folder, config=config, output_loading_info=True, **options
        )
    except Exception as error:  # a damaged file, or shapes that differ: all kinds
        if folder is not None:
            raise unreadable(path, error) from error
        raise WeightsError(f"{path} does not fit: {first_line(error)}") from error
    _check(path, info)
    return model


def unreadable(path: Path, error: Exception) -> LavisError:
    """What to raise where a library could not read a file."""
    if isinstance(error, LavisError):
        return error
    return WeightsError(f"{path} cannot be read: {first_line(error)}")


def read_config(path: Path) -> PreTrainedConfig:
    """The configuration of a folder or a ``.gguf`` file; code that may lie beside it is not run.

    Raises:
        WeightsError: the file is missing, damaged, or holds values of a wrong kind.
        ConfigError: the family is unknown, the weights are quantized, or a package is missing.
    """
    file, options = path / "config.json", {}
    if path.suffix == ".gguf":
        file, options = path, {"gguf_file": path.name}
        check_packages("gguf", str(path))
    if not file.is_file():
        raise WeightsError(f"model.language.path: no file {file}")
    if file is not path:
        _check_config(file)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            file.parent, trust_remote_code=False, local_files_only=True, **options
        )
    except Exception as error:  # the library's own checks raise all kinds
        verb = "read" if file is path else "used"
        raise WeightsError(f"{file} cannot be {verb}: {first_line(error)}") from error
    return config


def _check_config(file: Path) -> None:
    with raised_as(WeightsError, f"{file} is not a JSON object", ValueError, AttributeError):
        given = json.loads(file.read_text(encoding="utf-8"))
        kind = given.get("model_type")
    if kind not in CONFIG_MAPPING_NAMES:
        way = "a newer one may know it (pip install -U transformers)"
        if "auto_map" in given:
            way = "it would need the folder's own code, which is never run: take another model"
        raise ConfigError(
            f"{file}: model_type {kind!r} is unknown to Transformers {__version__}; {way}"
        )
    if given.get("quantization_config"):
        raise ConfigError(f"{file}: the weights are quantized; use the full-precision folder")


def _check(path: Path, info: dict[str, Iterable[str]]) -> None:
    """Refuse weights that are missing, left over or of another shape, by the library's report."""
    reports = {
        "missing": info["missing_keys"],
        "not part of the model": info["unexpected_keys"],
        "of another shape": [m[0] for m in info["mismatched_keys"]],
        "not converted": info.get("error_msgs") or (),
    }
    wrong = []
    for what, names in reports.items():
        if names := sorted(names):
            wrong.append(f"{len(names)} {what}: {listed(names)}")
    if wrong:
        raise WeightsError(f"{path} does not fit: " + "; ".join(wrong))
