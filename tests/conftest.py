"""Shared fixtures: the original's toy model, loaded through the public path."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the suite may reach for a hub
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lavis-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C is tested
torch.set_num_threads(1)  # the models are tiny; threads would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # in what tests start, too

REPO = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
TOY = FIXTURES / "upstream_toy"
DEMO = REPO / "examples" / "demo"

TOY_YAML = f"""
env: {{cache_root: {TOY / "cache"}}}
model:
  arch: minigpt4qwen
  model_type: qwen7b_chat
  image_size: 56
  vit_precision: fp32
  vit_config: {{embed_dim: 88, depth: 2, num_heads: 4}}
  num_query_token: 8
  max_txt_len: 128
preprocess:
  vis_processor:
    train: {{name: blip_image_eval, image_size: 56}}
    eval: {{name: blip_image_eval, image_size: 56}}
"""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whoever is done takes over tests of another: those that take long come last."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="session")
def expected() -> dict[str, Any]:
    """What the original computed: ``expected.json`` and the tensors."""
    values = json.loads((TOY / "expected.json").read_text(encoding="utf-8"))
    return values | load_file(TOY / "expected.safetensors")


@pytest.fixture(scope="session")
def toy_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's YAML that points at the original's toy weights; it has no data sets."""
    path = tmp_path_factory.mktemp("toy") / "toy.yaml"
    path.write_text(TOY_YAML, encoding="utf-8")
    return path


@pytest.fixture()
def toy_model(toy_yaml: Path) -> Any:
    """The toy model with the original's trained projection."""
    from lavis.models import load_model

    return load_model(
        "minigpt4qwen",
        "qwen7b_chat",
        is_eval=True,
        cfg_path=toy_yaml,
        checkpoint=TOY / "checkpoint_9.pth",
    )


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The toy vocabulary: 1200 ranks, then the special tokens."""
    from lavis.processors.tokenizer import QwenTokenizer

    return QwenTokenizer(TOY / "cache" / "ckpt" / "Qwen7B-chat" / "qwen.tiktoken")


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
