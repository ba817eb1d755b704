"""Random weights of the real sizes in the original's layout.

Names and shapes come from the model itself, built on the meta device, and from the key tables.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis.common.errors import LavisError

if TYPE_CHECKING:
    from torch import Tensor

    Files = dict[str, dict[str, Tensor]]  # path under the folder -> names -> meta tensors

QWEN_7B_CHAT: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "bf16": True,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 32768,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": 151936,
}
LLM = "ckpt/Qwen7B-chat"
MARKER = "full_size.json"  # says that a folder is ours, and whether it is complete


@dataclass(frozen=True)
class Shape:
    """Sizes of a run.

    Attributes:
        options: ``model.*`` overrides of the default configuration.
        llm: over Qwen-7B-Chat's ``config.json``.
        shards: files of the language model.
        matrix: side of the square matrices of the speed measurement.
    """

    options: tuple[str, ...] = ()
    llm: tuple[tuple[str, int], ...] = ()
    shards: int = 8
    matrix: int = 4096


SHAPES = {
    "full": Shape(),
    "medium": Shape(
        options=("model.vit_config={depth: 4}",),
        llm=(
            ("hidden_size", 1536), ("intermediate_size", 8192), ("kv_channels", 96),
            ("num_attention_heads", 16), ("num_hidden_layers", 12),
        ),
        shards=4,
    ),
    "tiny": Shape(
        options=(
            "model.image_size=56",
            "model.vit_config={embed_dim: 88, depth: 2, num_heads: 4}",
            "model.qformer_config={hidden_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
            "intermediate_size: 96}",
        ),
        llm=(
            ("hidden_size", 32), ("intermediate_size", 128), ("kv_channels", 8),
            ("num_attention_heads", 4), ("num_hidden_layers", 2),
        ),
        shards=2,
        matrix=256,
    ),
}  # fmt: skip


def model_options(shape: Shape, root: Path) -> list[str]:
    """``--options`` that load the weights under ``root``."""
    return [f"env.cache_root={root}", "model.vit_precision=bf16", *shape.options]


def vocabulary() -> Path:
    """The full Qwen vocabulary, which the PyPI package ``dashscope`` ships.

    Raises:
        LavisError: the package is not installed.
    """
    spec = importlib.util.find_spec("dashscope")  # without importing it
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / "resources" / "qwen.tiktoken").is_file():
            return path
    raise LavisError("the vocabulary comes with a package that is missing: pip install dashscope")


def layout(shape: Shape, root: Path) -> Files:
    """What the original's three weight files hold, as meta tensors.

    ``config.json`` and the vocabulary must be in place.
    """
    import torch

    from lavis.common.config import default_model_config
    from lavis.models import MiniGPT4QwenConfig
    from lavis.models.build import MiniGPT4Qwen

    options = model_options(shape, root)
    config = default_model_config("minigpt4qwen", "qwen7b_chat", options).model
    assert isinstance(config, MiniGPT4QwenConfig)
    nothing = replace(config, from_scratch=("vit", "qformer", "llm"))
    model = MiniGPT4Qwen.from_config(nothing, cache_root=str(root), device="meta")
    state = model.key_map.to_original(model.state_dict())

    def part(prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            k.removeprefix(prefix): v.to(dtype) for k, v in state.items() if k.startswith(prefix)
        }

    depth = config.vit_config.depth
    vit = part("visual_encoder.", torch.float16)
    last = f"blocks.{depth - 1}."
    vit |= {k.replace(last, f"blocks.{depth}."): vit[k] for k in vit if k.startswith(last)}
    qformer = {k: v.float() for k, v in state.items() if k.startswith(("query", "ln_vis", "Qform"))}
    return {
        "ckpt/eva/eva_vit_g.pth": vit,
        "ckpt/blip2/blip2_pretrained_flant5xxl.pth": qformer | unused(qformer),
        **shards(part("llm_model.", torch.bfloat16), shape.shards),
    }


def unused(qformer: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a BLIP-2 file holds beside the query branch: the text branch and the T5 projection."""
    import torch

    width, vocab, positions, t5 = qformer["query_tokens"].shape[-1], 30523, 512, 4096
    bert, cls = "Qformer.bert.embeddings", "Qformer.cls.predictions"
    shapes = {
        f"{bert}.word_embeddings.weight": (vocab, width),
        f"{bert}.position_embeddings.weight": (positions, width),
        f"{cls}.transform.dense.weight": (width, width),
        f"{cls}.decoder.weight": (vocab, width),
        f"{cls}.bias": (vocab,),
        "t5_proj.weight": (t5, width),
        "t5_proj.bias": (t5,),
    }
    text = {k.replace("_query", ""): v for k, v in qformer.items() if "_query." in k}
    made = {k: torch.empty(v, device="meta") for k, v in shapes.items()}
    ids = torch.empty(1, positions, dtype=torch.int64, device="meta")
    return text | made | {f"{bert}.position_ids": ids}


