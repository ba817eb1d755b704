"""``stages`` of a YAML: several runs, each of which begins with the weights of the one before."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lavis.common.errors import ConfigError, LavisError, at
from lavis.common.registry import did_you_mean
from lavis.common.schema import Config

_SECTIONS = ("model", "datasets", "run", "preprocess")
_SHARED = {  # of all stages: one folder, one group of processes, one checkpoint to begin with
    "run": ("output_dir", "resume_ckpt_path", "evaluate", "device"),
    "model": ("load_finetuned", "finetuned"),
}


def take_stages(tree: DictConfig, source: str) -> dict[str, DictConfig]:
    """Take ``stages`` out of a configuration: what each, in order, sets otherwise.

    Args:
        source: names the configuration in messages.

    Raises:
        ConfigError: a name that cannot be a folder's, or a section or key that no stage has.
    """
    if "stages" not in tree:
        return {}
    given: Any = OmegaConf.to_container(tree, resolve=False)
    stages, place = given["stages"], f"{source}: stages"
    del tree["stages"]
    if not isinstance(stages, dict) or not stages:
        raise ConfigError(f"{place} must map each stage's name to what it sets, not {stages!r}")
    for name, block in stages.items():
        if not re.fullmatch(r"[\w-]+", str(name)) or not isinstance(name, str):
            raise ConfigError(
                f"{place}: {name!r} cannot name a folder: use letters, digits, - and _, in quotes "
                "if it is a number"
            )
        here = f"{place}.{name}"
        if not isinstance(block, dict | None):
            raise ConfigError(f"{here} must be a mapping, not {block!r}")
        stages[name] = block = block or {}
        for section, keys in block.items():
            if section not in _SECTIONS:
                near = did_you_mean(str(section), _SECTIONS)
                raise ConfigError(
                    f"{here}: unknown section {section!r}{near} (a stage has "
                    f"{', '.join(_SECTIONS)})"
                )
            for key in _SHARED.get(section, ()):
                if isinstance(keys, dict) and key in keys:
                    raise ConfigError(
                        f"{here}.{section}.{key}: all stages have one; set {section}.{key}"
                    )
    return {name: DictConfig(block) for name, block in stages.items()}


def select_stages(stages: Mapping[str, Config], name: str | None) -> dict[str, Config]:
    """All stages, or the one that is asked for.

    Raises:
        ConfigError: there is none of that name.
    """
    if name is None:
        return dict(stages)
    if name not in stages or not name:
        source = next(iter(stages.values())).source
        has = f"the stages {', '.join(stages)}" if "" not in stages else "no stages"
        raise ConfigError(f"--stage {name}: {source} has {has}{did_you_mean(name, stages)}")
    return {name: stages[name]}


def in_stage(name: str) -> AbstractContextManager[None]:
    """Name a stage in front of every error of the user's from inside; ``""`` names none."""
    return at(f"stages.{name}", LavisError) if name else nullcontext()


def whole_run(stages: Mapping[str, Config]) -> dict[str, Any]:
    """A YAML of all stages in which each says every key itself: what ``--options`` said, too."""
    first = next(iter(stages.values())).tree
    whole = {key: value for key, value in first.items() if key not in _SECTIONS}
    for section, keys in _SHARED.items():
        whole[section] = {key: first[section][key] for key in keys if key in first[section]}
    whole["stages"] = {
        name: {
            section: {
                k: v for k, v in config.tree[section].items() if k not in _SHARED.get(section, ())
            }
            for section in _SECTIONS
            if config.tree.get(section)
        }
        for name, config in stages.items()
    }
    return whole
