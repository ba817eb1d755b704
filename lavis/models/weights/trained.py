"""The model's part of a checkpoint, in the original's names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavis.common import dist
from lavis.common.errors import WeightsError, listed
from lavis.common.paths import require_checkpoint
from lavis.common.registry import did_you_mean
from lavis.common.schema import ModelConfig
from lavis.models.weights.agreement import check_settings
from lavis.models.weights.files import WeightFile, final_dtype, load_pickle, state_dict_in
from lavis.models.weights.original import SAME_NAMES, KeyMap

logger = logging.getLogger(__name__)


def _key_map(model: nn.Module) -> KeyMap:
    """How a model's names relate to those in its files: its ``key_map``, if it has one."""
    return getattr(model, "key_map", SAME_NAMES)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def trainable_state(
    model: nn.Module, whole: Callable[[Tensor], Tensor] = _on_cpu
) -> dict[str, Tensor]:
    """What is trained, on the CPU, under the original's names.

    A part of a joined tensor (``c_attn``) is never trained without the others.

    Args:
        whole: makes a whole tensor on the CPU of a parameter, which may be sharded.
    """
    return _key_map(model).to_original(
        {n: whole(p) for n, p in model.named_parameters() if p.requires_grad}
    )


def frozen_entries(model: nn.Module, file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds of a model's parts that are not trained now."""
    names = _key_map(model)
    learns = {names.source(n).key for n, p in model.named_parameters() if p.requires_grad}
    return {key: tensor for key, tensor in file.items() if key not in learns}


def load_model_state(
    model: nn.Module, path: str | Path, *, new_parts: Collection[str] = ()
) -> None:
    """Load a checkpoint's ``model`` entry into a model, in place.

    Args:
        new_parts: that may begin to learn here: the checkpoint may lack all that is trained of
            one, but not some of it.

    Raises:
        WeightsError: the file is missing or damaged, was trained with settings that change what
            its weights mean, a name is not part of the model, something that is trained here is
            missing, a shape differs or a number is not finite. The model is then unchanged.
    """
    path = require_checkpoint(path)
    content = load_pickle(path)
    if isinstance(config := getattr(model, "config", None), ModelConfig):
        check_settings(path, content, config, new_adapters="language" in new_parts)
    assign_model_state(model, state_dict_in(path, content), new_parts=new_parts)


def assign_model_state(
    model: nn.Module, file: WeightFile, *, new_parts: Collection[str] = ()
) -> None:
    """Copy a checkpoint's tensors into a model's parameters.

    Args:
        new_parts: as in :func:`load_model_state`.

    Raises:
        WeightsError: as :func:`load_model_state`.
    """
    names = _key_map(model)
    sources = {name: names.source(name) for name, _ in model.named_parameters()}
    known = {source.key for source in sources.values()}
    left_over = [key for key in file if key not in known]
    trained = {n: n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    begun = {part for n, part in trained.items() if sources[n].key in file}
    new_parts = (set(new_parts) & set(trained.values())) - begun
    new: list[tuple[nn.Parameter, Tensor]] = []
    for name, parameter in model.named_parameters():
        source = sources[name]
        if source.key not in file:
            if name in trained and trained[name] not in new_parts:
                raise WeightsError(
                    f"{file.label} lacks {source.key}, which is trained with this configuration; "
                    + (_whose(left_over) or _missing(model, lora="lora_" in name))
                )
            continue
        tensor = file[source.key]
        if tensor.shape != (shape := source.whole(parameter.shape)):
            raise WeightsError(
                f"{file.label}: {source.key} has shape {tuple(tensor.shape)}, the model "
                f"{shape}: the checkpoint belongs to other encoder or LLM sizes "
                "(model.vision, model.connector or model.language.path; in the original's keys "
                "model.llm_model)"
            )
        floats = tensor.is_floating_point()
        dtype = final_dtype(parameter)
        if not floats or not torch.isfinite(tensor.to(dtype)).all():
            what = f"that are not finite in {dtype}" if floats else f"of {tensor.dtype}"
            raise WeightsError(
                f"{file.label}: {source.key} holds numbers {what}; weights are finite floating-"
                "point numbers. Its training has diverged, or the file is damaged or another's"
            )
        new.append((parameter, source.cut(tensor)))
    if left_over:
        raise WeightsError(
            f"{file.label} holds {len(left_over)} tensors that are not part of this model: "
            f"{listed(left_over)}{did_you_mean(left_over[0], known)}"
        )
    if new_parts and dist.is_main():
        logger.info(
            "%s has nothing of what is trained in %s, which starts as its files have it, adapters "
            "at zero", file.label, " and ".join(sorted(new_parts)),
        )  # fmt: skip
    for parameter, tensor in new:
        if hasattr(parameter, "final_dtype"):
            parameter.data = tensor  # mapped like what it replaces, until it is sharded
        else:
            parameter.data = tensor.to(parameter.device, parameter.dtype, copy=True)


def _missing(model: nn.Module, *, lora: bool) -> str:
    config: Any = getattr(model, "config", ModelConfig)
    if lora:
        return f"the checkpoint was made without LoRA: {config.WITHOUT_LORA}"
    return f"check the {config.LEARNS_BY} settings that the checkpoint was made with"


_OTHERS = {
    "mm_projector": "LLaVA", "multi_modal_projector": "LLaVA", "llama_proj": "MiniGPT-4",
    "opt_proj": "BLIP-2", "t5_proj": "BLIP-2",
}  # fmt: skip


def _whose(names: Sequence[str]) -> str:
    """Whose names these are, none of which is ours."""
    if names and set(names) <= {"weight", "bias"}:
        return "it holds a bare layer: name its tensors llm_proj.weight and llm_proj.bias"
    for name in names:
        if project := next((p for part, p in _OTHERS.items() if part in name.split(".")), None):
            return f"it holds {name}, as {project} does, whose projection fits no model of ours"
    return f"it holds {', '.join(names[:4])}" if names else ""
