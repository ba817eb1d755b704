"""Weight files: missing, damaged, unfit, hostile, or laid out in another way."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from lavis.common.errors import ConfigError, WeightsError
from lavis.models.language.qwen1 import read_spec
from lavis.models.vision.eva import interpolate_pos_embed
from tests.models.conftest import BLIP, LLM, SHARDS, VIT, Load, one_batch, refusal

BERT = "bert-base-uncased/config.json"


def edit_pth(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=True)
    torch.save(change(content), path)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


# --- files that are not there ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (VIT, "model.vit_weights"),
        (BLIP, "model.pretrained"),
        (f"{LLM}/config.json", "model.llm_model"),
        (f"{LLM}/qwen.tiktoken", "model.llm_model"),
    ],
)
def test_missing_file_is_found_before_any_read(ckpt: Path, load: Load, name: str, key: str) -> None:
    for other in (VIT, BLIP, BERT, *SHARDS, f"{LLM}/qwen.tiktoken"):
        (ckpt / other).write_bytes(b"whoever reads this fails otherwise")
    (ckpt / name).unlink()
    assert refusal(load) == (
        f"{key}: no file {ckpt / name} (the nearest existing folder is {(ckpt / name).parent}). "
        f"Put it there, set {key}, or point env.cache_root at the folder that holds your weights "
        "and data"
    )


def test_missing_shard_is_found_before_any_read(ckpt: Path, load: Load) -> None:
    for other in (VIT, BLIP, *SHARDS):
        (ckpt / other).write_bytes(b"whoever reads this fails otherwise")
    (ckpt / SHARDS[1]).unlink()
    assert refusal(load) == (
        f"{ckpt / LLM / 'model.safetensors.index.json'} names 3 files, 1 of them missing: "
        "model-00002-of-00003.safetensors"
    )


def test_no_weights_at_all(ckpt: Path, load: Load) -> None:
    for path in (ckpt / LLM).glob("model*"):
        path.unlink()
    save_file({"x": torch.ones(1)}, ckpt / LLM / "adapter.safetensors")
    assert refusal(load) == (
        f"model.llm_model: {ckpt / LLM} holds neither model*.safetensors nor pytorch_model*.bin"
    )


def test_missing_folder_names_the_nearest(load: Load, ckpt: Path) -> None:
    assert refusal(load, "model.llm_model=ckpt/Qwen8B/chat").startswith(
        f"model.llm_model: no folder {ckpt / 'Qwen8B' / 'chat'} "
        f"(the nearest existing folder is {ckpt}). "
    )


def test_folder_in_place_of_a_file_and_the_reverse(load: Load, ckpt: Path) -> None:
    assert refusal(load, "model.vit_weights=ckpt/eva") == (
        f"model.vit_weights: {ckpt / 'eva'} is not a file"
    )
    assert refusal(load, f"model.llm_model=ckpt/{VIT}") == (
        f"model.llm_model: {ckpt / VIT} is not a folder"
    )


def test_missing_checkpoint_is_found_before_any_read(load: Load, ckpt: Path) -> None:
    (ckpt / VIT).write_bytes(b"whoever reads this fails otherwise")
    assert refusal(load, checkpoint=ckpt / "none.pth") == f"no checkpoint {ckpt / 'none.pth'}"
    assert refusal(load, "model.load_finetuned=true", "model.finetuned=none.pth").startswith(
        f"model.finetuned: no file {ckpt.parent / 'none.pth'}"
    )


# --- damaged files --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100, 300_000])
def test_truncated_safetensors(ckpt: Path, load: Load, size: int) -> None:
    cut(ckpt / SHARDS[0], size)
    message = refusal(load)
    assert message.startswith(f"{ckpt / SHARDS[0]} is damaged or cut short ({size:,} bytes): ")
    assert message.endswith("Download it again")


@pytest.mark.parametrize("size", [0, 5, 1_000_000])
@pytest.mark.parametrize("name", [VIT, BLIP])
def test_truncated_pth(ckpt: Path, load: Load, name: str, size: int) -> None:
    size = min(size, (ckpt / name).stat().st_size - 9)
    cut(ckpt / name, size)
    assert refusal(load).startswith(f"{ckpt / name} is damaged")


def _zip(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return buffer.getvalue()


@pytest.mark.parametrize("place", ["weights", "checkpoint"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "a Git LFS pointer; fetch "),
        (b"<html>", "an HTML page, not the file that it offers; download that"),
        (b"\n\n<!DOCTYPE HTML>\n<head>", "an HTML page, "),
        ("llm_proj: 权重\n".encode(), "a text file, not what torch.save writes"),
        (b'{"message": "not found"}', "a text file, "),
        (b"GGUF\x03\0\0\0", "a GGUF file, as llama.cpp reads it; a .pth file is needed"),
        (_zip("run/log.txt", "run/a.pth"), "a ZIP archive, not what "),
        (save({"llm_proj.weight": torch.ones(2)}), "a safetensors file; a checkpoint is a .pth "),
        (b"", "damaged: it is empty (0 bytes). Copy or download it again"),
        (b"\x80\x02\x8a\n\xff\xfe", "damaged or no PyTorch file (6 bytes): "),
        (b"abcdefgh{ab", "a text file, "),
        (_zip("c/data.pkl", "c/data/0")[:-30], "damaged or no PyTorch file ("),
    ],
)
def test_a_file_that_pytorch_cannot_read_is_named(
    ckpt: Path, load: Load, content: bytes, what: str, place: str
) -> None:
    path = ckpt / VIT if place == "weights" else ckpt / "c.pth"
    path.write_bytes(content)
    message = refusal(load, checkpoint=None if place == "weights" else path)
    if not content and place == "weights":  # found before any weight is read
        what = "damaged or cut short (0 bytes): it is empty. Download it again"
    assert message.startswith(f"{path} is {what}")


INDEX = f"{LLM}/model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    "name", [VIT, BLIP, SHARDS[2], INDEX, f"{LLM}/config.json", f"{LLM}/qwen.tiktoken"]
)
def test_downloads_that_did_not_end(ckpt: Path, load: Load, name: str) -> None:
    """Found before any weight is read: the others are no weights either."""
    for other in {VIT, BLIP, *SHARDS} - {name}:
        (ckpt / other).write_bytes(b"whoever reads this fails otherwise")
    path, whole = ckpt / name, (ckpt / name).read_bytes()
    path.write_bytes(POINTER)
    assert refusal(load) == (
        f"{path} is a Git LFS pointer; fetch the file behind it with: git lfs pull"
    )
    path.write_bytes(b"")
    assert refusal(load) == (
        f"{path} is damaged or cut short (0 bytes): it is empty. Download it again"
    )
    path.write_bytes(whole)
    for suffix in (".aria2", ".part", ".incomplete"):
        (rest := path.with_name(path.name + suffix)).touch()
        assert refusal(load) == (
            f"{rest}: the download of {path.name} has not ended; end it, or remove this file if it "
            "is old"
        )
        rest.unlink()


def test_a_shard_too_few_without_an_index(ckpt: Path, load: Load) -> None:
    (ckpt / INDEX).unlink()
    (ckpt / SHARDS[1]).unlink()
    assert refusal(load) == (
        f"{ckpt / LLM} holds 2 of 3 weight files: model-00001-of-00003.safetensors, "
        "model-00003-of-00003.safetensors"
    )


def test_links_that_lead_nowhere(ckpt: Path, load: Load) -> None:
    (ckpt / INDEX).unlink()
    (ckpt / SHARDS[0]).unlink()
    (ckpt / SHARDS[0]).symlink_to("blob")
    assert refusal(load) == f"{ckpt / SHARDS[0]} cannot be read: No such file or directory"


class Hostile:
    """Unpickling this makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("place", ["weights", "checkpoint"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    ckpt: Path, load: Load, tmp_path: Path, layout: str, place: str
) -> None:
    trace = tmp_path / "was_here"
    content = {"model": {"llm_proj.weight": Hostile(trace)}}
    path = ckpt / VIT if place == "weights" else tmp_path / "checkpoint.pth"
    if layout == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    message = refusal(load, checkpoint=None if place == "weights" else path)
    assert message.startswith(str(path))
    assert "could run code" in message
    assert "weights_only" not in message  # no advice to load it all the same
    assert not trace.exists()
    if layout != "pickle":  # the trap works where it is sprung
        torch.load(path, weights_only=False)
        assert trace.exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([1], "one list"),
        (3, "one int"),
        (torch.ones(2, 3), "one Tensor of shape (2, 3)"),
        ({"a": {"b": 1}}, "a dictionary of 1: a (dict)"),
        (
            {"state_dict": {"x": torch.ones(1)}, "step": 3},
            "a dictionary of 2: state_dict (dict), step (int)",
        ),
        ({"model": {"x": 3}}, "a dictionary of 1: x (int)"),
        ({1: torch.ones(1)}, "a dictionary of 1: 1 (Tensor)"),
    ],
)
def test_no_state_dict(ckpt: Path, load: Load, content: Any, what: str) -> None:
    torch.save(content, ckpt / VIT)
    assert refusal(load) == f"{ckpt / VIT} holds no state dict (names and tensors) but {what}"


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff", b'{"weight_map": [1]}'])
def test_damaged_index(ckpt: Path, load: Load, content: bytes) -> None:
    index = ckpt / LLM / "model.safetensors.index.json"
    index.write_bytes(content)
    assert refusal(load) == f"{index} is damaged: it has no weight_map of file names"


