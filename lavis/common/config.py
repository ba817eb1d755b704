"""Read a run's YAML: model defaults, data set defaults, the file, then ``--options``."""

from __future__ import annotations

import argparse
import json
import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis.common.errors import ConfigError, at, raised_as
from lavis.common.paths import LIBRARY_ROOT, REPOSITORY, is_file, user_path
from lavis.common.registry import BUILDERS, did_you_mean, import_plugins
from lavis.common.schema import Config, EnvConfig, ModelConfig, RunConfig
from lavis.common.stages import in_stage, take_stages
from lavis.common.typed import Where, convert, parse, quoted


class _Layers:
    """Configuration layers in rising priority; the last one that sets a path owns it."""

    def __init__(self, source: str, user: DictConfig) -> None:
        self.source = source
        self._layers = [(source, user)]

    def add(self, source: str, layer: DictConfig, *, first: bool = False) -> None:
        self._layers.insert(0 if first else len(self._layers), (source, layer))

    def merged(self, *, resolve: bool = True) -> dict[str, Any]:
        """Plain values of all layers.

        Raises:
            ConfigError: layers that do not merge, or an interpolation that leads nowhere.
        """
        try:
            tree = OmegaConf.merge(*(layer for _, layer in self._layers))
            plain = OmegaConf.to_container(tree, resolve=resolve, throw_on_missing=resolve)
        except OmegaConfBaseException as error:
            first, path = str(error).splitlines()[0], str(error.full_key or "")
            name = re.fullmatch(r"Interpolation key '(\w+)' not found", first)
            if name and name[1] in os.environ:
                first += f"; the environment variable is ${{oc.env:{name[1]}}}"
            raise ConfigError(f"{self.where(path)}: {path}: {first}") from error
        return cast(dict[str, Any], plain)

    def get(self, path: str) -> Any:
        """The value at a dotted path, or ``None``; other paths' mistakes are left alone.

        Raises:
            ConfigError: an interpolation that leads nowhere.
        """
        try:
            return OmegaConf.select(OmegaConf.merge(*(layer for _, layer in self._layers)), path)
        except OmegaConfBaseException as error:
            first = str(error).splitlines()[0]
            raise ConfigError(f"{self.where(path)}: {path}: {first}") from error

    def where(self, path: str) -> str:
        """Source of a dotted path, for error messages."""
        keys = path.replace("[", ".").replace("]", "").split(".") if path else []
        for source, layer in reversed(self._layers):
            if _has(OmegaConf.to_container(layer, resolve=False), keys):
                return source
        return self.source if len(keys) <= 1 else self.where(".".join(keys[:-1]))


def load_config(path: str | Path, options: Sequence[str] = ()) -> Config:
    """Load, merge and type a run's configuration; of a run in stages, the last one's.

    Args:
        path: YAML file with the sections ``model``, ``datasets`` and ``run``.
        options: ``a.b=value`` overrides; values are YAML.

    Raises:
        ConfigError: naming the dotted path, the file that set it and the nearest valid name.
    """
    return [*load_stages(path, options).values()][-1]


def load_stages(path: str | Path, options: Sequence[str] = ()) -> dict[str, Config]:
    """Load each stage of a run, in order; a YAML without ``stages`` is one, named ``""``.

    A stage is merged over the rest of the file. ``--options`` come last, those that begin with
    ``stages.<name>.`` for one stage alone.

    Raises:
        ConfigError: as :func:`load_config`, naming the stage, too.
    """
    source, user, given = str(path), _read_yaml(user_path(path)), parse_options(options)
    blocks, ours = take_stages(user, source), take_stages(given, "--options")
    for name in ours:
        if name not in blocks:
            raise ConfigError(
                f"--options: stages.{name}: {source} has no such stage{did_you_mean(name, blocks)}"
            )
    stages = {}
    for name, block in blocks.items() or [("", OmegaConf.create({}))]:
        layers = _Layers(source, user)
        for origin, layer in ((source, block), ("--options", given), ("--options", ours.get(name))):
            if layer:
                layers.add(origin, layer)
        with in_stage(name):
            stages[name] = _build(layers)
    return stages


def default_model_config(
    arch: str,
    model_type: str | None,
    options: Sequence[str] = (),
    cfg_path: str | Path | None = None,
) -> Config:
    """Configuration of a model alone: its defaults, or those of a run's YAML, with overrides.

    The toybox's files are found wherever the program runs.

    Raises:
        ConfigError: as :func:`load_config`, or the YAML is of another model than is asked for.
    """
    asked = {k: v for k, v in (("arch", arch), ("model_type", model_type)) if v}
    if cfg_path is None:
        cache = {"cache_root": str(REPOSITORY)} if model_type == "toybox" else {}
        user = OmegaConf.create({"model": asked, "env": cache})
        layers = _Layers("the model's defaults", user)
        layers.add("--options", parse_options(options))
        return _build(layers)
    config = load_config(cfg_path, options)
    for key, value in asked.items():
        if value != (has := getattr(config.model, key, value)):
            raise ConfigError(f"{cfg_path}: model.{key} is {has}, but {value} is asked for")
    return config


