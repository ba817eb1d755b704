"""What a run trained can be written in the original's layout and loaded from there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lavis.common.config import load_config
from lavis.common.errors import WeightsError
from lavis.models import load_model
from lavis.models.weights.trained import trainable_state
from lavis.runners.checkpoint import Checkpoint, Progress
from lavis.tools.export import export, main
from tests.conftest import TOY, TOY_YAML

UNFROZEN = ["model.freeze_vit=false", "model.freeze_qformer=false", "model.freeze_queries=false"]


def test_parts_load_back_bitwise(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(TOY_YAML, encoding="utf-8")
    options = [*UNFROZEN, "model.freeze_llm=false"]
    model = load_model("minigpt4qwen", "", cfg_path=run / "config.yaml", options=options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    config = load_config(run / "config.yaml", options)
    checkpoint = Checkpoint(trainable_state(model), {}, config.tree, progress=Progress(1, 1))
    checkpoint.write(run / "checkpoint_0.pth")
    written = export(run / "checkpoint_0.pth", tmp_path / "out", torch.float32)
    assert [p.name for p in written] == [
        "eva_vit_g.pth", "blip2.pth", "model.safetensors", "config.json", "qwen.tiktoken",
    ]  # fmt: skip
    out = tmp_path / "out"
    again = load_model(
        "minigpt4qwen",
        "",
        cfg_path=run / "config.yaml",
        options=[
            f"model.vit_weights={out / 'eva_vit_g.pth'}",
            f"model.pretrained={out / 'blip2.pth'}",
            f"model.llm_model={out / 'llm'}",
        ],
    )
    again.load_checkpoint(run / "checkpoint_0.pth")
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_projection_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(TOY_YAML, encoding="utf-8")
    (tmp_path / "c.pth").write_bytes((TOY / "checkpoint_9.pth").read_bytes())
    with pytest.raises(WeightsError, match="neither a vision encoder, a Q-Former nor an LLM"):
        export(tmp_path / "c.pth", tmp_path / "out", torch.float32)


def test_a_configuration_of_another_place(
    toy_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--cfg-path`` is read with every format."""
    where = ["--checkpoint", str(TOY / "checkpoint_9.pth"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["export", *where, "--cfg-path", str(toy_yaml)])
    with pytest.raises(WeightsError, match="neither a vision encoder, a Q-Former nor an LLM"):
        main()
