"""What a YAML file may say, and what is answered to a wrong one."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lavis.common.config import (
    AddOptions,
    add_config_arguments,
    default_model_config,
    load_config,
)
from lavis.common.errors import ConfigError
from lavis.common.registry import BUILDERS, MODELS, PROCESSORS
from lavis.common.schema import DatasetConfig, RunConfig
from lavis.models.legacy import MiniGPT4QwenConfig
from lavis.processors.config import BaseInstructionConfig, BaseTextConfig, ImageTrainConfig
from tests.conftest import FIXTURES, REPO

MODEL = "model: {arch: minigpt4qwen}\n"
RUNNABLE = sorted([*REPO.glob("lavis/projects/**/*.yaml"), *REPO.glob("examples/**/*.yaml")])
RUNNABLE = [path for path in RUNNABLE if "lmms_eval" not in path.parts]  # those are its tasks
DEFAULTS = sorted(REPO.glob("lavis/configs/**/*.yaml"))


@pytest.fixture()
def write(tmp_path: Path) -> typing.Callable[[str], Path]:
    def _write(text: str) -> Path:
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def refusal(path: str | Path, options: typing.Sequence[str] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, options)
    return str(caught.value)


# --- unknown keys ---------------------------------------------------------------------------


def test_unknown_key_names_path_file_and_nearest(write: Any) -> None:
    path = write(MODEL + "run: {int_lr: 1}\n")
    assert refusal(path) == f"{path}: unknown key 'run.int_lr'; did you mean 'init_lr'?"


def test_unknown_nested_key(write: Any) -> None:
    path = write("model: {arch: minigpt4qwen, vit_config: {depht: 3}}\n")
    assert refusal(path) == (f"{path}: unknown key 'model.vit_config.depht'; did you mean 'depth'?")


def test_unknown_key_in_a_data_set(write: Any) -> None:
    path = write(MODEL + "datasets: {llava_instruction: {build_info: {max_frame: 3}}}\n")
    assert refusal(path) == (
        f"{path}: unknown key 'datasets.llava_instruction.build_info.max_frame'; "
        "did you mean 'max_frames'?"
    )


def test_unknown_key_without_a_near_one_lists_all(write: Any) -> None:
    path = write(MODEL + "env: {zzz: 1}\n")
    assert refusal(path) == f"{path}: unknown key 'env.zzz' (known: cache_root)"


def test_a_key_of_another_kind_of_the_same_says_which(write: Any) -> None:
    path = write(MODEL + "run: {seed: 3}\n")
    assert refusal(path, ["model.language.quantize=nf4"]) == (
        "--options: unknown key 'model.language', which is of arch: vlm"
    )


def test_unknown_key_from_options_names_options(write: Any) -> None:
    path = write(MODEL + "run: {seed: 3}\n")
    assert refusal(path, ["run.sed=5"]) == "--options: unknown key 'run.sed'; did you mean 'seed'?"


def test_wrong_value_is_laid_at_the_door_of_who_set_it(write: Any) -> None:
    """The same section is in the file and in the options; only one of them is wrong."""
    path = write(MODEL + "run: {lr_sched: cosine, seed: 3}\n")
    assert refusal(path, ["run.seed=5"]).startswith(
        f"{path}: run.lr_sched: unknown learning-rate schedule 'cosine'"
    )
    path = write(MODEL + "run: {lr_sched: constant_lr, seed: 3}\n")
    assert refusal(path, ["run.max_epoch=0"]) == (
        "--options: run.max_epoch must be at least 1, not 0"
    )


def test_unknown_section(write: Any) -> None:
    path = write(MODEL + "runn: {}\n")
    assert refusal(path).startswith(f"{path}: unknown section 'runn'; did you mean 'run'? (known: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {arch: minigpt4qwem}",
            "model.arch: unknown model arch 'minigpt4qwem'; did you mean 'minigpt4qwen'?",
        ),
        (
            "model: {arch: minigpt4qwen, model_type: qwen7b}",
            "model.model_type: unknown 'qwen7b'; did you mean 'qwen7b_chat'?",
        ),
        (
            MODEL + "datasets: {lava_instruction: {}}",
            "datasets.lava_instruction: unknown dataset builder 'lava_instruction'; "
            "did you mean 'llava_instruction'?",
        ),
        (
            MODEL + "preprocess: {vis_processor: {eval: {name: blip_image_evil}}}",
            "preprocess.vis_processor.eval.name: unknown processor 'blip_image_evil'; "
            "did you mean 'blip_image_eval'?",
        ),
        (MODEL + "run: {runner: runner_bas}", "run.runner: unknown runner 'runner_bas'; did you "),
        (MODEL + "run: {task: image_text}", "run.task: unknown task 'image_text'"),
        (
            MODEL + "run: {on_bad_sample: skipp}",
            "run.on_bad_sample: 'skipp' is not one of error, skip; did you mean 'skip'?",
        ),
    ],
)
def test_unknown_name(write: Any, text: str, message: str) -> None:
    path = write(text)
    assert refusal(path).startswith(f"{path}: {message}")


# --- wrong types and values -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {max_epoch: abc}", "run.max_epoch must be an integer, not 'abc' (str)"),
        ("run: {max_epoch: 2.5}", "run.max_epoch must be an integer, not 2.5 (float)"),
        ("run: {max_epoch: true}", "run.max_epoch must be an integer, not True (bool)"),
        ("run: {max_epoch: }", "run.max_epoch must be an integer, not nothing"),
        ("run: {init_lr: fast}", "run.init_lr must be a number, not 'fast' (str)"),
        ("run: {init_lr: -1}", "run.init_lr must be at least 0, not -1.0"),
        ("run: {init_lr: .nan}", "run.init_lr must be in [0, inf), not nan"),
        ("run: {num_workers: -1}", "run.num_workers must be at least 0, not -1"),
        ("run: {log_freq: 0}", "run.log_freq must be at least 1, not 0"),
        ("run: {seed: -3}", "run.seed must be at least 0, not -3"),
        ("run: {warmup_ratio: 1}", "run.warmup_ratio must be in [0, 1), not 1.0"),
        ("run: {amp: 'yes'}", "run.amp must be true or false, not 'yes' (str)"),
        ("run: {output_dir: 7}", "run.output_dir must be a string, not 7 (int)"),
        ("run: {train_splits: train}", "run.train_splits must be a list, not 'train' (str)"),
        ("run: {train_splits: [1]}", "run.train_splits[0] must be a string, not 1 (int)"),
        ("run: {train_splits: []}", "run.train_splits is empty: name at least one split, such as"),
        ("run: 3", "run must be a mapping, not 3"),
        ("datasets: [a]", "datasets must be a mapping, not ['a'] (list)"),
        ("datasets: {a: b}", "datasets.a must be a mapping, not 'b' (str)"),
        ("datasets: {a: {builder: [1]}}", "datasets.a.builder must be a string, not [1] (list)"),
        ("datasets: {a: {builder: instruction}}", "'datasets.a.build_info' is missing"),
        (
            "datasets: {llava_pretrain: {build_info: {max_frames: 0}}}",
            "datasets.llava_pretrain.build_info.max_frames must be at least 1, not 0",
        ),
        (
            "datasets: {llava_pretrain: {build_info: {annotations: {train: {storage: }}}}}",
            "datasets.llava_pretrain.build_info.annotations.train.storage must be a string or a "
            "list, not nothing",
        ),
        ("imports: torch", "imports must be a list, not 'torch' (str)"),
        (
            "preprocess: {vis_processor: {train: {name: blip2_image_train, std: [1, 0, 1]}}}",
            "preprocess.vis_processor.train.std must be positive, not [1.0, 0.0, 1.0]",
        ),
        (
            "preprocess: {vis_processor: {train: {name: blip2_image_train, mean: [1]}}}",
            "preprocess.vis_processor.train.mean must have 3 values, not 1",
        ),
        ("run: {output_dir: '${run.sed}'}", "run.output_dir: Interpolation key 'run.sed' not foun"),
        ("run: {output_dir: '???'}", "run.output_dir: Missing mandatory value"),
    ],
)
def test_wrong_value(write: Any, text: str, message: str) -> None:
    path = write(MODEL + text)
    assert refusal(path).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "model.arch is missing (known: "),
        ("model: {arch: [1]}", "model.arch must be a string, not [1] (list)"),
        ("model: foo", "model must be a mapping, not 'foo' (str)"),
        (
            "model: {arch: minigpt4qwen, image_size: 57}",
            "model.image_size 57 is not divisible by vit_config.patch_size 14",
        ),
        (
            "model: {arch: minigpt4qwen, vit_config: {num_heads: 0}}",
            "model.vit_config.num_heads must be at least 1, not 0",
        ),
        (
            "model: {arch: minigpt4qwen, vit_config: {embed_dim: 90, num_heads: 4}}",
            "model.vit_config.embed_dim 90 is not divisible by num_heads 4",
        ),
        ("model: {arch: minigpt4qwen, lora_r: 0}", "model.lora_r must be at least 1, not 0"),
        (
            "model: {arch: minigpt4qwen, from_scratch: [vitt]}",
            "model.from_scratch[0]: 'vitt' is not one of vit, qformer, llm; did you mean 'vit'?",
        ),
        (
            "model: {arch: minigpt4qwen, freeze_vit: false}",
            "model.freeze_vit: false needs vit_precision: fp32",
        ),
        (
            "model: {arch: minigpt4qwen, unfreeze_pos_embed: true}",
            "model.unfreeze_pos_embed: true needs vit_precision: fp32",
        ),
        (
            "model: {arch: minigpt4qwen, load_finetuned: true}",
            "model.load_finetuned is true but finetuned names no checkpoint",
        ),
    ],
)
def test_wrong_model_section(write: Any, text: str, message: str) -> None:
    path = write(text)
    assert refusal(path).startswith(f"{path}: {message}")


def test_keys_of_a_part_without_its_name(write: Any) -> None:
    """The default part would have other keys than a user's may: the name is asked for."""
    path = write("model: {arch: vlm, language: {name: hf, path: x}, vision: {image_size: 84}}")
    missing, says = "model.vision.name is missing (known: ", "it says which vision encoder"
    told = refusal(path)
    assert told.startswith(f"{path}: {missing}")
    assert told.endswith(f"{says} the other keys are of: add `name: ...` to model.vision")
    path = write("model: {arch: vlm, language: {name: hf, path: x}}")
    told = refusal(path, ["model.vision.image_size=84"])
    assert told.startswith(f"--options: {missing}")
    assert told.endswith(f"{says} the other keys are of: add --options model.vision.name=...")


