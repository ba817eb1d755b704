"""Two machines, as network namespaces: one result, whatever dies."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.machines import Machine, final, train_with_deaths, two_machines
from examples.toybox.world.__main__ import write_split
from tests.runners.test_distributed import TWO, finish, start
from tests.runners.worker import options

STEPS = 16  # 61 samples, four a step


@pytest.fixture()
def machines() -> Iterator[tuple[Machine, Machine]]:
    with contextlib.ExitStack() as stack:
        try:
            pair = stack.enter_context(two_machines())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces: {error}")
        yield pair


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("data")
    for split, count in (("train", 61), ("val", 5), ("test", 19)):
        write_split(out, split, count, seed=11)
    return [*options(out), *TWO]


def runs_of(settings: list[str], out: Path) -> list[list[str]]:
    return [
        [*settings, f"run.strategy={name}", f"run.output_dir={out / name}"]
        for name in ("ddp", "fsdp2")
    ]


@pytest.fixture(scope="module")
def local(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes of one machine, unbroken."""
    out = tmp_path_factory.mktemp("local")
    finish(start(out, runs_of(settings, out), 2))
    return out


def check_equal(output: Path, expected: Path) -> None:
    """Weights and Adam's moments, bit for bit."""
    one, other = final(output), final(expected)
    assert int(one["step"]) == STEPS
    assert one.keys() == other.keys() and len(one) > 6
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_two_machines_equal_one(
    machines: tuple[Machine, Machine], settings: list[str], local: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs.json").write_text(json.dumps(runs_of(settings, tmp_path)))
    for machine in machines:
        command = ["-m", "tests.runners.worker", str(tmp_path / "runs.json")]
        machine.launch(command, tmp_path)
    for machine in machines:
        assert machine.finish() == 0, machine.log()
    for name in ("ddp", "fsdp2"):
        check_equal(tmp_path / name, local / name)


def test_machines_that_die_three_times(
    machines: tuple[Machine, Machine], settings: list[str], local: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    ddp = [*settings, "run.strategy=ddp", "run.save_every_steps=1"]
    assert len(train_with_deaths(machines, ddp, broken, tmp_path)) == 3
    resumed = [int(n) for n in re.findall(r"resumed from \S+ at step (\d+)", machines[0].log())]
    assert len(resumed) >= 2 and resumed == sorted(resumed)
    assert resumed[0] >= 3 and resumed[-1] >= 7  # of the steps that were seen, one may be unsaved
    check_equal(broken, local / "ddp")
