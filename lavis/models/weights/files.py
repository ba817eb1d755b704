"""Read weight files: memory-mapped, matched key by key, straight to their final place.

A frozen tensor whose type and device already fit is not copied at all: it stays a view of the
mapped file, so that loading a 15 GB model takes no second 15 GB and pages come in as they are used.
What is going to be sharded stays such a view altogether, until each process copies its slice of it.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lavis.common.errors import WeightsError, listed
from lavis.models.weights.original import KeyMap
from lavis.models.weights.shards import find_shards

logger = logging.getLogger(__name__)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class WeightFile(Mapping[str, Tensor]):
    """Tensors by name, from one file or several shards, read when they are asked for."""

    def __init__(self, label: str, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
        self.label = label
        self._tensors = tensors

    @classmethod
    def of(cls, label: str, tensors: Mapping[str, Tensor]) -> WeightFile:
        """Wrap tensors that are already open."""
        return cls(label, {k: partial(tensors.__getitem__, k) for k in tensors})

    def only(self, names: Iterable[str]) -> WeightFile:
        """These of its tensors."""
        return WeightFile(self.label, {name: self._tensors[name] for name in names})

    def __getitem__(self, key: str) -> Tensor:
        try:
            return self._tensors[key]()
        except SafetensorError as error:
            raise WeightsError(f"{self.label}: {key} cannot be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def load_pickle(path: Path) -> object:
    """Read a ``.pth`` or ``.bin`` file without running any code it may hold.

    Raises:
        WeightsError: the file is damaged, or holds more than tensors and plain values.
    """
    try:
        return _load(path)
    except Exception as error:
        if (kind := _kind(path)) is not None:
            raise WeightsError(f"{path} is {kind}") from error
        if isinstance(error, pickle.UnpicklingError):
            raise WeightsError(
                f"{path} is refused: it holds Python objects other than tensors and plain values, "
                f"which could run code when loaded, or it is damaged ({_reason(error)})"
            ) from error
        raise WeightsError(
            f"{path} is damaged or no PyTorch file ({path.stat().st_size:,} bytes): "
            f"{_reason(error)}. Download it again"
        ) from error


def _load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):  # files of PyTorch < 1.6 cannot be mapped
            raise
    return torch.load(path, map_location="cpu", weights_only=True)


_KINDS = {
    rb"\Z": "damaged: it is empty (0 bytes). Copy or download it again",
    rb"version https://git-lfs": "a Git LFS pointer; fetch the file behind it with: git lfs pull",
    rb"GGUF": "a GGUF file, as llama.cpp reads it; a .pth file is needed",
    rb".{7}\0\{": "a safetensors file; a checkpoint is a .pth file: torch.save({'model': "
    "safetensors.torch.load_file(this file)}, 'checkpoint.pth') makes one",
    rb"PK\x03\x04(?=.{26})(?!.{26}[^/]+/data\.pkl)": "a ZIP archive, not what torch.save writes",
    rb"(?i)\s*<(!doctype\s+)?html": "an HTML page, not the file that it offers; download that",
    rb"[^\0-\x08\x0e-\x1f\x7f]+\Z": "a text file, not what torch.save writes",
}
"""How files begin that PyTorch cannot read, what they are and what to do."""


def _kind(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(512)
    kinds = (kind for begin, kind in _KINDS.items() if re.match(begin, head, re.DOTALL))
    return next(kinds, None)


def open_pth(path: Path) -> WeightFile:
    """Open a ``.pth``: a bare state dict, or one under ``"model"``."""
    return state_dict_in(path, load_pickle(path))


def state_dict_in(label: object, content: object) -> WeightFile:
    """The state dict in what a ``.pth`` holds: all of it, or what is under ``"model"``.

    What DistributedDataParallel and ``torch.compile`` put before every name is taken off.

    Raises:
        WeightsError: there is none; the message says what is there.
    """
    state = content
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        state = content["model"]
    if not is_state_dict(state):
        raise WeightsError(f"{label} holds no state dict (names and tensors) but {outline(state)}")
    prefixes = {_WRAPPERS.match(name)[0] for name in state}  # type: ignore[index]
    if len(prefixes) == 1 and (prefix := prefixes.pop()):
        logger.info("%s: the names are read without their %r", label, prefix)
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return WeightFile.of(str(label), state)


_WRAPPERS = re.compile(r"((module|_orig_mod)\.)*")


def outline(content: object) -> str:
    """What a file holds, in a few words."""
    if isinstance(content, dict):
        entries = [f"{k} ({type(v).__name__})" for k, v in content.items()]
        return f"a dictionary of {len(entries)}: {listed(entries)}"
    shape = f" of shape {tuple(content.shape)}" if isinstance(content, Tensor) else ""
    return f"one {type(content).__name__}{shape}"


def is_state_dict(value: object) -> TypeGuard[dict[str, Tensor]]:
    """Whether a value is a mapping of names to tensors."""
    return isinstance(value, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()
    )


def open_shards(folder: Path) -> WeightFile:
    """Open a language model's weights."""
    tensors: dict[str, Callable[[], Tensor]] = {}
    for shard in find_shards(folder):
        opened = open_shard(shard)
        for key in opened:
            if key in tensors:
                raise WeightsError(f"{shard}: {key} stands in another file of {folder} too")
            tensors[key] = partial(opened.__getitem__, key)
    return WeightFile(str(folder), tensors)


