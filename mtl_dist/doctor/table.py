"""Where machines meet before there is a job: one listens, the others connect, and all get what all say.

Plain sockets with a limit to every wait. torch's own store waits without end where another program has the
port, and its clients print a stack where it closes.
"""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from typing import Any

from mtl_dist.integrations.network import is_loopback

_GREETING = "mtl_dist machines"


class TableError(RuntimeError):
    """The machines do not meet. The message says what to change."""


class Table:
    """A meeting of several machines. Values are JSON.

    Args:
        head: host:port; the machine that has this address serves.
        number: of machines.
        name: of this one, for the words where some do not come.
        seconds: how long to wait for the others.

    Attributes:
        serves: whether this is the head.

    Raises:
        TableError: they do not meet.
    """

    def __init__(self, head: str, number: int, name: str, seconds: float) -> None:
        self._host, self._port = _split(head)
        self._seats: list[tuple[socket.socket, Any]] = []
        addresses = self._addresses()
        end = time.monotonic() + seconds
        listener = self._listen() if any(map(_is_own, addresses)) else None
        self.serves = listener is not None
        if listener is not None:
            with listener:
                self._welcome(listener, number, name, end)
        else:
            self._join(name, addresses, end)

    def exchange(self, mine: Any, seconds: float) -> list[Any]:
        """What every machine gives, the same list on all of them; the head's comes first.

        Raises:
            TableError: a machine has left, or takes longer.
        """
        try:
            for connection, _ in self._seats:
                connection.settimeout(seconds)
            if not self.serves:
                _write(self._seats[0], mine)
                everyone: list[Any] = _read(self._seats[0])
                return everyone
            everyone = [mine, *map(_read, self._seats)]
            for seat in self._seats:
                _write(seat, everyone)
            return everyone
        except (OSError, ValueError) as error:
            raise TableError(f"another machine has stopped this check ({error}); see what it says") from None

    def close(self) -> None:
        """Leaves. The head leaves last and frees its port, which the training needs."""
        if self.serves:
            for connection, lines in self._seats:
                with suppress(OSError, ValueError):
                    connection.settimeout(5)
                    lines.readline()  # its end: all others have left
        for connection, lines in self._seats:
            if not self.serves:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
                    lines.readline()  # until the head has left
            _drop((connection, lines))

    def _addresses(self) -> list[tuple[Any, ...]]:
        try:
            return socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise TableError(
                f"{self._host!r} has no address on {socket.gethostname()} ({error.strerror}): use the IP "
                f"address of that machine, or add its name to /etc/hosts"
            ) from None

    def _listen(self) -> socket.socket | None:
        """None: the port is taken, perhaps by the part of another machine that runs here."""
        both = socket.has_dualstack_ipv6()
        family, everywhere = (socket.AF_INET6, "::") if both else (socket.AF_INET, "")
        try:
            return socket.create_server((everywhere, self._port), family=family, dualstack_ipv6=both)
        except OSError:
            return None

    def _welcome(self, listener: socket.socket, number: int, name: str, end: float) -> None:
        came = [name]
        while len(came) < number:
            listener.settimeout(max(0.01, end - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                for seat in self._seats:
                    _drop(seat)
                raise TableError(
                    f"{len(came)} of {number} machines came in time: {', '.join(came)}. Start the same "
                    f"command on the others{self._loopback_advice()}"
                ) from None
            seat = connection, connection.makefile("r", encoding="utf-8")
            connection.settimeout(5)
            try:
                greeting, their_name = _read(seat)
                if greeting != _GREETING:
                    raise ValueError(greeting)
                _write(seat, _GREETING)
            except (OSError, ValueError):  # something else that looks at the port
                _drop(seat)
                continue
            came.append(their_name)
            self._seats.append(seat)

    def _join(self, name: str, addresses: list[tuple[Any, ...]], end: float) -> None:
        own = any(map(_is_own, addresses))
        if own:  # whoever has the port is here already
            end = min(end, time.monotonic() + 5)
        while True:
            if (seat := self._greeted(name)) is not None:
                self._seats.append(seat)
                return
            if time.monotonic() > end:
                raise TableError(self._nobody(addresses, own=own))
            time.sleep(0.2)

    def _greeted(self, name: str) -> tuple[socket.socket, Any] | None:
        """A connection to a head that answers; None if there is none yet."""
        try:
            connection = socket.create_connection((self._host, self._port), timeout=5)
        except OSError:
            return None
        seat = connection, connection.makefile("r", encoding="utf-8")
        with suppress(OSError, ValueError):
            _write(seat, [_GREETING, name])
            if _read(seat) == _GREETING:
                return seat
        _drop(seat)
        return None

    def _nobody(self, addresses: list[tuple[Any, ...]], *, own: bool) -> str:
        if own:
            here = socket.gethostname()
            return f"port {self._port} is used by another program on {here}: give HEAD another port"
        shown = ", ".join(sorted({str(entry[4][0]) for entry in addresses}))
        return (
            f"nothing answers at {shown} port {self._port}: start the same command on {self._host}, and let "
            f"its firewall accept the port"
        )

    def _loopback_advice(self) -> str:
        address = str(self._addresses()[0][4][0])
        if not is_loopback(address):
            return ""
        return f"; {self._host} is {address} on {socket.gethostname()}, where only itself can reach it"


def _split(head: str) -> tuple[str, int]:
    host, _, port = head.rpartition(":")
    if not host or not port.isdigit():
        raise TableError(f"give host:port of one of the machines, such as node0:29500, got {head!r}")
    return host.strip("[]"), int(port)


def _is_own(entry: tuple[Any, ...]) -> bool:
    """Whether an address is one of this machine."""
    family, kind, protocol, _, address = entry
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.bind((address[0], 0, *address[2:]))
    except OSError:
        return False
    return True


def _read(seat: tuple[socket.socket, Any]) -> Any:
    return json.loads(seat[1].readline())


def _write(seat: tuple[socket.socket, Any], value: Any) -> None:
    seat[0].sendall((json.dumps(value) + "\n").encode())


def _drop(seat: tuple[socket.socket, Any]) -> None:
    seat[1].close()
    seat[0].close()