@pytest.mark.parametrize("name", [f"{LLM}/config.json", BERT])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"3"])
def test_damaged_config_json(ckpt: Path, load: Load, name: str, content: bytes) -> None:
    (ckpt / name).write_bytes(content)
    assert refusal(load).startswith(f"{ckpt / name} is not a JSON object: ")


# --- files that do not fit ------------------------------------------------------------------


def test_wrong_shape(ckpt: Path, load: Load) -> None:
    edit_pth(ckpt / VIT, lambda s: s | {"blocks.0.norm1.weight": torch.ones(3)})
    assert refusal(load) == (
        f"{ckpt / VIT} has tensors of another shape: blocks.0.norm1.weight (3,), not (88,)"
    )


def test_wrong_shape_of_a_joined_tensor(ckpt: Path, load: Load) -> None:
    shard = ckpt / SHARDS[1]
    for rows in (4, 189, 195):
        tensors = load_file(shard)
        tensors["transformer.h.1.attn.c_attn.bias"] = torch.ones(rows)
        save_file(tensors, shard)
        assert refusal(load) == (
            f"{ckpt / LLM} has tensors of another shape: transformer.h.1.attn.c_attn.bias "
            f"({rows},), not (192,)"
        )


def test_all_wrong_shapes_are_counted(load: Load) -> None:
    message = refusal(load, "model.vit_config.embed_dim=96")
    assert "cls_token (1, 1, 88), not (1, 1, 96); " in message
    assert message.endswith("; and 22 more")