def open_shard(path: Path) -> WeightFile:
    """Open one file of several, of either format."""
    return _open_safetensors(path) if path.suffix == ".safetensors" else open_pth(path)


def _open_safetensors(path: Path) -> WeightFile:
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is damaged or cut short ({path.stat().st_size:,} bytes): {error}. "
            "Download it again"
        ) from error
    return WeightFile(str(path), {k: partial(handle.get_tensor, k) for k in handle.keys()})  # noqa: SIM118


def load_weights(
    module: nn.Module,
    source: WeightFile,
    key_map: KeyMap,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    mapped: bool = False,
    select: Callable[[str], bool] = lambda name: True,
    adapt: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
    extra_dropped: Callable[[str], bool] = lambda name: False,
) -> None:
    """Fill a module that was built on the meta device.

    Args:
        module: every selected parameter and persistent buffer is replaced.
        source: the file.
        key_map: how names relate; every name on either side must be accounted for.
        dtype: of floating-point tensors; ``None``: the one that most of the file's numbers have.
        mapped: leave the tensors in the file, in its types; see :func:`final_dtype`.
        select: which of the module's names to fill.
        adapt: changes a tensor before its shape is checked (position embeddings).
        extra_dropped: names in the file that this model does not use, beyond the table's.

    Raises:
        WeightsError: names that are missing or left over, or shapes that differ, all listed; or
            numbers that need a scale (quantized weights).
    """
    targets = {n: t for n, t in module.state_dict(keep_vars=True).items() if select(n)}
    wanted = {name: key_map.source(name) for name in targets}
    _check_names(source, {s.key for s in wanted.values()}, key_map, extra_dropped)
    loaded: dict[str, Tensor] = {}
    misfits: dict[str, str] = {}
    for name, key in wanted.items():
        tensor = adapt(key.key, source[key.key])
        if tensor.shape != (shape := key.whole(targets[name].shape)):
            misfits[key.key] = f"{key.key} {tuple(tensor.shape)}, not {shape}"
            continue
        if targets[name].is_floating_point():
            require_float(source.label, key.key, tensor)
        loaded[name] = key.cut(tensor)
    if misfits:
        wrong = listed(list(misfits.values()), "; ")
        raise WeightsError(f"{source.label} has tensors of another shape: {wrong}")
    dtype = dtype or usual_dtype(source.label, loaded.values())
    for name, tensor in loaded.items() if not mapped else ():
        loaded[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    module.load_state_dict(loaded, strict=False, assign=True)
    if mapped:
        set_final_dtype((p for n, p in module.named_parameters() if n in loaded), dtype)


def set_final_dtype(parameters: Iterable[nn.Parameter], dtype: torch.dtype | None) -> None:
    """Say what parameters that are left in a file become when they are sharded."""
    for parameter in parameters:
        parameter.final_dtype = dtype or parameter.dtype  # type: ignore[attr-defined]


def final_dtype(parameter: Tensor) -> torch.dtype:
    """The type that a parameter has in training, which a mapped one is not in yet."""
    dtype: torch.dtype = getattr(parameter, "final_dtype", parameter.dtype)
    return dtype


def _check_names(
    source: WeightFile, used: set[str], key_map: KeyMap, extra_dropped: Callable[[str], bool]
) -> None:
    """Refuse a file that lacks a name, or has one that nothing accounts for."""
    missing = sorted(used - set(source))
    unused = (key for key in source if key not in used)
    left_over = [key for key in unused if not (key_map.is_dropped(key) or extra_dropped(key))]
    parts = (("missing", missing), ("not part of the model", left_over))
    wrong = [f"{len(names)} {what}: {listed(names)}" for what, names in parts if names]
    if wrong:
        raise WeightsError(f"{source.label} does not fit: {'; '.join(wrong)}")


def require_float(label: str, name: str, tensor: Tensor) -> None:
    """Refuse numbers that need a scale.

    Raises:
        WeightsError: the tensor is quantized.
    """
    if tensor.dtype not in _FLOATS:
        raise WeightsError(
            f"{label}: {name} is stored as {tensor.dtype}: quantized weights are not supported; "
            "take the model in half precision"
        )


def usual_dtype(label: str, tensors: Iterable[Tensor]) -> torch.dtype:
    """The type that most numbers are stored in, or fp32 if that is fp64."""
    count: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        count[tensor.dtype] += tensor.numel() * tensor.is_floating_point()
    usual = max(count, key=lambda dtype: count[dtype], default=torch.float32)
    usual = torch.float32 if usual == torch.float64 else usual
    if others := sorted(str(d) for d, n in count.items() if n and d != usual):
        logger.info("%s: %s weights are turned into %s", label, ", ".join(others), usual)
    return usual


def own_trainable(module: nn.Module) -> None:
    """Copy trainable parameters out of the mapped file, since an optimizer writes to them."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()


def _reason(error: BaseException) -> str:
    """What is wrong, without PyTorch's advice on how to load the file all the same."""
    paragraphs = [p.strip() for p in str(error).split("\n\n") if p.strip()]
    if len(paragraphs) > 1 and paragraphs[0].startswith("Weights only load failed"):
        del paragraphs[0]
    return (
        re.split(r"\.\s|\n", paragraphs[0])[0].rstrip(".")[:200]
        if paragraphs
        else type(error).__name__
    )
