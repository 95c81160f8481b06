"""What can be seen before ranks wait for another machine: its name, and locks of compilations."""

from __future__ import annotations

import logging
import os
import socket
from datetime import timedelta

import pytest

from mtl_dist.integrations import accelerate, network
from mtl_dist.integrations.compiling import stale_locks, warn_of_stale_locks

TWO_MACHINES = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "head"}


@pytest.fixture
def machine(monkeypatch):
    """A machine with these interfaces, whose name has this address; `towards` leads to the head."""
    monkeypatch.delenv(network.VARIABLE, raising=False)

    def of(address, interfaces, towards=None):
        monkeypatch.setattr(network, "own_address", lambda: address)
        monkeypatch.setattr(network, "interfaces", lambda: interfaces)
        monkeypatch.setattr(network, "address_towards", lambda host: towards)

    yield of
    os.environ.pop(network.VARIABLE, None)


def test_debians_name_is_cured_by_the_interface_that_leads_to_the_head(machine, caplog):
    machine("127.0.1.1", {"docker0": "172.17.0.1", "eth0": "10.0.0.2"}, towards="10.0.0.2")
    network.choose_interface(TWO_MACHINES)
    assert os.environ[network.VARIABLE] == "eth0"
    assert (
        "is 127.0.1.1 here (/etc/hosts), which other machines cannot reach: using GLOO_SOCKET_IFNAME=eth0"
        in (caplog.text)
    )


def test_several_interfaces_are_named(machine, caplog):
    machine("127.0.1.1", {"eth0": "10.0.0.2", "eth1": "10.1.0.2"})
    network.choose_interface(TWO_MACHINES)
    assert network.VARIABLE not in os.environ
    assert "set GLOO_SOCKET_IFNAME to the interface that leads to the other machines, one of" in caplog.text
    assert "eth0 (10.0.0.2), eth1 (10.1.0.2)" in caplog.text


@pytest.mark.parametrize(
    ("address", "interfaces", "environment"),
    [
        ("10.0.0.2", {"eth0": "10.0.0.2"}, TWO_MACHINES),
        (None, {"eth0": "10.0.0.2"}, TWO_MACHINES),
        ("127.0.1.1", {}, TWO_MACHINES),
        ("127.0.1.1", {"eth0": "10.0.0.2"}, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}),
        ("127.0.1.1", {"eth0": "10.0.0.2"}, {}),
        ("127.0.1.1", {"eth0": "10.0.0.2"}, {**TWO_MACHINES, network.VARIABLE: "ib0"}),
    ],
)
def test_else_nothing_is_changed(machine, caplog, address, interfaces, environment):
    machine(address, interfaces)
    network.choose_interface(environment)
    assert network.VARIABLE not in os.environ
    assert caplog.text == ""


def test_interfaces_are_those_of_the_system():
    for name, address in network.interfaces().items():
        assert name in dict(map(reversed, socket.if_nameindex()))
        assert socket.inet_aton(address)
    assert network.is_loopback("::1")
    assert network.is_loopback("127.0.1.1")
    assert not network.is_loopback("fe80::1%eth0")
    assert network.address_towards("127.0.0.1") is None


def test_a_lock_without_its_process_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for operator in ("stale", "held"):
        (tmp_path / operator).mkdir()
    (tmp_path / "stale" / "lock").touch()
    with (tmp_path / "held" / "lock").open("w"):
        assert stale_locks() == [tmp_path / "stale" / "lock"]
        with caplog.at_level(logging.WARNING, "mtl_dist"):
            warn_of_stale_locks()
    assert caplog.text.count("is left by a compilation that was interrupted") == 1
    assert str(tmp_path / "stale" / "lock") in caplog.text


@pytest.mark.parametrize("minutes", [1, 10, 45])
def test_the_timeout_reaches_the_process_group(monkeypatch, minutes):
    """10 minutes too, which Accelerate takes for its default and drops; with Gloo the ranks would wait 30."""
    given = {}

    class Started(Exception):
        pass

    def fake(**options):
        given.update({} if not options["kwargs_handlers"] else options["kwargs_handlers"][0].to_kwargs())
        raise Started

    monkeypatch.setattr(accelerate, "Accelerator", fake)
    with pytest.raises(Started):
        accelerate.start(timeout=timedelta(minutes=minutes))
    assert given["timeout"] == timedelta(minutes=minutes, microseconds=1)
