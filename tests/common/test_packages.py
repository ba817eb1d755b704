"""Versions of packages: what was tried passes, what is older or missing is named."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from lavis.common import packages
from lavis.common.cli import run_cli
from lavis.common.errors import ConfigError
from lavis.common.packages import check_packages

EXTRAS = ("", "tensorboard", "evaluation", "lora", "video", "deepspeed", "wandb", "web", "toybox")


def _install(monkeypatch: pytest.MonkeyPatch, name: str, installed: str | None) -> None:
    real = metadata.version

    def version(package: str) -> str:
        if package != name:
            return real(package)
        if installed is None:
            raise metadata.PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_the_tests_run_with_passes(extra: str) -> None:
    check_packages(extra)


@pytest.mark.parametrize("installed", ["5.23.0", "4.57.1"])
def test_an_older_version_is_named_with_the_one_needed(
    monkeypatch: pytest.MonkeyPatch, installed: str
) -> None:
    _install(monkeypatch, "transformers", installed)
    with pytest.raises(ConfigError) as caught:
        check_packages()
    assert str(caught.value) == (
        f"this package needs transformers>=5.24, not {installed}. Install with: pip install -e '.'"
    )


@pytest.mark.parametrize("installed", ["2.14.1+cpu", "2.15.0.dev20261101", "2.14.1"])
def test_builds_of_a_tried_version_pass(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    _install(monkeypatch, "torch", installed)
    check_packages()


def test_a_missing_package_of_an_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "peft", None)
    check_packages()
    with pytest.raises(ConfigError) as caught:
        check_packages("lora", "model.get_lora: true")
    assert str(caught.value) == (
        "model.get_lora: true needs peft>=0.18, which is not installed. Install with: "
        "pip install -e '.[lora]'"
    )


def test_an_installed_copy_reads_its_metadata(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packages, "_TOP", tmp_path)  # no pyproject.toml
    wanted = ["torch>=2.14.1", 'peft>=0.18; extra == "lora"', 'av>=99; extra == "video"']
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    check_packages()
    check_packages("lora")
    with pytest.raises(
        ConfigError, match=r"av>=99, not .*pip install 'lavis-minigpt4qwen\[video\]'"
    ):
        check_packages("video", "a video")


def test_a_command_stops_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _install(monkeypatch, "torch", "2.6.0")
    with pytest.raises(SystemExit) as caught:
        run_cli(lambda: pytest.fail("the command ran"))
    assert caught.value.code == 2
    assert "torch>=2.14.1, not 2.6.0" in capsys.readouterr().err