def _build(layers: _Layers) -> Config:
    """Put the defaults under the layers, and type the result."""
    given = layers.merged(resolve=False)
    known = ("model", "datasets", "run", "preprocess", "env", "imports")
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{layers.where(str(key))}: unknown section {key!r}{did_you_mean(str(key), known)} "
                f"(known: {', '.join(known)})"
            )
    import_plugins(convert(tuple[str, ...], given.get("imports") or [], "imports", layers.where))
    _add_model_defaults(layers, given)
    _add_dataset_defaults(layers, given)
    tree = layers.merged()
    for section in ("model", "run"):
        tree.setdefault(section, {})
    _move_old_names(tree)
    _apply_deepspeed_config(tree["run"], layers.where)
    return replace(parse(Config, tree, "", layers.where), source=layers.source, tree=tree)


def parse_options(options: Iterable[str]) -> DictConfig:
    """Turn ``["a.b=1"]`` into a mapping.

    Raises:
        ConfigError: if an item is not of the form ``key=value``.
    """
    tree = OmegaConf.create({})
    for item in options:
        key, equals, text = item.partition("=")
        if not equals or not key or any(not part for part in key.split(".")):
            raise ConfigError(f"--options: {item!r} is not of the form a.b=value")
        try:
            tree.merge_with_dotlist([f"{key}={_without_comment(text)}"])
        except yaml.YAMLError as error:
            raise ConfigError(
                f"--options: {key}: {text!r} is not valid YAML: {error}\nText that YAML reads "
                f"otherwise needs quotes: {quoted(key, text, lambda _: '--options')}"
            ) from error
        except OmegaConfBaseException as error:
            raise ConfigError(f"--options: {key}: {error}") from error
    return tree


def _without_comment(text: str) -> str:
    """YAML of what the user typed, where a ``#`` would cut it short."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    rest = text if node is None else text[node.end_mark.index :]
    return json.dumps(text, ensure_ascii=False) if rest.strip() else text


class AddOptions(argparse.Action):
    """Collects ``--options``, given once or several times, and refuses contradictions."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        """Add the settings, or ``const`` for an argument that takes none."""
        items = [*getattr(namespace, self.dest), *(values or self.const or ())]
        given: dict[str, str] = {}
        for key, _, value in (item.partition("=") for item in items):
            if given.setdefault(key, value) != value:
                raise ConfigError(f"--options: {key} is given as {given[key]!r} and as {value!r}")
        setattr(namespace, self.dest, items)


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``--cfg-path`` and ``--options`` to a command."""
    parser.add_argument(
        "--cfg-path", required=required, metavar="YAML", help="configuration of the run"
    )
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        action=AddOptions,
        metavar="KEY=VALUE",
        help="override settings, e.g. --options run.max_epoch=1 run.device=cpu",
    )


def _read_yaml(path: Path) -> DictConfig:
    if not is_file(path):
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")])
        raise ConfigError(f"no configuration file {path}{near}")
    errors = yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError
    with raised_as(ConfigError, f"{path} is not valid YAML", *errors):
        loaded = OmegaConf.load(path)
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} must hold a mapping with the sections model, datasets and run")
    return loaded


def _add_model_defaults(layers: _Layers, given: dict[str, Any]) -> None:
    model = convert(dict[str, Any], given.get("model") or {}, "model", layers.where)
    model_class = ModelConfig.__select__(model, "model", layers.where)
    if model.get("from_pretrained") is not None:
        _add_folder(layers, model, model_class)
    defaults: Mapping[str, str] = getattr(model_class, "DEFAULTS", {})
    if not defaults:
        return
    model_type = model.get("model_type") or next(iter(defaults))
    convert(str, model_type, "model.model_type", layers.where)
    if model_type not in defaults:
        raise ConfigError(
            f"{layers.where('model.model_type')}: model.model_type: unknown {model_type!r}"
            f"{did_you_mean(model_type, defaults)} (known: {', '.join(defaults)})"
        )
    path = LIBRARY_ROOT / "configs" / "models" / defaults[model_type]
    layers.add(str(path), _read_yaml(path), first=True)


