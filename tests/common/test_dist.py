"""Processes on several machines: whether they can reach each other."""

from __future__ import annotations

import socket

import pytest

from lavis.common import dist
from lavis.common.errors import ConfigError


@pytest.fixture()
def two_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "ib0")])


@pytest.mark.usefixtures("two_machines")
@pytest.mark.parametrize("address", ["127.0.1.1", "192.0.2.77", None])
def test_a_name_that_others_cannot_reach(
    monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    """Debian's default, an address that this machine does not have, and no address."""

    def resolve(name: str) -> str:
        assert name == "here"
        if address is None:
            raise socket.gaierror("unknown")
        return address

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    with pytest.raises(ConfigError) as caught:
        dist._check_network()
    assert str(caught.value) == (
        f"this machine's name, here, stands for {address or 'nothing'}, where other machines "
        "cannot reach it. Set the environment variable GLOO_SOCKET_IFNAME to the interface of the "
        "network between them, and NCCL_SOCKET_IFNAME alike; there are: eth0, ib0"
    )
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    dist._check_network()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    dist._check_network()


@pytest.mark.usefixtures("two_machines")
def test_a_name_that_others_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "0.0.0.0")  # binds everywhere
    dist._check_network()
