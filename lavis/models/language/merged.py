"""Adapters merged into their language model's weights, as a folder of its own."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lavis.common.errors import ConfigError, WeightsError, listed
from lavis.common.paths import makes_folder, require_checkpoint
from lavis.common.registry import MODELS
from lavis.common.schema import Config
from lavis.common.types import DTYPES
from lavis.models.compute.adapted_linear import AdaptedLinear
from lavis.models.config import PartsConfig
from lavis.models.export.shards import converted, save_shards, write_json
from lavis.models.language.hf import stock_class, text_part
from lavis.models.language.parts import LanguagePart, Qwen1
from lavis.models.vlm import VLM
from lavis.models.weights.files import WeightFile, load_pickle, open_shard, state_dict_in
from lavis.models.weights.shards import find_shards, read_json
from lavis.models.weights.stock import read_config
from lavis.processors.contracts import Turn

logger = logging.getLogger(__name__)
_COPIED = {".json", ".jinja", ".txt", ".model", ".tiktoken"}  # never code
_QUESTIONS = ("What is in the picture?", "Count from one to ten.", "用一句话介绍你自己。")
_ANSWER = 16  # tokens
# Of the logits' length: beyond, the merged weights are not those of the adapters.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Proof:
    """How far a merged model is from its adapters, on a few questions.

    Attributes:
        same: how many greedy answers are the same, token by token.
        questions: of how many.
        largest: difference of a logit.
        relative: length of the logits' difference, as a share of the logits'.
        effect: the same between the adapters and the model without them.
    """

    same: int
    questions: int
    largest: float
    relative: float
    effect: float

    def __str__(self) -> str:
        return (
            f"greedy answers: {self.same} of {self.questions} the same; logits differ by at most "
            f"{self.largest:.1e}, {self.relative:.1e} of their length (the adapters move them by "
            f"{self.effect:.1e})"
        )


def merge(
    config: Config,
    checkpoint: str | Path,
    out: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
) -> Proof:
    """Write the merged language model, what belongs to it, and compare.

    Weights are merged shard by shard, in fp32, and rounded once.

    Args:
        dtype: of the merged weights; ``None`` keeps each tensor's.

    Raises:
        WeightsError: the checkpoint does not fit, or the merged model computes something else;
            ``out`` is then not made.
        ConfigError: the weights that adapters are of stand in no file.
    """
    settings = config.model
    assert isinstance(settings, PartsConfig)
    root, family = config.env.cache_root, MODELS.get(settings.arch)
    state = _trained(config, require_checkpoint(checkpoint, "--checkpoint"))
    described: LanguagePart = family.describe(settings, root)[1]
    sees = "vision" in settings.training or settings.load_finetuned
    options: Any = {"cache_root": root, "device": device, "vision": sees, "start": True}
    model: VLM = family.from_config(settings, **options)
    model.load_checkpoint(checkpoint)
    adapted: Any = model.language.model
    prompts = [model.encoder.prompt([Turn("user", q)]) for q in _QUESTIONS]
    texts = [_answer(adapted, ids, device) for ids in prompts]

    def said(llm: nn.Module) -> Tensor:
        return torch.cat([_logits(llm, ids, device) for ids in texts])

    wanted = said(adapted)
    with makes_folder(out) as folder:
        kinds = write_folder(described, adapted, folder, dtype)
        computed = model.language.head.weight.dtype
        _write_run(config, state, folder, out)
        for layer in _layers(adapted).values():
            layer.enable_adapters(False)
        bare = said(adapted)
        del model, adapted, layer
        proof = _compare(prompts, texts, wanted, said(_read_back(described, folder, device)), bare)
        _judge(proof, kinds, computed)
    return proof


def _trained(config: Config, checkpoint: Path) -> dict[str, Tensor]:
    """What belongs to the merged model: all that was trained but the adapters."""
    state: dict[str, Tensor] = {}
    assert isinstance(config.model, PartsConfig)
    start = config.model.finetuned_path(config.env.cache_root)
    for path in filter(None, (start, checkpoint)):
        state |= dict(state_dict_in(path, load_pickle(path)))
    mine = {k for k in state if k.startswith("llm_model.")}
    if own := sorted(k for k in mine if ".lora_" not in k):
        raise WeightsError(
            f"{checkpoint} (or model.finetuned) holds weights of the language model itself, which "
            f"its folder does not: {listed(own)}. Adapters are merged into the folder's alone"
        )
    return {k: t for k, t in state.items() if k not in mine}


def _layers(llm: nn.Module) -> dict[str, AdaptedLinear]:
    return {n: m for n, m in llm.named_modules() if isinstance(m, AdaptedLinear)}


def write_folder(
    described: LanguagePart, adapted: nn.Module, out: Path, dtype: torch.dtype | None
) -> set[torch.dtype]:
    """A folder like the language model's, file by file, with its adapters merged.

    Returns:
        The types of the merged weights.

    Raises:
        ConfigError, WeightsError: as :func:`merge`.
    """
    source = described.path
    places: dict[str, dict[int, AdaptedLinear]] = {}
    for name, layer in _layers(adapted).items():
        place = described.keys.source(f"{name}.weight")
        places.setdefault(place.key, {})[place.part] = layer
    text = _text_alone(described)
    shards = [(file := open_shard(path), _names(file, text)) for path in find_shards(source)]
    shards = [(file, names) for file, names in shards if names]
    if absent := sorted(set(places) - {k for _, names in shards for k in names}):
        raise ConfigError(
            f"{source}: its files hold no {listed(absent)}: this family's weights are stored "
            "under other names, and adapters cannot be merged into them file by file"
        )
    kinds: set[torch.dtype] = set()

    def make(key: str, file: WeightFile, stored: str) -> Tensor:
        tensor = file[stored]
        kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        if key not in places:
            return tensor.to(kind).contiguous()
        kinds.add(kind)
        return converted(f"{key}, merged,", lambda: _merged(tensor, places[key]), kind)

    files = ({k: partial(make, k, file, n) for k, n in names.items()} for file, names in shards)
    save_shards(list(files), out)
    _write_small_files(described, out, dtype, text=text)
    return kinds


def _merged(tensor: Tensor, layers: Mapping[int, AdaptedLinear]) -> Tensor:
    """fp32; a tensor that holds several layers' weights is merged part by part."""
    one = next(iter(layers.values()))
    parts = tensor.to(one.lora_A["default"].weight.device).split(one.out_features)
    whole = [layers[i].merged(p) if i in layers else p.float() for i, p in enumerate(parts)]
    return torch.cat(whole)


