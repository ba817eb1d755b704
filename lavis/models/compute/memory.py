"""How much of a language model's activations fits into memory."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from lavis.common.schema import RunConfig

logger = logging.getLogger(__name__)
_PROBE = 64  # tokens
_RESERVE = 0.15  # of the free memory: the head's pieces, the encoder, fragmentation


def layers_to_recompute(
    run: RunConfig,
    model: Any,
    device: torch.device | None = None,
    reserved: float = 0,
    free: float | None = None,
) -> str | int:
    """``none``, ``all`` or ``n`` (every n-th layer): as little as the memory budget allows.

    The budget is ``run.memory_budget_gb``, or most of what is free now. The need is counted for
    the largest micro-batch that the run may see.

    Args:
        device: where it computes; by default where the model is.
        reserved: bytes of what is free that something else is going to need.
        free: bytes; by default what is free on the device now.
    """
    if run.memory_budget_gb is not None:
        budget = run.memory_budget_gb * 1e9
    else:
        free = free_memory(device or model.device) if free is None else free
        budget = (free - reserved) * (1 - _RESERVE)
    tokens = run.max_tokens_per_batch or run.batch_size_train * model.encoder.max_txt_len
    kept, entry = activation_bytes(model.language.model)
    blocks = list(model.language.blocks())
    kept, depth = kept + learned_bytes(blocks[0]), len(blocks)
    choice = _fewest(depth, budget, tokens * kept, tokens * entry)
    logger.info(
        "activations: %.1f GB for %d tokens if all %d layers are kept, %.1f GB may be used: "
        "recompute %s",
        depth * tokens * kept / 1e9, tokens, depth, budget / 1e9, choice,
    )  # fmt: skip
    return choice


def _fewest(depth: int, budget: float, kept: float, entry: float) -> str | int:
    """The fewest recomputed layers. Such a layer keeps its entry; when it is computed again, those
    after it are done with, so that only a last one adds to the peak."""
    if depth * kept <= budget:
        return "none"
    for n in range(depth, 1, -1):
        again = -(-depth // n)
        last = (depth - 1) % n == 0
        if (depth - again + last) * kept + again * entry <= budget:
            return n
    return "all"


def activation_bytes(llm: nn.Module) -> tuple[float, float]:
    """Bytes a token that a frozen layer saves for the backward pass, and those of its entry alone.

    Counted on a layer without data.
    """
    config: Any = llm.config
    dtype = next(llm.parameters()).dtype
    with torch.device("meta"):
        probe = Qwen2DecoderLayer(config, 0).to(dtype).requires_grad_(False)
        x = torch.empty(1, _PROBE, config.hidden_size, dtype=dtype, requires_grad=True)
        cos = torch.empty(1, _PROBE, probe.self_attn.head_dim, dtype=dtype)
    saved: dict[int, int] = {}
    parameters = {p.untyped_storage()._cdata for p in probe.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage.nbytes()
        keep.append(tensor)  # so that no other storage gets its address
        return tensor

    keep: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        probe(x, position_embeddings=(cos, cos), attention_mask=None)
    return sum(saved.values()) / _PROBE, x.nbytes / _PROBE


def learned_bytes(block: nn.Module) -> float:
    """Bytes a token that a layer saves beside :func:`activation_bytes`, as parts of it learn.

    A matrix that learns keeps its input; those that stand side by side share one, unless dropout
    gives each its own. Adapters (PEFT's layers) also keep what is between their two matrices, and
    with DoRA what the frozen matrix gives.
    """
    size, total, shared = next(block.parameters()).itemsize, 0.0, 0
    for name, module in block.named_modules():
        adapted = hasattr(module, "lora_A")
        learns = isinstance(module, nn.Linear) and module.weight.requires_grad
        if ".lora_" in name or not (adapted or learns):
            continue
        drops = adapted and any(getattr(d, "p", 0.0) for d in module.lora_dropout.values())
        if drops:
            total += module.in_features * (size + 1)  # and what was dropped
        elif module.in_features != shared:
            total += module.in_features * size
            shared = module.in_features
        if adapted:
            total += 4 * sum(down.out_features for down in module.lora_A.values())
            total += module.out_features * size * len(module.lora_magnitude_vector)
    return total


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
        fields = dict(line.split(":") for line in file)
    return float(fields["MemAvailable"].split()[0]) * 1024