def _add_folder(layers: _Layers, model: dict[str, Any], model_class: type[ModelConfig]) -> None:
    """Put what a folder of a whole model says under what the YAML says."""
    key = "model.from_pretrained"
    path = convert(str, layers.get(key), key, layers.where)
    root = convert(
        str, layers.get("env.cache_root") or EnvConfig.cache_root, "env.cache_root", layers.where
    )
    blocks = model_class.of_folder(path, root)
    for part, block in list(blocks.items()):
        given = convert(dict[str, Any], model.get(part) or {}, f"model.{part}", layers.where)
        if given.get("name", block["name"]) != block["name"]:
            del blocks[part]  # another kind, with keys of its own
    processor = {"name": "blip_image_eval"}  # with size and mean as the folder says
    images = {"vis_processor": {"train": processor, "eval": processor}}
    layers.add(path, OmegaConf.create({"model": blocks, "preprocess": images}), first=True)


def _add_dataset_defaults(layers: _Layers, given: dict[str, Any]) -> None:
    blocks = convert(
        dict[str, dict[str, Any]], given.get("datasets") or {}, "datasets", layers.where
    )
    for name, block in reversed(blocks.items()):  # each goes in front: the file's order stays
        path = f"datasets.{name}"
        builder = convert(str, block.get("builder") or str(name), f"{path}.builder", layers.where)
        try:
            BUILDERS.check(builder)
        except ConfigError as error:
            raise ConfigError(
                f"{layers.where(path)}: {path}: {error}. For your own data add "
                "`builder: instruction` to the block"
            ) from error
        defaults, source = {}, f"defaults of {builder}"
        if (file := LIBRARY_ROOT / "configs" / "datasets" / f"{builder}.yaml").is_file():
            defaults, source = _read_yaml(file).datasets[builder], str(file)
        block = OmegaConf.merge(defaults, {"builder": builder})
        layers.add(source, OmegaConf.create({"datasets": {name: block}}), first=True)


def _move_old_names(tree: dict[str, Any]) -> None:
    model, run = tree["model"], tree["run"]
    if not isinstance(model, dict) or not isinstance(run, dict):
        return
    # Some of the original's files set it under `model`, where it had no effect.
    if "autocast_dtype" in model:
        run.setdefault("autocast_dtype", model.pop("autocast_dtype"))
    if run.get("max_len") is not None:
        run.setdefault("max_new_tokens", run["max_len"])


_DEEPSPEED = "run.deepspeed_config"
_SAID = {  # by key of ``run``
    "accum_grad_iters": "gradient_accumulation_steps",
    "batch_size_train": "train_micro_batch_size_per_gpu",
    "grad_norm_clip": "gradient_clipping",
    "eps": "optimizer.params.eps",
    "weight_decay": "optimizer.params.weight_decay",
}


def _apply_deepspeed_config(run: Any, where: Where) -> None:
    """Take over what a DeepSpeed section says about the step, as the original's recipes do."""
    section = run.get("deepspeed_config") if isinstance(run, dict) else None
    if not isinstance(section, dict):
        return

    def find(key: str, hint: Any = Any) -> Any:
        value, path = section, _DEEPSPEED
        for name in key.split("."):
            value = convert(dict[str, Any], value, path, where)
            if name not in value:
                return "auto"
            value, path = value[name], f"{path}.{name}"
        return convert(hint, value, path, where)

    if "scheduler" in section:
        path = f"{_DEEPSPEED}.scheduler"
        raise ConfigError(
            f"{where(path)}: {path}: the learning rate follows run.lr_sched; remove the section"
        )
    find("zero_optimization", dict[str, Any])  # what it holds, DeepSpeed will check
    find("fp16.enabled", bool)
    find("bf16.enabled", bool)
    find("optimizer.type", Literal["AdamW", "Adam"])
    said = {key: (f"{_DEEPSPEED}.{theirs}", find(theirs)) for key, theirs in _SAID.items()}
    if (betas := find("optimizer.params.betas")) != "auto":
        path = f"{_DEEPSPEED}.optimizer.params.betas"
        betas = convert(tuple[float, ...], betas, path, where)
        if len(betas) != 2:
            raise ConfigError(f"{where(path)}: {path} must have 2 values, not {len(betas)}")
        said |= {f"beta{n + 1}": (f"{path}[{n}]", beta) for n, beta in enumerate(betas)}
    hints = typing.get_type_hints(RunConfig)
    for key, (path, value) in said.items():
        if value in (None, "auto"):
            continue
        value = convert(hints[key], value, path, where)
        with at(f"{where(path)}: {path}"):
            RunConfig(**{key: value})
        if run.get(key, value) != value:
            raise ConfigError(
                f"{where(_DEEPSPEED)}: {_DEEPSPEED} says {value} where "
                f"run.{key} says {run[key]}; leave one of them out"
            )
        run[key] = value


def _has(tree: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if isinstance(tree, list) and key.isdigit() and int(key) < len(tree):
            tree = tree[int(key)]
        elif isinstance(tree, dict) and key in tree:
            tree = tree[key]
        else:
            return False
    return True