def _names(file: WeightFile, text: bool) -> dict[str, str]:
    """What a file's tensors are called in the folder that is written."""
    names = {key: key for key in file}
    return text_part(names) if text else names


def _text_alone(described: LanguagePart) -> bool:
    """Whether the folder also sees or hears, of which the language model alone is written."""
    if isinstance(described, Qwen1):
        return False
    config = read_config(described.path)
    return stock_class(config, described.path)[1] is not config


def _write_small_files(
    described: LanguagePart, out: Path, dtype: torch.dtype | None, *, text: bool
) -> None:
    """Sizes, vocabulary, template; none of the code that may lie beside them."""
    source = described.path
    for path in source.iterdir():
        weights = path.name.endswith(".index.json")
        if path.suffix in _COPIED and path.name != "config.json" and not weights:
            shutil.copyfile(path, out / path.name)
    if isinstance(described, Qwen1):
        content = dict(described.spec.original)
    elif text:
        content = described.sizes.to_dict() | {"architectures": [described.family.__name__]}
    else:
        content = read_json(source / "config.json")
    content.pop("auto_map", None)
    if dtype is not None:
        content.pop("torch_dtype", None)  # the older name
        content["dtype"] = str(dtype).removeprefix("torch.")
    write_json(out / "config.json", content)


def _write_run(config: Config, state: dict[str, Tensor], folder: Path, out: Path) -> None:
    """``connector.pth`` and ``run.yaml``: how to go on with what will stand in ``out``."""
    tree = copy.deepcopy(config.tree)
    model, path = tree["model"], str(out.resolve())
    if "llm_model" in model or "get_lora" in model:
        model |= {"llm_model": path, "get_lora": False}
    else:
        model["language"]["path"] = path
        del model["train"]["language"]
    model |= {"load_finetuned": bool(state), "finetuned": None}
    tree["run"].pop("resume_ckpt_path", None)
    if state:
        torch.save({"model": state, "config": tree}, folder / "connector.pth")
        model["finetuned"] = f"{path}/connector.pth"
    OmegaConf.save(OmegaConf.create(tree), folder / "run.yaml")


def _read_back(described: LanguagePart, folder: Path, device: torch.device) -> nn.Module:
    """The merged model as Transformers reads it by itself.

    First-generation Qwen, which needs the folder's own code there, is read as Qwen2.
    """
    if isinstance(described, Qwen1):
        config = replace(described.config, path=str(folder.resolve()))
        return Qwen1(config, "", described.key).load(device).model.eval()
    dtype: Any = DTYPES.get(described.config.precision, "auto")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, local_files_only=True
    )
    return model.to(device).eval()


@torch.no_grad()
def _logits(llm: nn.Module, ids: list[int], device: torch.device) -> Tensor:
    """(T, V) fp32, on the CPU."""
    logits: Tensor = llm(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]
    return logits.float().cpu()


def _answer(llm: nn.Module, prompt: list[int], device: torch.device) -> list[int]:
    """A prompt and what follows it, greedily."""
    ids = list(prompt)
    for _ in range(_ANSWER):
        ids.append(int(_logits(llm, ids, device)[-1].argmax()))
    return ids


def _compare(
    prompts: list[list[int]], texts: list[list[int]], wanted: Tensor, got: Tensor, bare: Tensor
) -> Proof:
    # A greedy answer is the same if each of its tokens is the likeliest after those before it.
    likeliest = [ids.tolist() for ids in got.argmax(-1).split([len(t) for t in texts])]
    each = zip(prompts, texts, likeliest, strict=True)
    same = sum(text[len(p) :] == ids[len(p) - 1 : -1] for p, text, ids in each)
    relative, effect = (float((x - wanted).norm() / wanted.norm()) for x in (got, bare))
    return Proof(same, len(prompts), float((got - wanted).abs().max()), relative, effect)


def _judge(proof: Proof, kinds: set[torch.dtype], computed: torch.dtype) -> None:
    """Refuse another model; warn where rounding eats what was learned.

    Args:
        kinds: of the merged weights.
        computed: what the adapters were computed beside.
    """
    names = ", ".join(sorted(str(k).removeprefix("torch.") for k in kinds))
    if not proof.relative <= max(_TOLERANCE.get(k, 0) for k in {*kinds, computed}):
        raise WeightsError(f"merged into {names}, the model is another than its adapters: {proof}")
    if proof.relative > proof.effect / 2 or proof.same < proof.questions:
        wider = "" if kinds == {torch.float32} else "; --dtype fp32 rounds less"
        logger.warning(
            "merged into %s, the model answers differently, or differs by as much as the adapters "
            "add%s: %s", names, wider, proof,
        )  # fmt: skip
