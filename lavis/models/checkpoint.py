"""The model's part of a checkpoint, in the original's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from lavis.common.errors import WeightsError
from lavis.common.registry import did_you_mean
from lavis.models.keys import KeyMap, Rule
from lavis.models.weights import WeightFile, open_pth

_SAME_NAMES = KeyMap((Rule("*", ("*",)),))


def _key_map(model: nn.Module) -> KeyMap:
    """How a model's names relate to those in its files: its ``key_map``, if it has one."""
    return getattr(model, "key_map", _SAME_NAMES)


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


def load_model_state(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint's ``model`` entry into a model, in place.

    Raises:
        WeightsError: the file is missing or damaged, a name is not part of the model, something
            that is trained here is missing, or a shape differs. The model is then unchanged.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no checkpoint {path}")
    assign_model_state(model, open_pth(path))


def assign_model_state(model: nn.Module, file: WeightFile) -> None:
    """Copy a checkpoint's tensors into a model's parameters.

    Raises:
        WeightsError: as :func:`load_model_state`.
    """
    names = _key_map(model)
    used: set[str] = set()
    new: list[tuple[nn.Parameter, Tensor]] = []
    for name, parameter in model.named_parameters():
        source = names.source(name)
        if source.key not in file:
            if parameter.requires_grad:
                raise WeightsError(
                    f"{file.label} lacks {source.key}, which is trained with this configuration; "
                    "check the freeze_* and get_lora settings that the checkpoint was made with"
                )
            continue
        used.add(source.key)
        tensor = file[source.key]
        if tensor.shape != (shape := source.whole(parameter.shape)):
            raise WeightsError(
                f"{file.label}: {source.key} has shape {tuple(tensor.shape)}, the model "
                f"{shape}: the checkpoint belongs to other encoder or LLM sizes"
            )
        new.append((parameter, source.cut(tensor)))
    left_over = [key for key in file if key not in used]
    if left_over:
        known = [names.source(n).key for n, _ in model.named_parameters()]
        raise WeightsError(
            f"{file.label} holds {len(left_over)} tensors that are not part of this model: "
            f"{', '.join(left_over[:8])}{did_you_mean(left_over[0], known)}"
        )
    for parameter, tensor in new:
        parameter.data = tensor.to(parameter.device, parameter.dtype, copy=True)
