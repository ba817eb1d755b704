"""Processes of a run: who am I, what do the others say."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lavis.common.errors import ConfigError, LavisError

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=30)  # rank 0 may consolidate and write a checkpoint meanwhile


def launched_world_size() -> int:
    """Processes that the launcher started, before any of them has joined the others."""
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdigit() or int(value) < 1:
        raise ConfigError(f"the environment variable WORLD_SIZE is {value!r}, not a number")
    return int(value)


def local_rank() -> int:
    """This process's number on its machine; its GPU's number."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def process_group(device_type: str, *, always: bool = False) -> Iterator[None]:
    """Join the processes that ``torch.distributed.run`` (or SLURM's script) started.

    Args:
        device_type: ``cuda`` talks over NCCL and, for what is on the CPU, gloo; ``cpu`` over gloo.
        always: make a group for a single process, too, which sharding strategies need.
    """
    world = launched_world_size()
    if (world == 1 and not always) or dist.is_initialized():
        yield
        return
    if device_type == "cuda":
        torch.cuda.set_device(local_rank())
    _check_network()
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=_TIMEOUT)
    try:
        yield
    except LavisError as error:
        if error.agreed:
            barrier()  # the launcher ends all once one has ended, and the main one writes its files
        raise
    finally:
        dist.destroy_process_group()


def machines() -> int:
    """Machines of the run, as the launcher's environment has it."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def _check_network() -> None:
    """Refuse what gloo would do: meet other machines at an address of this machine's own."""
    if machines() == 1 or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name, found = socket.gethostname(), "nothing"
    with suppress(OSError):
        found = socket.gethostbyname(name)
        if not found.startswith("127."):
            with socket.socket() as probe:
                probe.bind((found, 0))  # an address of one of its interfaces
            return
    interfaces = ", ".join(name for _, name in socket.if_nameindex() if name != "lo")
    raise ConfigError(
        f"this machine's name, {name}, stands for {found}, where other machines cannot reach it. "
        "Set the environment variable GLOO_SOCKET_IFNAME to the interface of the network between "
        f"them, and NCCL_SOCKET_IFNAME alike; there are: {interfaces}"
    )


def world_size() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes files and speaks to the user."""
    return rank() == 0


def add_up(values: Sequence[float]) -> list[float]:
    """Sums over all processes, in double precision."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gather(value: Any) -> list[Any]:
    """Every process's value, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def by_main(find: Callable[[], T]) -> T:
    """What the main process finds; what it finds wrong, all raise. Every process must call it."""
    values: list[Any] = [None]
    with raise_together():
        if is_main():
            values = [find()]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    found: T = values[0]
    return found


@contextmanager
def raise_together() -> Iterator[None]:
    """What one process finds wrong inside, all raise at its end. Every process must enter."""
    error = None
    try:
        yield
    except LavisError as caught:
        error = caught
    for first in filter(None, gather(error)):
        first.agreed = True
        raise first


def barrier() -> None:
    """Wait for all."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes first; the others find what it has put on disk."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()
