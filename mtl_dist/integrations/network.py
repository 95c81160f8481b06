"""Which network interface Gloo uses, where the machine's own name does not say it.

Gloo offers other machines the address of this machine's name. Debian and Ubuntu map that name to 127.0.1.1 in
/etc/hosts, and the others then find "Connection refused", or wait.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Mapping
from contextlib import suppress

_LOGGER = logging.getLogger("mtl_dist")
VARIABLE = "GLOO_SOCKET_IFNAME"


def choose_interface(environment: Mapping[str, str] = os.environ) -> None:
    """Sets GLOO_SOCKET_IFNAME if the job has several machines and only this one can use its name's address.

    Where several interfaces may be meant, it sets none, and a warning names them.
    """
    several = environment.get("WORLD_SIZE", "1") != environment.get("LOCAL_WORLD_SIZE", "1")
    address = own_address()
    if not several or environment.get(VARIABLE) or not is_loopback(address):
        return
    found = interfaces()
    towards = address_towards(environment.get("MASTER_ADDR", ""))
    names = [name for name, own in found.items() if towards in (None, own)]
    what = f"this machine's name {socket.gethostname()!r} is {address} here (/etc/hosts)"
    if len(names) == 1:
        os.environ[VARIABLE] = names[0]
        _LOGGER.warning(
            "mtl_dist: %s, which other machines cannot reach: using %s=%s", what, VARIABLE, names[0]
        )
    elif names:
        listed = ", ".join(f"{name} ({found[name]})" for name in names)
        _LOGGER.warning(
            "mtl_dist: %s. If the ranks cannot connect, set %s to the interface that leads to the other "
            "machines, one of %s",
            what,
            VARIABLE,
            listed,
        )


def own_address() -> str | None:
    """The address of this machine's name, which Gloo offers to the others; None if it has none."""
    with suppress(OSError):
        return str(socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0])
    return None


def is_loopback(address: str | None) -> bool:
    """Whether only this machine itself can use an address."""
    return address is not None and ipaddress.ip_address(address.partition("%")[0]).is_loopback


def address_towards(host: str) -> str | None:
    """This machine's address on the way to `host`; None if there is none, or `host` is this machine."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        address: str = probe.getsockname()[0]
        return None if is_loopback(address) else address
    return None


def interfaces() -> dict[str, str]:
    """IPv4 address by interface, without loopback. Empty where the system does not tell."""
    try:
        import fcntl
    except ImportError:  # Windows
        return {}
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none, or is down
                request = name.encode()[:15].ljust(256, b"\0")
                address = socket.inet_ntoa(fcntl.ioctl(asking.fileno(), _GET_ADDRESS, request)[20:24])
                if not is_loopback(address):
                    found[name] = address
    return found


_GET_ADDRESS = 0x8915  # SIOCGIFADDR of <linux/sockios.h>