def test_numbers_as_yaml_spells_them(write: Any) -> None:
    run = load_config(write(MODEL + "run: {max_epoch: 2e1, init_lr: 3e-4, min_lr: 0}\n")).run
    assert (run.max_epoch, run.init_lr, run.min_lr) == (20, 3e-4, 0.0)
    assert type(run.max_epoch) is int
    assert type(run.min_lr) is float


# --- the file -------------------------------------------------------------------------------


def test_file_not_found_names_a_near_one(write: Any) -> None:
    wanted = write(MODEL).with_name("mi.yaml")
    assert refusal(wanted) == f"no configuration file {wanted}; did you mean 'my.yaml'?"


@pytest.mark.parametrize("name", ["", "no/such/folder.yaml", "x" * 5000])
def test_paths_that_lead_nowhere(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path / name) == f"no configuration file {tmp_path / name}"


@pytest.mark.parametrize(
    "content",
    [b"model: [", b"\xff\xfe\x80", b"a: 1\na: 2\n", b"model:\n\tarch: x\n", b"run: {a: '${x'}\n"],
)
def test_invalid_yaml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path} is not valid YAML: ")


def test_yaml_without_sections(write: Any) -> None:
    path = write("[1, 2]")
    assert refusal(path) == (
        f"{path} must hold a mapping with the sections model, datasets and run"
    )
    assert refusal(write("3")).startswith(f"{path} is not valid YAML: ")


