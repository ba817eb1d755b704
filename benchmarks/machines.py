"""Two machines on one: training over a network, and machines that die and come back.

``sudo python -m benchmarks.machines``. Each machine is a network namespace of Linux with an
address and a cable (veth) of its own; the disk is shared, as that of a cluster. Training is that of
the toybox, DDP on the CPU. It runs once unbroken and once with machines killed, and the ends are
compared bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parent.parent
FIRST, PORT = "10.77.0.1", 29500  # the meeting point
TIMEOUT = 900  # seconds
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "cable",
    "LOGLEVEL": "INFO",  # of the launcher
    # With the store shared, a machine that joins later waits for an address nobody says again.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


@dataclass
class Machine:
    """A network namespace, and what runs in it."""

    name: str
    address: str
    launcher: subprocess.Popen[str] | None = None
    logs: list[Path] = field(default_factory=list)

    def launch(self, command: list[str], folder: Path, *, restarts: int = 0) -> None:
        """Start a launcher of one process in the background.

        Args:
            command: what each process runs, such as ``["train.py", "--cfg-path", ...]``.
            folder: gets the log.
            restarts: how often processes are started again when one fails.
        """
        self.logs.append(folder / f"{self.name}-{len(self.logs)}.log")
        launch = [
            "ip", "netns", "exec", self.name,
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
            f"--max-restarts={restarts}", "--rdzv-id=rehearsal", "--rdzv-backend=c10d",
            f"--rdzv-endpoint={FIRST}:{PORT}", f"--local-addr={self.address}",
            # The name of the host leads to none of these addresses: say who is the first.
            # A machine that is only slow is not to be taken for dead: half a minute, not a quarter.
            f"--rdzv-conf=read_timeout={TIMEOUT},is_host={self.address == FIRST},"
            "keep_alive_max_attempt=6",
        ]  # fmt: skip
        self.launcher = subprocess.Popen(
            [*launch, *command],
            cwd=REPO,
            env=os.environ | ENVIRONMENT,
            stdout=self.logs[-1].open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )

    def pids(self) -> list[int]:
        """What runs here."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in listed.stdout.split()]

    def kill(self) -> None:
        """SIGKILL to everything that runs here, until it is gone."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.launcher is not None:
                self.launcher.wait()

    def finish(self) -> int:
        """Wait for the launcher's end."""
        assert self.launcher is not None
        return self.launcher.wait(timeout=TIMEOUT)

    def log(self) -> str:
        """All that it has said."""
        return "\n".join(path.read_text() for path in self.logs)


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines and the cable between them; gone afterwards.

    Raises:
        OSError, subprocess.CalledProcessError: this user may not make namespaces.
    """
    names = [f"lavis{os.getpid()}{end}" for end in "ab"]
    machines = Machine(names[0], FIRST), Machine(names[1], "10.77.0.2")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("-n", names[0], "link", "add", "cable", "type", "veth",
            "peer", "name", "cable", "netns", names[1])  # fmt: skip
        for machine in machines:
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                _ip("-n", machine.name, "link", "set", link, "up")
        yield machines
    finally:
        for machine in machines:
            machine.kill()
            subprocess.run(
                ["ip", "netns", "del", machine.name], stderr=subprocess.DEVNULL, check=False
            )


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def wait_for(happened: Callable[[], bool], *machines: Machine) -> None:
    """Look every moment whether something has happened.

    Args:
        happened: a function that says so.
        machines: whose launchers must not have ended meanwhile.
    """
    until = time.monotonic() + TIMEOUT
    while not happened():
        for machine in machines:
            assert machine.launcher is None or machine.launcher.poll() is None, machine.log()
        assert time.monotonic() < until, "".join(m.log() for m in machines)
        time.sleep(0.05)


def steps_done(output: Path) -> int:
    """The steps that a run and those it went on from have logged."""
    lines = [line for path in output.glob("*/log.txt") for line in path.read_text().splitlines()]
    return max((json.loads(line).get("step", -1) + 1 for line in lines), default=0)


def train_with_deaths(
    machines: tuple[Machine, Machine], options: list[str], output: Path, folder: Path
) -> list[str]:
    """Train to the end, while machines are killed three times and come back.

    The second machine dies in the middle of a step, and again while it is starting up; its
    launchers meet again by themselves. Then the first one dies, with the meeting point and both
    launchers, and all is started anew by the same command.

    Args:
        options: ``--options`` of the toybox's project; ``run.log_freq`` and
            ``run.save_every_steps`` must be 1.

    Returns:
        What happened, in words.
    """
    first, second = machines
    project = "lavis/projects/toybox/train.yaml"
    command = ["train.py", "--cfg-path", project, "--options", *options]
    command += [f"run.output_dir={output}", "run.resume_ckpt_path=auto"]
    events = []
    for machine in machines:
        machine.launch(command, folder, restarts=9)
    wait_for(lambda: steps_done(output) >= 4, *machines)
    second.kill()
    events.append(f"second machine killed after step {steps_done(output)}")
    second.launch(command, folder, restarts=9)
    wait_for(lambda: len(second.pids()) > 1, *machines)  # the launcher, and its process
    second.kill()
    events.append(f"second machine killed while starting, at step {steps_done(output)}")
    second.launch(command, folder, restarts=9)
    reached = steps_done(output)
    wait_for(lambda: steps_done(output) >= reached + 4, *machines)
    first.kill()
    events.append(f"first machine killed after step {steps_done(output)}")
    second.kill()
    for machine in machines:
        machine.launch(command, folder, restarts=9)
    for machine in machines:
        assert machine.finish() == 0, machine.log()
    return events


def final(output: Path) -> dict[str, torch.Tensor]:
    """The weights at the end, and Adam's moments."""
    (newest,) = sorted(output.glob("*/checkpoint_latest.pth"), key=os.path.getmtime)[-1:]
    state = torch.load(newest, weights_only=True)
    moments = {
        f"{i}.{name}": value
        for i, entries in state["optimizer"]["state"].items()
        for name, value in entries.items()
    }
    return state["model"] | moments | {"step": torch.tensor(state["progress"]["step"])}


def main() -> None:
    """Rehearse, and print what happened."""
    from examples.toybox.world.__main__ import write_split
    from tests.runners.worker import options

    with tempfile.TemporaryDirectory() as name, two_machines() as machines:
        folder = Path(name)
        for split, count in (("train", 97), ("val", 5), ("test", 19)):
            write_split(folder, split, count, seed=11)
        settings = [*options(folder), "run.batch_size_train=1", "run.accum_grad_iters=2"]
        settings += ["run.save_every_steps=1", "run.device=cpu"]
        begun = time.monotonic()
        whole = [f"run.output_dir={folder / 'unbroken'}"]
        project = "lavis/projects/toybox/train.yaml"
        for machine in machines:
            machine.launch(
                ["train.py", "--cfg-path", project, "--options", *settings, *whole], folder
            )
        for machine in machines:
            assert machine.finish() == 0, machine.log()
        print(f"unbroken: {time.monotonic() - begun:.0f} s")
        begun = time.monotonic()
        for event in train_with_deaths(machines, settings, folder / "broken", folder):
            print(event)
        print(f"with three deaths: {time.monotonic() - begun:.0f} s")
        one, other = final(folder / "unbroken"), final(folder / "broken")
        same = one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())
        print(
            f"{len(one)} tensors after step {int(one['step'])}: {'equal' if same else 'DIFFERENT'}"
        )


if __name__ == "__main__":
    main()