def test_missing_keys(ckpt: Path, load: Load) -> None:
    edit_pth(ckpt / VIT, lambda s: {k: v for k, v in s.items() if not k.endswith("q_bias")})
    assert refusal(load) == (
        f"{ckpt / VIT} does not fit: 2 missing: blocks.0.attn.q_bias, blocks.1.attn.q_bias"
    )


def test_left_over_keys(ckpt: Path, load: Load) -> None:
    edit_pth(ckpt / BLIP, lambda s: {"model": s["model"] | {"Qformer.extra": torch.ones(1)}})
    assert refusal(load) == (f"{ckpt / BLIP} does not fit: 1 not part of the model: Qformer.extra")


def test_missing_and_left_over_keys_together(ckpt: Path, load: Load) -> None:
    edit_pth(
        ckpt / VIT,
        lambda s: {k.replace("norm1.weight", "norm_one.weight"): v for k, v in s.items()},
    )
    assert refusal(load) == (
        f"{ckpt / VIT} does not fit: 2 missing: blocks.0.norm1.weight, blocks.1.norm1.weight; "
        "2 not part of the model: blocks.0.norm_one.weight, blocks.1.norm_one.weight"
    )


def test_other_depth_of_the_language_model(ckpt: Path, load: Load) -> None:
    edit_json(ckpt / LLM / "config.json", num_hidden_layers=3)
    assert "8 missing: transformer.h.2.attn.c_attn.bias, " in refusal(load)
    edit_json(ckpt / LLM / "config.json", num_hidden_layers=1)
    assert "8 not part of the model: transformer.h.1.attn.c_attn.bias, " in refusal(load)


