"""Several machines on one: network namespaces on an Ethernet switch in user space that delays every frame.

Not every kernel has netem. Each namespace has a TAP device `eth0`, whose other end this process reads: every
frame is handed on after a constant time. TCP, its windows and its acknowledgements are the kernel's own. On a
busy machine the switch is some 0.1 ms late.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_PR_SET_TIMERSLACK = 29
_MTU = 9000
_GROUP_BIT = 1  # of the first byte of a frame: it is for all hosts


class Lab:
    """Hosts on a switch.

        with Lab(2, delay=1e-3) as lab:
            process = lab.popen(0, ["ping", "-c1", lab.address(1)], os.environ)

    Leaving it removes the namespaces; processes in them must have ended.

    Args:
        hosts: how many.
        delay: seconds that a frame takes from one host to another.

    Raises:
        PermissionError: this process may not make network devices.
    """

    def __init__(self, hosts: int, delay: float) -> None:
        self._names = [f"mtl-lab-{os.getpid()}-{host}" for host in range(hosts)]
        self._delay = delay
        self._taps: list[int] = []
        self._made: list[str] = []
        self._stop = threading.Event()
        self._switch = threading.Thread(target=self._run, name="switch", daemon=True)

    def __enter__(self) -> Self:
        if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
            raise PermissionError(
                "the lab makes network namespaces and TAP devices: run it as root where /dev/net/tun exists"
            )
        try:
            for host, name in enumerate(self._names):
                self._add(host, name)
        except BaseException:
            self._remove()
            raise
        self._switch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._switch.join()
        self._remove()

    def address(self, host: int) -> str:
        """IPv4 of a host."""
        return f"10.77.0.{host + 1}"

    def popen(
        self, host: int, command: Sequence[str], environment: Mapping[str, str], output: int | None = None
    ) -> subprocess.Popen[str]:
        """Starts a command on a host; its standard output and error go to `output`."""
        inside = ["ip", "netns", "exec", self._names[host], *command]
        return subprocess.Popen(inside, env=environment, stdout=output, stderr=output, text=True)

    def _add(self, host: int, name: str) -> None:
        device = f"mtl{os.getpid() % 100000}t{host}"
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        self._taps.append(tap)
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TAP | _IFF_NO_PI))
        _ip("netns", "add", name)
        self._made.append(name)
        _ip("link", "set", device, "netns", name)
        mac = f"02:00:00:00:00:{host:02x}"
        _ip("-n", name, "link", "set", device, "name", "eth0", "address", mac, "mtu", str(_MTU))
        _ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", name, "link", "set", link, "up")

    def _remove(self) -> None:
        for tap in self._taps:
            os.close(tap)  # the device goes with it
        for name in self._made:
            _ip("netns", "delete", name)

    def _run(self) -> None:
        """Takes frames in, and gives them out when they are due; all have the same delay, so in order."""
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)  # waits are not stretched by 0.05 ms
        waiting: deque[tuple[float, int, bytes]] = deque()
        while not self._stop.is_set():
            until_next = waiting[0][0] - time.monotonic() if waiting else 0.05
            ready, _, _ = select.select(self._taps, [], [], max(0.0, until_next))
            for tap in ready:
                for frame in _frames(tap):
                    due = time.monotonic() + self._delay
                    waiting.extend((due, other, frame) for other in self._targets(tap, frame))
            while waiting and waiting[0][0] <= time.monotonic():
                _, tap, frame = waiting.popleft()
                _give(tap, frame)

    def _targets(self, source: int, frame: bytes) -> list[int]:
        if frame[0] & _GROUP_BIT:
            return [tap for tap in self._taps if tap != source]
        return [self._taps[frame[5]]] if frame[5] < len(self._taps) else []


def _frames(tap: int) -> list[bytes]:
    """The frames that wait at a device, up to 64."""
    frames: list[bytes] = []
    while len(frames) < 64:
        try:
            frames.append(os.read(tap, _MTU + 64))
        except BlockingIOError:
            break
    return frames


def _give(tap: int, frame: bytes) -> None:
    """Hands a frame to a host; a host that takes no more loses it, as on any network."""
    with contextlib.suppress(OSError):
        os.write(tap, frame)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
