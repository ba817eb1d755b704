"""Paths as users write them, and what is said of wrong ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lavis.common.errors import ConfigError, WeightsError, in_lines, listed
from lavis.common.paths import (
    cache_path,
    replaces,
    require_checkpoint,
    require_writable,
    user_path,
)


def test_home_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~/a") == Path("/home/me/a")
    assert user_path("~root/a") == Path("~root/a").expanduser()
    assert user_path("a/~") == Path("a/~")
    assert str(user_path("./~/a")) == "~/a"  # below the working directory
    assert cache_path("a", "~/c") == Path("/home/me/c/a")
    assert cache_path("~/a", "/c") == Path("/home/me/a")
    for text in ("~no-such-user", Path("~no-such-user/x")):
        with pytest.raises(ConfigError, match=rf"^{text}: no such user has a home folder"):
            user_path(text)


def test_the_newest_checkpoint_of_a_folder(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(WeightsError) as caught:
            require_checkpoint(path, "run.resume_ckpt_path")
        return str(caught.value).removeprefix(f"run.resume_ckpt_path: {path} is a folder, not a ")

    assert said(tmp_path) == "checkpoint, and holds no checkpoint_*.pth"
    for job, name, time in (
        ("a", "checkpoint_0.pth", 10),
        ("a", "checkpoint_latest.pth", 20),
        ("b", "checkpoint_best.pth", 40),
        ("b", "checkpoint_latest.pth", 30),
        ("c", "checkpoint_9.pth", 50),
    ):
        path = tmp_path / job / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (time, time))
    assert said(tmp_path) == f"checkpoint; it holds {tmp_path / 'b' / 'checkpoint_latest.pth'}"
    assert (
        said(tmp_path / "a") == f"checkpoint; it holds {tmp_path / 'a' / 'checkpoint_latest.pth'}"
    )
    assert said(tmp_path / "c") == f"checkpoint; it holds {tmp_path / 'c' / 'checkpoint_9.pth'}"
    assert require_checkpoint(tmp_path / "c" / "checkpoint_9.pth") == (
        tmp_path / "c" / "checkpoint_9.pth"
    )


def test_what_can_be_written(tmp_path: Path) -> None:
    for folder in (
        tmp_path,
        tmp_path / "new",
        tmp_path / "new" / "deep",
        tmp_path / "a" / ".." / "b",
    ):
        require_writable(folder, "key", ConfigError)
    require_writable(tmp_path / "new" / "file.json", "key", ConfigError, directory=False)
    (tmp_path / "linked").mkdir()
    (tmp_path / "link").symlink_to("linked")
    require_writable(tmp_path / "link" / "x", "key", ConfigError)
    assert {p.name for p in tmp_path.iterdir()} == {"linked", "link"}  # nothing is made


@pytest.mark.parametrize(
    ("name", "directory", "message"),
    [
        ("file", True, "TMP/file cannot be a folder, since TMP/file is a file"),
        ("file/a/b", True, "TMP/file/a/b cannot be a folder, since TMP/file is a file"),
        ("file/a", False, "TMP/file cannot be a folder, since TMP/file is a file"),
        (".", False, "TMP is a folder; name a file"),
        (
            "dangling",
            True,
            "TMP/dangling cannot be a folder, since TMP/dangling is a broken link to no/wh",
        ),
        (
            "dangling/a",
            False,
            "TMP/dangling cannot be a folder, since TMP/dangling is a broken link to no",
        ),
        ("loop/a", True, "TMP/loop/a cannot be a folder, since TMP/loop is a broken link to loop"),
        ("x" * 300, True, "cannot be written: [Errno 36] File name too long"),
        ("new/" + "x" * 300, True, "cannot be written: [Errno 36] File name too long"),
        ("a\0b", True, "cannot be written: embedded null byte"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, name: str, directory: bool, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("no/where")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError) as caught:
        require_writable(tmp_path / name, "key", ConfigError, directory=directory)
    said = str(caught.value).replace(str(tmp_path), "TMP")
    assert said.startswith("key: ")
    assert message in said


def test_a_folder_that_nobody_may_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the operating system says, whoever runs this test."""

    def refuse(*args: object, **options: object) -> object:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(
        ConfigError, match=r"^key: .*/new cannot be written: \[Errno 13\] Permission "
    ):
        require_writable(tmp_path / "new", "key", ConfigError)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old", encoding="utf-8")
    left = tmp_path / f".file.{os.getpid()}.tmp"  # by a killed process of the same number
    left.write_text("half", encoding="utf-8")
    with pytest.raises(OSError, match="full"), replaces(target) as temporary:
        assert not temporary.exists()
        temporary.write_text("half", encoding="utf-8")
        raise OSError("the disk is full")
    assert (target.read_text(encoding="utf-8"), list(tmp_path.iterdir())) == ("old", [target])
    with replaces(target) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert target.read_text(encoding="utf-8") == "old"
    assert (target.read_text(encoding="utf-8"), list(tmp_path.iterdir())) == ("new", [target])


def test_a_list_says_that_it_is_cut() -> None:
    assert listed(["a", "b"], most=2) == "a, b"
    assert listed(["a", "b", "c", "d"], "; ", most=2) == "a; b; and 2 more"
    assert in_lines(["a", "b", "c"], most=2) == "\n  a\n  b\n  and 1 more"
    assert (in_lines(["a"]), in_lines([])) == ("\n  a", "")