def test_the_same_tensor_in_two_files(ckpt: Path, load: Load) -> None:
    (ckpt / LLM / "model.safetensors.index.json").unlink()
    (ckpt / LLM / "model-copy.safetensors").write_bytes((ckpt / SHARDS[0]).read_bytes())
    assert refusal(load).endswith(
        f"transformer.wte.weight stands in another file of {ckpt / LLM} too"
    )


# --- other layouts of the same weights ------------------------------------------------------


def _state(model: Any) -> dict[str, Tensor]:
    """Copies of what comes from files: a loaded model is a view of them, and tests change them."""
    state = model.state_dict()
    return {name: t.clone() for name, t in state.items() if not name.startswith("connector.")}


def _equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_bin_files_load_the_same(ckpt: Path, load: Load) -> None:
    wanted = _state(load())
    names = {}
    for i, name in enumerate(SHARDS):
        tensors = load_file(ckpt / name)
        (ckpt / name).unlink()
        file = f"pytorch_model-0000{i + 1}-of-00003.bin"
        torch.save(tensors, ckpt / LLM / file)
        names |= dict.fromkeys(tensors, file)
    (ckpt / LLM / "model.safetensors.index.json").unlink()
    index = ckpt / LLM / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert _equal(_state(load()), wanted)
    (ckpt / LLM / file).unlink()
    assert refusal(load) == f"{index} names 3 files, 1 of them missing: {file}"


def test_files_of_old_pytorch_load_the_same(ckpt: Path, load: Load) -> None:
    wanted = _state(load())
    for name in (VIT, BLIP):
        content = torch.load(ckpt / name, weights_only=True)
        torch.save(content, ckpt / name, _use_new_zipfile_serialization=False)
    assert _equal(_state(load()), wanted)


def test_shards_without_an_index(ckpt: Path, load: Load) -> None:
    wanted = _state(load())
    (ckpt / LLM / "model.safetensors.index.json").unlink()
    assert _equal(_state(load()), wanted)


