"""Rules that hold for the whole tree."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lavis.common.frames import VideoConfig
from lavis.common.schema import BuildInfo, DatasetConfig, RunConfig
from lavis.datasets.config import BenchmarkConfig
from lavis.models.config import (
    HfConfig,
    LinearConfig,
    LoraConfig,
    MergeConfig,
    PartTraining,
    Qwen1Config,
    ResamplerConfig,
    VlmConfig,
)
from lavis.models.legacy import MiniGPT4QwenConfig
from lavis.models.vision.config import (
    EvaQFormerConfig,
    FusedConfig,
    HfVisionConfig,
    QFormerConfig,
    TimmConfig,
    ViTConfig,
)
from lavis.processors.config import ImageTrainConfig

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "lavis").rglob("*.py"))
LAYERS = {
    "common": set(),
    "processors": {"common"},
    "datasets": {"common", "processors"},
    "models": {"common", "processors"},
    "tasks": {"common", "processors", "datasets", "models"},
    "runners": {"common", "processors", "datasets", "models", "tasks"},
    "chat": {"common", "processors", "models"},
    "tools": {"common", "processors", "datasets", "models", "tasks", "runners", "chat"},
}


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT / "lavis").parts[0]
    if package not in LAYERS:
        return
    for name in _imports(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] == "lavis" and len(parts) > 1:
            assert parts[1] in LAYERS[package] | {package}, f"{path} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_star_import(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pictures_are_read_in_one_place(path: Path) -> None:
    # What an export is checked by reads with Pillow alone, pictures that were written for it.
    allowed = "common/images.py", "models/export/check.py"
    if path.relative_to(ROOT / "lavis").as_posix() in allowed:
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            assert called not in ("Image.open", "ImageOps.exif_transpose"), f"{path}: {called}"
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            literals = [v.value for v in values if isinstance(v, ast.Constant)]
            assert node.func.attr != "convert" or "RGB" not in literals, f"{path}: {called}"


@pytest.mark.parametrize(
    "config",
    [
        MiniGPT4QwenConfig, VlmConfig, EvaQFormerConfig, ViTConfig, QFormerConfig, LinearConfig,
        MergeConfig, ResamplerConfig, HfConfig, Qwen1Config, PartTraining, LoraConfig, RunConfig,
        DatasetConfig, BuildInfo, HfVisionConfig, TimmConfig, FusedConfig, ImageTrainConfig,
        BenchmarkConfig, VideoConfig,
    ],
)  # fmt: skip
def test_every_key_is_documented(config: type) -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w.]+", page))
    named |= {part for name in named for part in name.split(".")}
    assert {f.name for f in dataclasses.fields(config)} <= named


@pytest.mark.parametrize("page", ["README.md", "README_zh.md", "CONTRIBUTING.md"])
def test_local_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target


def _definitions(tree: ast.AST, inside: str = "") -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield inside + node.name
            yield from _definitions(node, f"{inside}{node.name}.")


@pytest.mark.parametrize("what", ["batch", "question"])
def test_walks_lead_through_the_code(what: str) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    walk = page.split(f"### The way of a {what}\n")[1].split("\n#")[0].strip()
    steps = re.findall(r"(?m)^\d+\. .*$", walk)
    assert len(steps) == 10
    for step in steps:
        places = re.findall(r"`([\w/]+\.py):([\w.]+)`", step)
        assert places, step
        for path, name in places:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            assert name in set(_definitions(tree)), f"{path} has no {name}"


def test_layout_names_files_that_are_there() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.split("## Layout")[1].split("###")[0]
    for row in re.findall(r"(?m)^\| (`.*?) \| (.*) \|$", table):
        folders = re.findall(r"`([\w/]+)`", row[0])
        for folder in folders:
            assert (ROOT / folder).is_dir(), folder
        for file in re.findall(r"`(\w+\.py)`", row[1]):
            assert (ROOT / folders[0] / file).is_file(), f"{folders[0]}/{file}"