# --- layers ---------------------------------------------------------------------------------


def test_options_over_file_over_defaults(write: Any) -> None:
    path = write(MODEL + "run: {seed: 7}\n")
    assert load_config(path).model.max_txt_len == 512  # lavis/configs/models
    path = write("model: {arch: minigpt4qwen, max_txt_len: 77, num_query_token: 5}\nrun: {seed: 7}")
    config = load_config(path, ["model.max_txt_len=33", "run.output_dir=中文/路径"])
    assert config.model.max_txt_len == 33
    assert config.model.num_query_token == 5
    assert (config.run.seed, config.run.output_dir) == (7, "中文/路径")
    assert config.source == str(path)


def test_later_option_wins(write: Any) -> None:
    assert load_config(write(MODEL), ["run.seed=5", "run.seed=6"]).run.seed == 6


def test_option_values_are_yaml(write: Any) -> None:
    config = load_config(
        write(MODEL),
        ["run.train_splits=[a,b]", "run.grad_norm_clip=null", "run.init_lr=1e-3", "run.amp=true"],
    )
    assert config.run.train_splits == ("a", "b")
    assert config.run.grad_norm_clip is None
    assert (config.run.init_lr, config.run.amp) == (1e-3, True)


@pytest.mark.parametrize("item", ["run.seed", "=3", "run..seed=3", ".seed=3", "run.=3", ""])
def test_option_that_is_no_assignment(write: Any, item: str) -> None:
    assert refusal(write(MODEL), [item]) == f"--options: {item!r} is not of the form a.b=value"