def test_extra_blocks_are_ignored_and_counted(
    ckpt: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = _state(load())

    def longer(state: dict[str, Tensor]) -> dict[str, Tensor]:
        extra = {
            k.replace("blocks.0.", f"blocks.{n}."): torch.full_like(v, 7)
            for k, v in state.items()
            if k.startswith("blocks.0.")
            for n in (2, 3, 10)
        }
        return state | extra | {"norm.weight": torch.ones(88), "head.bias": torch.ones(3)}

    edit_pth(ckpt / VIT, longer)
    with caplog.at_level(logging.INFO):
        assert _equal(_state(load()), wanted)
    assert "eva_vit_g.pth: 3 blocks past depth 2 are not used" in caplog.messages


def test_q_former_sizes_from_the_options(ckpt: Path, load: Load) -> None:
    wanted = _state(load())
    (ckpt / BERT).unlink()
    sizes = "{hidden_size: 48, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 96}"
    assert _equal(_state(load(f"model.qformer_config={sizes}")), wanted)
    assert "does not fit: " in refusal(load)  # BERT-base without the file


# --- position embeddings --------------------------------------------------------------------


def test_position_embeddings_of_another_grid(ckpt: Path, load: Load) -> None:
    """Five by five in the file, four by four in the model."""
    other = torch.full((1, 1 + 25, 88), 3.0)
    other[:, 0] = 7.0
    edit_pth(ckpt / VIT, lambda s: s | {"pos_embed": other})
    got = load().vision.visual_encoder.pos_embed
    assert got.shape == (1, 17, 88)
    assert torch.equal(got[:, 0], torch.full((1, 88), 7.0))
    assert (got[:, 1:] - 3.0).abs().max() < 1e-6


def test_another_image_size_uses_the_same_file(load: Load) -> None:
    sizes = ("train", "eval")
    model = load(
        "model.image_size=84", *(f"preprocess.vis_processor.{s}.image_size=84" for s in sizes)
    )
    assert model.vision.visual_encoder.pos_embed.shape == (1, 37, 88)
    with torch.no_grad():
        assert model.vision.encode_vit(torch.rand(2, 3, 84, 84)).shape == (2, 37, 88)


def test_interpolation_is_not_transposed() -> None:
    """A ramp along x stays one along x."""
    ramp = torch.arange(4.0).repeat(4, 1).reshape(1, 16, 1)
    pos_embed = torch.cat([torch.full((1, 1, 1), 9.0), ramp], 1)
    got = interpolate_pos_embed(pos_embed, 1 + 64)
    assert got[0, 0] == 9.0
    grid = got[0, 1:, 0].reshape(8, 8)
    assert torch.allclose(grid, grid[:1].expand(8, 8), atol=1e-5)
    assert (grid[0].diff() > 0).all()
    assert grid[0].mean() == pytest.approx(1.5, abs=1e-5)
    assert grid[0] + grid[0].flip(0) == pytest.approx(torch.full((8,), 3.0), abs=1e-5)


def test_the_same_grid_is_left_alone() -> None:
    pos_embed = torch.rand(1, 17, 3)
    assert interpolate_pos_embed(pos_embed, 17) is pos_embed


@pytest.mark.parametrize(("old", "new"), [(13, 17), (17, 13)])
def test_grids_that_are_not_square(old: int, new: int) -> None:
    with pytest.raises(WeightsError, match=f"pos_embed of {old} positions cannot be resized to"):
        interpolate_pos_embed(torch.rand(1, old, 3), new)


# --- the language model's configuration -----------------------------------------------------


def test_a_byte_order_mark_is_no_mistake(ckpt: Path, load: Load) -> None:
    wanted = _state(load())
    for name in (f"{LLM}/config.json", BERT, INDEX):
        (ckpt / name).write_bytes(b"\xef\xbb\xbf" + (ckpt / name).read_bytes())
    assert _equal(_state(load()), wanted)


QWEN = "first-generation Qwen such as Qwen-7B-Chat or Qwen-14B-Chat"


def test_a_folder_of_another_family(ckpt: Path, load: Load) -> None:
    """Its family is looked at before its vocabulary, and before any weight."""
    folder = ckpt / LLM
    (folder / "qwen.tiktoken").unlink()
    (ckpt / VIT).write_bytes(b"whoever reads this fails otherwise")
    config = folder / "config.json"
    config.write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    assert refusal(load) == (
        f"{config}: model_type is 'llama'; only 'qwen' is supported ({QWEN}). This model is "
        "['LlamaForCausalLM']"
    )
    config.write_text('{"architectures": ["GPT2LMHeadModel"]}')
    assert refusal(load).startswith(f"{config}: architectures is ['GPT2LMHeadModel']; only ['QWen")
    config.write_text('{"model_type": "qwen", "visual": {"layers": 48}}')
    assert refusal(load) == f"{config}: a model with a part of its own for visual; take a {QWEN}"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ("config.json", {"quantization_config": {"quant_method": "fp8"}}),
        ("config.json", {"compression_config": {"format": "pack-quantized"}}),
        ("quantize_config.json", {"bits": 4, "group_size": 128}),
        ("quant_config.json", {"zero_point": True, "w_bit": 4, "version": "GEMM"}),
    ],
)
def test_quantized_weights(ckpt: Path, load: Load, file: str, content: dict[str, Any]) -> None:
    (ckpt / VIT).write_bytes(b"whoever reads this fails otherwise")
    path = ckpt / LLM / file
    said = content.get("quantization_config") or content.get("compression_config") or content
    path.write_text(
        json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **content})
    )
    assert refusal(load) == (
        f"{ckpt / LLM}: the weights are quantized ({said}), which is not supported; take the model "
        "in half precision, such as Qwen-7B-Chat instead of Qwen-7B-Chat-Int4"
    )


