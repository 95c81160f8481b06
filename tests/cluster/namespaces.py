"""Machines as network namespaces of this one: own addresses, own names, and a cable that can be cut.

Needs root, iproute2 and unshare. `why_not()` says what is missing.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
_NUMBER = itertools.count()


def why_not() -> str | None:
    """Why there can be no machines here; None where there can."""
    if os.environ.get("CI"):
        return "not in CI: network namespaces and mounts are not for shared machines"
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    missing = [tool for tool in ("ip", "unshare", "mount") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} is missing (Debian: iproute2, util-linux)"
    name = f"try{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    if tried.returncode:
        return f"the kernel allows no network namespace: {tried.stderr.strip()}"
    return None


class Lab:
    """Machines node0, node1, ... on one switch.

    Args:
        number: of machines.
        debian: each machine's own name is 127.0.1.1 in its /etc/hosts, as Debian and Ubuntu write it.
    """

    def __init__(self, number: int, *, debian: bool = False) -> None:
        # the kernel may take a while to remove the cables of an earlier one
        self._token = f"{os.getpid() % 100000}{chr(97 + next(_NUMBER) % 26)}"
        self._debian = debian
        self._started: list[subprocess.Popen[bytes]] = []
        self.names = [f"node{place}" for place in range(number)]

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _build(self) -> None:
        _ip("link", "add", self._switch, "type", "bridge")
        _ip("link", "set", self._switch, "up")
        for place, name in enumerate(self.names):
            space, cable = self._space(place), self._cable(place)
            _ip("netns", "add", space)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", cable, "master", self._switch, "up")
            _ip("-n", space, "addr", "add", f"{self.address(place)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            own = "127.0.1.1" if self._debian else self.address(place)
            lines = ["127.0.0.1 localhost", f"{own} {name}"]
            others = [other for other in range(len(self.names)) if other != place]
            lines += [f"{self.address(other)} {self.names[other]}" for other in others]
            folder = Path("/etc/netns") / space  # `ip netns exec` mounts what is here over /etc
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hosts").write_text("\n".join(lines) + "\n")

    def close(self) -> None:
        """Ends what runs on the machines, and removes them."""
        for place in range(len(self.names)):
            self.kill(place)
            subprocess.run(["ip", "netns", "del", self._space(place)], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / self._space(place), ignore_errors=True)
        subprocess.run(["ip", "link", "del", self._switch], capture_output=True)
        for process in self._started:
            process.wait(20)

    def address(self, place: int) -> str:
        return f"10.77.0.{place + 1}"

    def command(
        self, place: int, *command: object, private: Path | None = None, cwd: Path = ROOT
    ) -> list[str]:
        """The command line that runs a command on a machine.

        Args:
            place: of the machine.
            command: with its arguments.
            private: a folder that is this machine's own disk.
            cwd: where it runs.
        """
        own = f'mount -t tmpfs none "{private}"; ' if private else ""
        script = f'hostname {self.names[place]}; {own}cd "{cwd}"; exec "$@"'
        inside = ["unshare", "--uts", "--mount", "sh", "-ec", script, "sh"]
        return ["ip", "netns", "exec", self._space(place), *inside, *(str(part) for part in command)]

    def start(
        self, place: int, *command: object, env: dict[str, str], log: Path, **others: Any
    ) -> subprocess.Popen[bytes]:
        """Starts a command on a machine, with all of its environment; `log` gets what it prints."""
        with log.open("ab") as stream:
            started = subprocess.Popen(
                self.command(place, *command, **others),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self._started.append(started)
        return started

    def processes(self, place: int) -> list[int]:
        """All processes on a machine."""
        told = subprocess.run(["ip", "netns", "pids", self._space(place)], capture_output=True, text=True)
        return [int(pid) for pid in told.stdout.split()]

    def kill(self, place: int) -> None:
        """Ends all processes on a machine at once, as its end would."""
        limit = time.monotonic() + 20
        while (pids := self.processes(place)) and time.monotonic() < limit:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def cut(self, place: int) -> None:
        """Pulls the cable: packets are lost, and no connection hears of it."""
        _ip("link", "set", self._cable(place), "down")

    def mend(self, place: int) -> None:
        """Plugs the cable in again."""
        _ip("link", "set", self._cable(place), "up")

    @property
    def _switch(self) -> str:
        return f"sw{self._token}"

    def _space(self, place: int) -> str:
        return f"mtl{self._token}-{place}"

    def _cable(self, place: int) -> str:
        return f"ca{self._token}-{place}"


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