@pytest.mark.parametrize("item", ["run.train_splits=[a", "run.seed={", "run.output_dir=${x"])
def test_option_with_a_broken_value(write: Any, item: str) -> None:
    assert refusal(write(MODEL), [item]).startswith("--options: ")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/x/run #3", "/x/run #3"),
        ("#3", "#3"),
        ('"/x" #3', '"/x" #3'),
        ("/x/run#3", "/x/run#3"),
        ("'/x/run #3'", "/x/run #3"),
        ('"12"', "12"),
        ("2024-01-01", "2024-01-01"),
    ],
)
def test_an_option_is_not_cut_short(write: Any, text: str, value: str) -> None:
    assert load_config(write(MODEL), [f"run.output_dir={text}"]).run.output_dir == value


@pytest.mark.parametrize("text", ["@x", "*x", "%x", "`x", "[x", "a: b: c", "!x y", "{x", "|x"])
def test_text_that_is_no_yaml_is_shown_in_quotes(write: Any, text: str) -> None:
    message = refusal(write(MODEL), [f"run.output_dir={text}"])
    assert message.startswith(f"--options: run.output_dir: {text!r} is not valid YAML: ")
    advice = message.rpartition("Text that YAML reads otherwise needs quotes: --options ")[2]
    (option,) = shlex.split(advice)
    assert load_config(write(MODEL), [option]).run.output_dir == text


@pytest.mark.parametrize(
    ("text", "quoted"),
    [("123", "123"), ("1.5", "1.5"), ("yes", "..."), ("a: b", "..."), ("[a]", "...")],
)
def test_text_that_yaml_reads_otherwise(write: Any, text: str, quoted: str) -> None:
    advice = f'; text that looks like something else needs quotes: output_dir: "{quoted}"'
    assert refusal(write(MODEL + "run: {output_dir: {a: b}}\n")).endswith(
        'needs quotes: output_dir: "..."'
    )
    if ":" not in text:
        assert refusal(write(MODEL + f"run: {{output_dir: {text}}}\n")).endswith(advice)
    message = refusal(write(MODEL), [f"run.output_dir={text}"])
    assert message.endswith(f"needs quotes: --options 'run.output_dir=\"{quoted}\"'")