def test_a_folder_beside_the_model(ckpt: Path, load: Load) -> None:
    hub = ckpt / "hub" / "models--Qwen--Qwen-7B-Chat"
    snapshot = hub / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    (ckpt / LLM).rename(snapshot)
    for folder in (hub, hub.parent, snapshot.parent):
        key = f"model.llm_model={folder.relative_to(ckpt.parent)}"
        assert refusal(load, key) == (
            f"model.llm_model: no file {folder / 'config.json'}; set model.llm_model to {snapshot}"
        )
    assert load(f"model.llm_model={snapshot.relative_to(ckpt.parent)}").context == 8192


def test_gguf(ckpt: Path, load: Load) -> None:
    advice = f"; GGUF files are made for llama.cpp: take the safetensors of a {QWEN}"
    folder = ckpt / LLM
    (gguf := folder / "qwen-q4_0.gguf").write_bytes(b"GGUF")
    assert load().context == 8192  # beside the weights
    key = f"model.llm_model={gguf.relative_to(ckpt.parent)}"
    assert refusal(load, key) == f"model.llm_model: {gguf} is not a folder{advice}"
    for path in folder.glob("model*"):
        path.unlink()
    assert refusal(load) == (
        f"model.llm_model: {folder} holds neither model*.safetensors nor pytorch_model*.bin{advice}"
    )
    (folder / "config.json").unlink()
    assert refusal(load) == f"model.llm_model: no file {folder / 'config.json'}{advice}"


# --- types of numbers -----------------------------------------------------------------------


def retype(ckpt: Path, change: Callable[[str, Tensor], torch.dtype | None]) -> None:
    """Store tensors of the language model in other types."""
    for shard in SHARDS:
        tensors = load_file(ckpt / shard)
        save_file({k: t.to(change(k, t) or t.dtype) for k, t in tensors.items()}, ckpt / shard)


@pytest.mark.parametrize(
    ("most", "few", "used"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float16, torch.float32),
        (torch.float64, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float32),
    ],
)
def test_mixed_types_become_one(
    ckpt: Path,
    load: Load,
    caplog: pytest.LogCaptureFixture,
    most: torch.dtype,
    few: torch.dtype,
    used: torch.dtype,
) -> None:
    retype(ckpt, lambda k, t: few if t.ndim == 1 or "wte" in k else most)
    with caplog.at_level(logging.INFO):
        model = load()
    assert {p.dtype for p in model.language.model.parameters()} == {used}
    told = [m for m in caplog.messages if "weights are turned into" in m]
    others = {str(d) for d in (most, few) if d != used}
    assert told == [f"{ckpt / LLM}: {', '.join(others)} weights are turned into {used}"]
    assert len(model.generate({"text": "a"}, True, max_new_tokens=3)[0]) == 3
    assert load("model.llm_precision=fp32").language.model.lm_head.weight.dtype == torch.float32