def shards(state: dict[str, Tensor], count: int) -> Files:
    """Cut a state dict into at most ``count`` files of about equal size, in order."""
    total = sum(t.nbytes for t in state.values())
    parts: dict[int, dict[str, Tensor]] = {}
    done = 0
    for name, tensor in state.items():
        parts.setdefault(done * count // total, {})[name] = tensor
        done += tensor.nbytes
    return {
        f"{LLM}/model-{number:05}-of-{len(parts):05}.safetensors": part
        for number, part in enumerate(parts.values(), start=1)
    }


def claim(shape_name: str, root: Path) -> bool:
    """Prepare a folder for weights.

    Returns:
        Whether they must be written: complete ones are there otherwise.

    Raises:
        LavisError: the folder holds somebody else's weights.
    """
    marker = root / MARKER
    if marker.is_file() and json.loads(marker.read_text()) == {shape_name: "complete"}:
        return False
    if (root / "ckpt").exists() and not marker.is_file():
        raise LavisError(f"{root} holds weights that this script did not write: choose another")
    root.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({shape_name: "incomplete"}))
    return True


def write_weights(shape_name: str, root: Path) -> None:
    """Fill a claimed folder with random weights, one file in memory at a time.

    Raises:
        LavisError: the disk is too small.
    """
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm

    shape = SHAPES[shape_name]
    shutil.rmtree(root / "ckpt", ignore_errors=True)
    (root / LLM).mkdir(parents=True)
    (root / LLM / "config.json").write_text(json.dumps(QWEN_7B_CHAT | dict(shape.llm), indent=2))
    shutil.copyfile(vocabulary(), root / LLM / "qwen.tiktoken")
    files = layout(shape, root)
    needed = sum(t.nbytes for names in files.values() for t in names.values())
    free = shutil.disk_usage(root).free
    if free < 1.01 * needed:
        raise LavisError(
            f"{root} has {free / 1e9:.2f} GB free and the weights take {needed / 1e9:.2f} GB: "
            "choose another place with --dir"
        )
    weight_map = {n: Path(f).name for f, names in files.items() if f.startswith(LLM) for n in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (root / LLM / "model.safetensors.index.json").write_text(json.dumps(index))
    # Its length is prime: rows of a matrix differ although the block is repeated.
    block = torch.randn(1_048_583, generator=torch.Generator().manual_seed(0)) * 0.02
    with tqdm(total=needed, unit="B", unit_scale=True, desc="writing", mininterval=1) as bar:
        for relative, names in files.items():
            path = root / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {name: fill(name, like, block) for name, like in names.items()}
            if path.suffix == ".pth":
                torch.save({"model": tensors} if "blip2" in relative else tensors, path)
            else:
                save_file(tensors, path)
            bar.update(sum(t.nbytes for t in tensors.values()))
            del tensors  # before the next file's are made
            forget(path)
    (root / MARKER).write_text(json.dumps({shape_name: "complete"}))


def fill(name: str, like: Tensor, block: Tensor) -> Tensor:
    """A tensor of the shape and type of ``like``: norms 1, the rest cut from a random block."""
    import torch

    if not like.is_floating_point():
        return torch.arange(like.numel(), dtype=like.dtype).view(like.shape)
    if like.ndim == 1 and name.endswith("weight"):
        return torch.ones(like.shape, dtype=like.dtype)
    block = block.roll(zlib.crc32(name.encode()) % len(block)).to(like.dtype)
    whole, rest = divmod(like.numel(), len(block))
    flat = torch.empty(like.numel(), dtype=like.dtype)
    flat[: whole * len(block)].view(whole, len(block)).copy_(block)
    flat[whole * len(block) :] = block[:rest]
    return flat.view(like.shape)


def forget(path: Path) -> None:
    """Write a file out and drop it from the page cache, so that reading it is reading the disk."""
    with path.open("rb+") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