def test_environment_variables(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_TEST", "/there")
    path = write(MODEL + "run: {output_dir: '${LAVIS_TEST}/x'}\n")
    assert refusal(path).endswith("not found; the environment variable is ${oc.env:LAVIS_TEST}")
    config = load_config(path, ["run.output_dir=${oc.env:LAVIS_TEST}/x"])
    assert config.run.output_dir == "/there/x"
    assert "not found" in refusal(path, ["run.output_dir=${oc.env:LAVIS_TEST_NOT}/x"])
    assert refusal(path, ["run.output_dir=$LAVIS_TEST/x"]) == (
        "--options: run.output_dir: $LAVIS_TEST/x: for an environment variable write ${oc.env:NAME}"
    )


def test_home_folders(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    path = write(MODEL + "run: {output_dir: ~/out, resume_ckpt_path: ~/a.pth}\n")
    run = load_config(path).run
    assert (run.output_dir, run.resume_ckpt_path) == ("/home/me/out", "/home/me/a.pth")
    assert load_config(path, ["run.output_dir=./~/x"]).run.output_dir == "./~/x"


def arguments(*listed: str) -> list[str]:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser, required=False)
    short = {"dest": "options", "nargs": 0, "const": ["run.strategy=deepspeed"]}
    parser.add_argument("--use-deepspeed", action=AddOptions, **short)
    return parser.parse_args(listed).options


def test_options_add_up() -> None:
    assert arguments() == []
    assert arguments("--options", "a=1", "b=2", "--options", "c=3", "--options", "a=1") == (
        ["a=1", "b=2", "c=3", "a=1"]
    )
    assert arguments("--options", "a=1", "--use-deepspeed", "--options", "b=2") == (
        ["a=1", "run.strategy=deepspeed", "b=2"]
    )
    assert arguments() == []  # the default is nobody's list


@pytest.mark.parametrize(
    "listed",
    [
        ("--options", "a=1", "a=2"),
        ("--options", "a=1", "--options", "a=2"),
        ("--options", "b=1", "a=1", "--options", "c=3", "a=2"),
    ],
)
def test_options_that_contradict_each_other(listed: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        arguments(*listed)
    assert str(caught.value) == "--options: a is given as '1' and as '2'"


def test_a_flag_that_contradicts_an_option() -> None:
    with pytest.raises(ConfigError, match=r"run\.strategy is given as 'ddp' and as 'deepspeed'"):
        arguments("--options", "run.strategy=ddp", "--use-deepspeed")
    with pytest.raises(ConfigError, match=r"run\.strategy is given as 'deepspeed' and as 'ddp'"):
        arguments("--use-deepspeed", "--options", "run.strategy=ddp")


@pytest.mark.parametrize("text", ["seed: 1\n  log_freq: 3\n  seed: 2", "{seed: 1, seed: 2}"])
def test_a_key_that_stands_twice(write: Any, text: str) -> None:
    path = write(f"{MODEL}run:\n  {text}\n")
    message = refusal(path)
    assert message.startswith(f"{path} is not valid YAML: ")
    assert "found duplicate key seed" in message
    assert f"line {5 if 'log' in text else 3}, column" in message.splitlines()[-1]


def test_defaults_of_data_sets(write: Any) -> None:
    block = load_config(write(MODEL + "datasets: {llava_instruction: {}}\n")).datasets[
        "llava_instruction"
    ]
    assert block.builder == "llava_instruction"
    assert block.build_info.annotations["train"].paths == (
        "dataset/llava/llava_minigpt4qwen_format.json",
    )
    assert block.build_info.images.storage == "dataset/llava/image"


def test_model_defaults_alone() -> None:
    seven, fourteen = (
        default_model_config("minigpt4qwen", t).model for t in ("qwen7b_chat", "qwen14b_chat")
    )
    assert (seven.llm_model, fourteen.llm_model) == ("ckpt/Qwen7B-chat", "ckpt/Qwen-14B-Chat")


def test_a_saved_tree_loads_to_the_same_run(tmp_path: Path) -> None:
    """``config.yaml`` in an output folder is enough to repeat or resume the run."""
    config = load_config(FIXTURES / "upstream_train.yaml", ["run.seed=13"])
    OmegaConf.save(OmegaConf.create(config.tree), tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


# --- the original's dialect -----------------------------------------------------------------


def test_the_originals_dialect_loads() -> None:
    config = load_config(FIXTURES / "upstream_train.yaml")
    assert list(config.datasets) == [  # in the file's order
        "minigpt4_instruction",
        "llava_instruction",
        "llava_pretrain",
        "llava_instruct_100k",
        "llava_instruct_156k",
        "videochatgpt_100k",
    ]
    model, run = config.model, config.run
    assert isinstance(model, MiniGPT4QwenConfig)
    assert (model.max_txt_len, model.llm_grad_ckpt, model.finetuned) == (256, True, "")
    assert (run.init_lr, run.min_lr, run.warmup_steps) == (1e-4, 1e-6, 500)
    assert (run.max_new_tokens, run.num_beams, run.max_len, run.min_len) == (100, 5, 30, 8)
    assert (run.world_size, run.dist_url, run.distributed) == (1, "env://", True)
    train = config.datasets["minigpt4_instruction"].vis_processor.train
    assert isinstance(train, ImageTrainConfig)
    assert (train.image_size, train.min_scale, train.mean) == (
        224,
        0.5,
        (0.48145466, 0.4578275, 0.40821073),
    )
    assert config.datasets["videochatgpt_100k"].build_info.max_frames == 16


def test_autocast_dtype_under_model_moves_to_run(write: Any) -> None:
    text = "model: {arch: minigpt4qwen, autocast_dtype: bfloat16}\n"
    assert load_config(write(text)).run.autocast_dtype == "bfloat16"
    assert load_config(write(text + "run: {autocast_dtype: fp16}")).run.autocast_dtype == "fp16"


def test_an_older_name_of_the_number_of_new_tokens(write: Any) -> None:
    path = write(MODEL + "run: {max_len: 30}\n")
    assert load_config(path).run.max_new_tokens == 30
    assert load_config(path, ["run.max_new_tokens=7"]).run.max_new_tokens == 7
    assert refusal(path, ["run.max_len=0"]).startswith("--options: run.max_len must be at least 1")


# --- DeepSpeed's section --------------------------------------------------------------------

SECTION = "run.deepspeed_config"


def deepspeed(write: Any, text: str) -> Path:
    path: Path = write(f"{MODEL}run: {{strategy: deepspeed, deepspeed_config: {text}}}\n")
    return path


def test_what_a_deepspeed_section_says(write: Any) -> None:
    run = load_config(
        deepspeed(
            write,
            "{optimizer: {type: Adam, params: {betas: [0.8, 0.95], eps: 1e-6, weight_decay: 0}},"
            " gradient_clipping: 2, gradient_accumulation_steps: 3, "
            "train_micro_batch_size_per_gpu: auto}",
        )
    ).run
    assert (run.beta1, run.beta2, run.eps, run.weight_decay) == (0.8, 0.95, 1e-6, 0.0)
    assert (run.grad_norm_clip, run.accum_grad_iters, run.batch_size_train) == (2.0, 3, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must be a mapping, not [1] (list)"),
        ("{optimizer: AdamW}", ".optimizer must be a mapping, not 'AdamW' (str)"),
        ("{bf16: {enabled: auto}}", ".bf16.enabled must be true or false, not 'auto' (str)"),
        ("{fp16: true}", ".fp16 must be a mapping, not True (bool)"),
        ("{zero_optimization: [1]}", ".zero_optimization must be a mapping, not [1] (list)"),
        ("{optimizer: null}", ".optimizer must be a mapping, not nothing"),
        ("{optimizer: [AdamW]}", ".optimizer must be a mapping, not ['AdamW'] (list)"),
        ("{optimizer: {type: Lion}}", ".optimizer.type: 'Lion' is not one of AdamW, Adam"),
        ("{optimizer: {type: [AdamW]}}", ".optimizer.type: ['AdamW'] is not one of AdamW, Adam"),
        ("{optimizer: {params: [1]}}", ".optimizer.params must be a mapping, not [1] (list)"),
        ("{optimizer: {params: 1e-4}}", ".optimizer.params must be a mapping, not 0.0001 (float)"),
        (
            "{optimizer: {params: {betas: [0.9]}}}",
            ".optimizer.params.betas must have 2 values, not",
        ),
        (
            "{optimizer: {params: {betas: [0.9, 0.9, 0.9]}}}",
            ".optimizer.params.betas must have 2 v",
        ),
        ("{optimizer: {params: {betas: 0.9}}}", ".optimizer.params.betas must be a list, not 0.9"),
        ("{optimizer: {params: {betas: [a, 0.9]}}}", ".optimizer.params.betas[0] must be a number"),
        (
            "{optimizer: {params: {betas: [0.9, 1]}}}",
            ".optimizer.params.betas[1]: beta2 must be in",
        ),
        ("{optimizer: {params: {betas: {a: 1}}}}", ".optimizer.params.betas must be a list, not {"),
        (
            "{optimizer: {params: {eps: '1e-4'}}}",
            ".optimizer.params.eps must be a number, not '1e-",
        ),
        (
            "{optimizer: {params: {eps: -1e-8}}}",
            ".optimizer.params.eps: eps must be positive, not ",
        ),
        ("{optimizer: {params: {eps: 0}}}", ".optimizer.params.eps: eps must be positive, not 0.0"),
        (
            "{optimizer: {params: {weight_decay: -1}}}",
            ".optimizer.params.weight_decay: weight_deca",
        ),
        (
            "{gradient_clipping: -1}",
            ".gradient_clipping: grad_norm_clip must be at least 0, not -1",
        ),
        ("{gradient_clipping: [1]}", ".gradient_clipping must be a number, not [1] (list)"),
        (
            "{gradient_accumulation_steps: 1.5}",
            ".gradient_accumulation_steps must be an integer, n",
        ),
        (
            "{train_micro_batch_size_per_gpu: 0}",
            ".train_micro_batch_size_per_gpu: batch_size_train",
        ),
    ],
)
def test_a_malformed_deepspeed_section(write: Any, text: str, message: str) -> None:
    path = deepspeed(write, text)
    assert refusal(path).startswith(f"{path}: {SECTION}{'' if message[0] == '.' else ' '}{message}")


def _restricted() -> list[Any]:
    """Every key that allows one value only, with another value of its type."""
    sections = {
        "run": RunConfig,
        "model": MiniGPT4QwenConfig,
        "datasets.llava_instruction": DatasetConfig,
        "preprocess.text_processor.train@base_instruction": BaseInstructionConfig,
        "preprocess.text_processor.train@base_text": BaseTextConfig,
    }
    cases = []
    for section, cls in sections.items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if "why" not in field.metadata:
                continue
            if isinstance(field.default, bool):
                other: Any = not field.default
            elif isinstance(field.default, tuple):
                other = ["x"]
            elif "dict" in str(hints[field.name]):
                other = {"x": 1}
            else:
                other = "x"
            cases.append(pytest.param(section, field, other, id=f"{section}.{field.name}"))
    return cases


@pytest.mark.parametrize(("section", "field", "other"), _restricted())
def test_refused_key_says_why(
    tmp_path: Path, section: str, field: dataclasses.Field[Any], other: Any
) -> None:
    path = tmp_path / "my.yaml"
    section, _, name = section.partition("@")
    tree = OmegaConf.create({"model": {"arch": "minigpt4qwen"}})
    OmegaConf.update(tree, f"{section}.{field.name}", field.default, force_add=True)
    if name:
        OmegaConf.update(tree, f"{section}.name", name, force_add=True)
    OmegaConf.save(tree, path)
    load_config(path)  # the one allowed value
    OmegaConf.update(tree, f"{section}.{field.name}", other, merge=False)
    OmegaConf.save(tree, path)
    message = refusal(path)
    assert message.startswith(f"{path}: {section}.{field.name}: ")
    assert message.endswith(f" is refused: {field.metadata['why']}")


def test_there_are_refused_keys() -> None:
    names = {case.id for case in _restricted()}
    assert {"run.dist_url", "model.qformer_text_input", "datasets.llava_instruction.type"} <= names


# --- everything that is shipped -------------------------------------------------------------


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda p: str(p.relative_to(REPO)))
def test_shipped_run_is_valid(path: Path) -> None:
    config = load_config(path)
    assert config.datasets


@pytest.mark.parametrize("path", DEFAULTS, ids=lambda p: str(p.relative_to(REPO)))
def test_shipped_defaults_are_valid(path: Path) -> None:
    config = load_config(path, ["model.arch=minigpt4qwen"])
    if path.parent.name == "models":
        assert path.name in MiniGPT4QwenConfig.DEFAULTS.values()
        assert config.model.model_type in path.stem
    else:
        assert list(config.datasets) == [path.stem]


def test_something_is_shipped() -> None:
    assert len(RUNNABLE) >= 3
    assert len(DEFAULTS) >= 8


# --- third parties --------------------------------------------------------------------------

PLUGIN = """
from dataclasses import dataclass
from lavis.common.registry import BUILDERS, MODELS, PROCESSORS
from lavis.common.schema import DatasetConfig, ModelConfig, ProcessorConfig

@dataclass(frozen=True)
class MyModelConfig(ModelConfig):
    width: int = 3

@MODELS.register("my_model")
class MyModel:
    Config = MyModelConfig

@dataclass(frozen=True)
class MyProcessorConfig(ProcessorConfig):
    blur: float = 0.5

@PROCESSORS.register("my_processor", config=MyProcessorConfig)
class MyProcessor:
    pass

@dataclass(frozen=True)
class MyDataConfig(DatasetConfig):
    shuffle: bool = False

@BUILDERS.register("my_builder", config=MyDataConfig)
class MyBuilder:
    pass

@MODELS.register("my_bare_model")
class BareModel:
    pass
"""

PLUGIN_YAML = """
imports: [lavis_test_plugin]
model: {arch: my_model, width: 17}
preprocess: {vis_processor: {train: {name: my_processor, blur: 0.25}}}
datasets:
  mine:
    builder: my_builder
    shuffle: true
    build_info: {annotations: {train: {storage: a.json}}}
"""


@pytest.fixture()
def _plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "lavis_test_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.usefixtures("_plugin")
def test_third_party_module(write: Any) -> None:
    path = write(PLUGIN_YAML)
    config = load_config(path, ["model.width=19"])
    assert type(config.model).__name__ == "MyModelConfig"
    assert config.model.width == 19  # type: ignore[attr-defined]
    assert config.preprocess.vis_processor.train.blur == 0.25  # type: ignore[union-attr]
    assert config.datasets["mine"].shuffle is True  # type: ignore[attr-defined]
    assert MODELS.get("my_model").Config is type(config.model)
    assert "my_processor" in PROCESSORS
    assert "my_builder" in BUILDERS
    assert refusal(path, ["model.widht=1"]) == (
        "--options: unknown key 'model.widht'; did you mean 'width'?"
    )
    assert "model.arch: model arch 'my_bare_model' has no configuration" in refusal(
        path, ["model.arch=my_bare_model"]
    )


@pytest.mark.parametrize("name", ["no_such_plugin", "no_such_plugin.sub"])
def test_third_party_module_that_is_not_there(write: Any, name: str) -> None:
    assert refusal(write(MODEL + f"imports: [{name}]")) == (
        f"imports: no module named '{name}'; install it or add its folder to PYTHONPATH"
    )


@pytest.mark.parametrize("name", ["", ".relative"])
def test_third_party_module_with_an_impossible_name(write: Any, name: str) -> None:
    assert refusal(write(MODEL + f"imports: ['{name}']")) == (
        f"imports: {name!r} is no module name such as a.b"
    )


# --- cost -----------------------------------------------------------------------------------


def test_reading_a_configuration_imports_nothing_heavy() -> None:
    code = (
        "import sys, lavis\n"
        "from lavis.common.config import load_config\n"
        f"load_config({str(FIXTURES / 'upstream_train.yaml')!r})\n"
        "heavy = {'torch', 'transformers', 'timm', 'torchvision', 'tiktoken', 'PIL', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("training", ["1e-4", "{parts: [qformer, pos_embed]}"])
def test_half_precision_eyes_do_not_train(
    write: typing.Callable[[str], Path], training: str
) -> None:
    model = f"arch: vlm, language: {{name: hf, path: x}}, train: {{vision: {training}}}"
    text = f"model: {{{model}}}\n"
    assert "train.vision needs vision.vit_precision: fp32" in refusal(write(text))
    load_config(write(text), ["model.vision={name: eva_qformer, vit_precision: fp32}"])
    load_config(write(text.replace(training, "{parts: [queries]}")))