def test_one_type_is_kept_without_a_word(
    ckpt: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    retype(ckpt, lambda k, t: torch.bfloat16)
    with caplog.at_level(logging.INFO):
        model = load()
    assert {p.dtype for p in model.language.model.parameters()} == {torch.bfloat16}
    assert not [m for m in caplog.messages if "turned into" in m]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_numbers_that_need_a_scale(
    ckpt: Path, load: Load, dtype: torch.dtype, precision: str
) -> None:
    retype(ckpt, lambda k, t: dtype if k.endswith("h.1.mlp.w1.weight") else None)
    assert refusal(load, f"model.llm_precision={precision}") == (
        f"{ckpt / LLM}: transformer.h.1.mlp.w1.weight is stored as {dtype}: quantized "
        "weights are not supported; take the model in half precision"
    )


def test_the_vision_side_in_integers(ckpt: Path, load: Load) -> None:
    edit_pth(ckpt / VIT, lambda s: s | {"cls_token": s["cls_token"].to(torch.int8)})
    assert refusal(load).startswith(f"{ckpt / VIT}: cls_token is stored as torch.int8: quantized")


def test_a_text_longer_than_the_context_is_refused(ckpt: Path, load: Load) -> None:
    edit_json(ckpt / LLM / "config.json", seq_length=2048)
    assert load("model.max_txt_len=2048").context == 2048
    assert refusal(load, "model.max_txt_len=2049") == (
        "model.max_txt_len 2049 is past this language model's context of 2048 (seq_length), where "
        "it would need dynamic NTK scaling"
    )


def test_an_early_context_limits_generation(ckpt: Path, load: Load) -> None:
    edit_json(ckpt / LLM / "config.json", seq_length=2048)
    model = load()
    with pytest.raises(ConfigError, match=r"\(max_window_size 6144, context 2048, max_new_tokens "):
        model.chat("a " * 2000, None, None, max_new_tokens=100)


def test_sizes_of_qwen_14b(tmp_path: Path) -> None:
    original = {
        "model_type": "qwen",
        "hidden_size": 5120,
        "intermediate_size": 27392,
        "kv_channels": 128,
        "layer_norm_epsilon": 1e-6,
        "no_bias": True,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 2048,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    }
    (tmp_path / "config.json").write_text(json.dumps(original))
    spec = read_spec(tmp_path, None, need_file=True)
    config = spec.config
    assert spec.context == 2048
    assert (config.hidden_size, config.intermediate_size) == (5120, 13696)
    assert (config.num_attention_heads, config.num_key_value_heads) == (40, 40)
    assert (config.num_hidden_layers, config.vocab_size) == (40, 152064)
    assert config.rms_norm_eps == 1e-6
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config.tie_word_embeddings is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'; only 'qwen' is supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; only False is supported"),
        ({"kv_channels": 17}, "kv_channels 17 x num_attention_heads 4 is not hidden_size 64"),
    ],
)
def test_other_language_models_are_refused(
    ckpt: Path, load: Load, changes: dict[str, Any], message: str
) -> None:
    edit_json(ckpt / LLM / "config.json", **changes)
    assert refusal(load).startswith(f"{ckpt / LLM / 'config.json'}: {message}")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("{hidden_sze: 3}", "model.llm_config: unknown key 'hidden_sze'; did you mean 'hidden_siz"),
        ("{hidden_size: abc}", "hidden_size must be a positive number, not 'abc'"),
        ("{num_attention_heads: 0}", "num_attention_heads must be a positive number, not 0"),
        ("{no_bias: 3}", "no_bias must be of type bool, not 3"),
    ],
)
def test_bad_llm_config(load: Load, option: str, message: str) -> None:
    assert message in refusal(load, f"model.llm_config={option}")


def test_vocabulary_larger_than_the_language_model(ckpt: Path, load: Load) -> None:
    edit_json(ckpt / LLM / "config.json", vocab_size=1407)
    assert refusal(load) == (
        "model.llm_model: the vocabulary has 1408 tokens, the language model only 1407: "
        "its files do not belong together"
    )


# --- parts from scratch ---------------------------------------------------------------------


def test_parts_from_scratch_need_no_weight_file(ckpt: Path, load: Load) -> None:
    (ckpt / VIT).unlink()
    assert load("model.from_scratch=[vit]").vision.visual_encoder.pos_embed.device.type == "cpu"
    (ckpt / BLIP).unlink()
    load("model.from_scratch=[vit,qformer]")
    load("model.from_scratch=[vit]", "model.load_pretrained=false")
    for path in (ckpt / LLM).iterdir():
        if path.name != "qwen.tiktoken":
            path.unlink()
    sizes = "{hidden_size: 32, num_attention_heads: 2, num_hidden_layers: 1, vocab_size: 1500, "
    sizes += "intermediate_size: 96, seq_length: 300}"
    model = load("model.from_scratch=[vit,qformer,llm]", f"model.llm_config={sizes}")
    assert model.language.model.model.layers[0].self_attn.q_proj.weight.shape == (32, 32)
    assert model.context == 300
    out = model(one_batch(model))
    assert torch.isfinite(out.loss_sum)
    assert all(not p.is_meta for p in model.parameters())
    assert all(not b.is_meta for b in model.buffers())
    (ckpt / LLM / "qwen.tiktoken").unlink()
    assert "no file" in refusal(load, "model.from_scratch=[vit,qformer,llm]")
