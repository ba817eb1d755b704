"""The scripts in ``examples/launch``, with stubs of what a cluster has."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from tests.conftest import REPO

LAUNCH = REPO / "examples" / "launch"
STUBS = {
    "scontrol": '[ "$1 $2 $3" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"',
    "srun": 'for _ in $(seq "$SLURM_NNODES"); do "$@"; done',  # one task on each machine
    "python": 'for word in "$@"; do printf "%s\\0" "$word"; done >> "$CALLS"; echo >> "$CALLS"',
}
DIRECTIVES = {
    "job-name": str, "nodes": int, "ntasks-per-node": int, "gpus-per-node": int,
    "cpus-per-task": int, "time": str, "signal": str, "open-mode": str, "output": str,
}  # fmt: skip


@pytest.fixture()
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What ``python`` was called with, a line each."""
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def run(script: str, *arguments: str) -> None:
    subprocess.run(["bash", LAUNCH / script, *arguments], check=True, cwd=REPO)


def launches(calls: Path) -> list[argparse.Namespace]:
    """As PyTorch's launcher reads them."""
    parsed = []
    for line in calls.read_text().splitlines():
        m, module, *words = line.rstrip("\0").split("\0")
        assert (m, module) == ("-m", "torch.distributed.run")
        parsed.append(parse_args(words))
    return parsed


def sbatch(script: str, *arguments: str) -> argparse.Namespace:
    """Read a script's directives as ``sbatch --test-only`` does, and start it as ``sbatch``."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    for name, kind in DIRECTIVES.items():
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--requeue", action="store_true")
    lines = (LAUNCH / script).read_text().splitlines()
    asked = parser.parse_args([x.split()[1] for x in lines if x.startswith("#SBATCH")])
    given = {
        "SLURM_JOB_ID": "20123", "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NNODES": str(asked.nodes), "SLURM_GPUS_ON_NODE": str(asked.gpus_per_node),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        run(script, *arguments)
    return asked


def test_slurm_starts_one_launcher_on_each_machine(calls: Path) -> None:
    asked = sbatch("slurm.sbatch", "my run.yaml", "run.seed=7", "run.max_epoch=2")
    assert (asked.nodes, asked.ntasks_per_node, asked.requeue) == (2, 1, True)
    assert asked.signal == "TERM@180"  # to the processes, not to the script (B:)
    one, other = launches(calls)
    assert one == other
    assert (one.nnodes, one.nproc_per_node, one.max_restarts) == ("2", "4", 3)
    assert (one.rdzv_backend, one.rdzv_id) == ("c10d", "20123")
    assert one.rdzv_endpoint == "node7:20123"
    assert one.training_script == "train.py"
    assert one.training_script_args == [
        "--cfg-path", "my run.yaml", "--options", "run.output_dir=output/slurm-20123",
        "run.resume_ckpt_path=auto", "run.seed=7", "run.max_epoch=2",
    ]  # fmt: skip


def test_several_machines_by_hand(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "first")
    monkeypatch.setenv("LOCAL_ADDR", "10.0.0.2")
    monkeypatch.setenv("RUN_ID", "eyes")
    run("torchrun_multi_node.sh", "a.yaml", "run.seed=7")
    (one,) = launches(calls)
    assert (one.nnodes, one.nproc_per_node, one.max_restarts) == ("2", "4", 3)
    assert (one.rdzv_endpoint, one.rdzv_id, one.local_addr) == ("first:29500", "eyes", "10.0.0.2")
    assert one.training_script_args == [
        "--cfg-path", "a.yaml", "--options", "run.output_dir=output/eyes",
        "run.resume_ckpt_path=auto", "run.seed=7",
    ]  # fmt: skip


def test_one_machine(calls: Path) -> None:
    run("torchrun_single_node.sh")
    (one,) = launches(calls)
    assert (one.standalone, one.nproc_per_node) == (True, "4")
    config = one.training_script_args[1]
    assert one.training_script_args == ["--cfg-path", config]
    assert (REPO / config).is_file()
