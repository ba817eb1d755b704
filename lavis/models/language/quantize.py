"""Language models whose layers hold their weights in few bits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.integrations.gguf.dequant import GGML_BLOCK, GGML_NAME
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    read_field,
)

from lavis.common.errors import ConfigError, WeightsError
from lavis.models.compute.quantized_linear import KINDS, GgufLinear, QuantizedLinear
from lavis.models.language.causal import CausalLM

logger = logging.getLogger(__name__)
_WITHOUT = "leave model.language.quantize out, and the file is unpacked when it is read"
Pack = Callable[[str, nn.Linear], QuantizedLinear | None]


def quantize(
    llm: CausalLM, kind: str, *, device: torch.device, dtype: torch.dtype | None
) -> CausalLM:
    """Quantize the linear layers of all blocks; embeddings, head, norms and biases stay.

    Weights go to the device one at a time: those of a mapped file are never all in memory.

    Args:
        llm: on the CPU.
        kind: ``nf4`` or ``int8``.
        dtype: of what stays; ``None``: as it is.

    Raises:
        ConfigError: most weights are in none of those layers.
    """
    make = KINDS[kind]
    replace_linears(llm, lambda name, linear: make.of(linear, device), kind)
    stored = llm.head.weight.dtype
    for parameter in llm.parameters():
        if dtype is not None and parameter.dtype == stored:  # not what its family keeps in fp32
            parameter.data = parameter.data.to(dtype)
    return llm.to(device)


def replace_linears(llm: CausalLM, pack: Pack, kind: str) -> None:
    """Put packed layers in the place of the blocks' linear layers.

    Args:
        pack: of a weight's name and its layer; ``None`` leaves the layer.

    Raises:
        ConfigError: as :func:`quantize`.
    """
    total = require_linears(llm, kind)
    packed = 0
    for name, linear in linears(llm).items():
        if new := pack(f"{name}.weight", linear):
            llm.model.set_submodule(name, new)
            packed += new.in_features * new.out_features
    logger.info("quantize: %s: %.1f %% of the layers' weights", kind, 100 * packed / total)


def linears(llm: CausalLM) -> dict[str, nn.Linear]:
    """The linear layers of all blocks, by name."""
    inside = {m for block in llm.blocks() for m in block.modules() if type(m) is nn.Linear}
    return {n: m for n, m in llm.model.named_modules() if m in inside}


def require_linears(llm: CausalLM, kind: str) -> int:
    """The number of weights of all blocks, most of which have to be in linear layers.

    Raises:
        ConfigError: they are not.
    """
    total = sum(p.numel() for block in llm.blocks() for p in block.parameters())
    inside = sum(m.weight.numel() for m in linears(llm).values())
    if 2 * inside < total:
        raise ConfigError(
            f"model.language.quantize: {kind} packs linear layers, which have only {inside:,} of "
            f"the {total:,} weights in {type(llm.model).__name__}'s blocks (a mixture's experts "
            "are none)"
        )
    return total


@dataclass(frozen=True)
class PackedFile:
    """A ``.gguf`` file whose blocks stay packed.

    Attributes:
        weights: what is not packed, by the model's names, and a placeholder without memory for
            each weight that is.
        blocks: (out, bytes) rows of blocks, on the CPU, and their type.
    """

    weights: dict[str, Tensor]
    blocks: dict[str, tuple[Tensor, int]]

    @classmethod
    def read(cls, path: Path, skeleton: CausalLM, dtype: torch.dtype) -> PackedFile:
        """Map a file.

        Args:
            skeleton: the model without numbers.
            dtype: of what is not packed.

        Raises:
            ConfigError: a weight's type, or the family, cannot be kept; or nothing is packed.
            WeightsError: a weight has another shape.
        """
        from gguf import GGUFReader, dequantize

        require_linears(skeleton, "gguf")
        reader = GGUFReader(path, "c")  # mapped; PyTorch warns of arrays that cannot be written
        architecture = read_field(reader, "general.architecture")[0]
        if is_gguf_arch_supported(architecture):  # by another reader, with other names
            raise ConfigError(f"{path}: {architecture} cannot be kept packed; {_WITHOUT}")
        sizes: dict[str, Any] = skeleton.model.config.to_dict()
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=sizes)
        names = get_gguf_hf_weights_map(skeleton.model, processor)
        layers = {f"{n}.weight": m for n, m in linears(skeleton).items()}
        weights: dict[str, Tensor] = {}
        blocks: dict[str, tuple[Tensor, int]] = {}
        for tensor in reader.tensors:
            name = names.get(tensor.name)
            if name in layers and _is_blocks(tensor):
                shape = layers[name].weight.shape
                blocks[name] = _rows(path, tensor, shape, processor), int(tensor.tensor_type)
                weights[name] = torch.zeros((), dtype=dtype).expand(shape)
                continue
            dense = dequantize(tensor.data, tensor.tensor_type)
            done = processor.process(
                dense, tensor.name, tensor_key_mapping=names, parsed_parameters={"tensors": weights}
            )
            if done.name in names:
                weights[names[done.name]] = torch.from_numpy(np.copy(done.weights)).to(dtype)
        if not blocks:
            raise ConfigError(f"{path}: no layer's weight is stored in blocks; {_WITHOUT}")
        return cls(weights, blocks)

    def fill(self, llm: CausalLM) -> None:
        """Put the blocks in the place of the placeholders."""

        def pack(name: str, linear: nn.Linear) -> GgufLinear | None:
            if name not in self.blocks:
                return None
            rows, kind = self.blocks[name]
            return GgufLinear((linear.out_features, linear.in_features), linear.bias, kind, rows)

        replace_linears(llm, pack, "gguf")


def _is_blocks(tensor: Any) -> bool:
    from gguf import GGML_QUANT_SIZES

    return bool(GGML_QUANT_SIZES[tensor.tensor_type][0] > 1)


def _rows(path: Path, tensor: Any, shape: torch.Size, processor: TensorProcessor) -> Tensor:
    """(out, bytes) of a weight, in the model's order: converters to GGUF permute some rows."""
    if tensor.tensor_type not in GGML_BLOCK:
        raise ConfigError(
            f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}; only "
            f"{', '.join(sorted(GGML_NAME.values()))} are kept packed. {_WITHOUT}"
        )
    if tuple(reversed(tensor.shape.tolist())) != shape:
        raise WeightsError(f"{path}: {tensor.name} has not the shape {tuple(shape)}")
    order = processor.process(np.arange(shape[0])[:, None], tensor.name).weights[:, 0]
    as_stored = bool((order == np.arange(shape[0])).all())
    return torch.from_numpy(tensor.data if as_stored else tensor.data[order])
