"""What the machines of a job must have in common, and the lines where they do not."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mtl_dist.doctor.line import Line
from mtl_dist.doctor.versions import versions
from mtl_dist.integrations.network import VARIABLE, address_towards, interfaces, is_loopback, own_address

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Facts:
    """One machine of a job.

    Attributes:
        host: its name.
        versions: version by package.
        code: a digest of the package's files.
        commit: of the repository; "" where git does not know it.
        settings: a digest of what is trained; "" if that is not known.
        processes: that it will run, and on what.
        address: of its own name, which Gloo offers to the others.
        interface: GLOO_SOCKET_IFNAME, if it is set.
        choices: address by interface.
        towards: its address on the way to the head.
    """

    host: str
    versions: Mapping[str, str]
    code: str
    commit: str = ""
    settings: str = ""
    processes: str = ""
    address: str | None = None
    interface: str | None = None
    choices: Mapping[str, str] | None = None
    towards: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        return asdict(self)


def gather_facts(settings: str = "", processes: str = "", head: str = "") -> Facts:
    """Those of this machine.

    Args:
        settings: anything that must be equal on all machines.
        processes: number and kind of its processes.
        head: name or address of the machine where all meet.
    """
    return Facts(
        host=socket.gethostname(),
        versions={"Python": platform.python_version(), **versions()},
        code=_code(),
        commit=_commit(),
        settings=_short(settings) if settings else "",
        processes=processes,
        address=own_address(),
        interface=os.environ.get(VARIABLE),
        choices=interfaces(),
        towards=address_towards(head) if head else None,
    )


def compare(machines: Sequence[Facts]) -> Iterator[Line]:
    """The lines of a job on these machines. Each problem is one line, with what cures it."""
    yield Line("ok", "machines", f"{len(machines)}: {', '.join(facts.host for facts in machines)}")
    for name, what, cure in _EQUAL:
        values = [what(facts) for facts in machines]
        if len(set(values)) > 1:
            if name == "code":  # a digest tells nobody which one is old
                values = [
                    f"{value}, commit {facts.commit or 'unknown'}"
                    for facts, value in zip(machines, values, strict=True)
                ]
            rows = [f"{facts.host}: {value or 'none'}" for facts, value in zip(machines, values, strict=True)]
            yield Line("FAIL", name, f"machines differ: {'; '.join(rows)}", cure)
        elif values[0]:
            yield Line("ok", name, f"the same on all machines: {values[0]}")
    if not torch.accelerator.is_available():  # NCCL does not go by the machine's name
        for facts in machines:
            yield from _interface(facts)


def _interface(facts: Facts) -> Iterator[Line]:
    """Whether others can reach the address that this machine's name has."""
    if facts.interface is not None or not is_loopback(facts.address):
        return
    choices = dict(facts.choices or {})
    fitting = [name for name, own in choices.items() if facts.towards in (None, own)]
    what = f"{facts.host}: its own name is {facts.address} there (/etc/hosts), which others cannot reach"
    if len(fitting) == 1:
        yield Line("ok", "interface", f"{what}: {VARIABLE}={fitting[0]} will be used")
    else:
        listed = " or ".join(f"{name} ({own})" for name, own in choices.items())
        cure = f"on {facts.host}: export {VARIABLE}=... with the interface that leads to the others: {listed}"
        yield Line("FAIL", "interface", what, cure)


def _versions(facts: Facts) -> str:
    return ", ".join(f"{name} {version}" for name, version in facts.versions.items())


_EQUAL: tuple[tuple[str, Callable[[Facts], str], str], ...] = (
    (
        "code",
        lambda facts: f"files {facts.code}",
        "git pull, or copy the repository, so that all have the same commit",
    ),
    ("packages", _versions, "pip install -c constraints.txt -e . on every machine"),
    ("settings", lambda facts: facts.settings, "give the same engine, CONFIG and key=value on every machine"),
    ("processes", lambda facts: facts.processes, "set NPROC_PER_NODE to the same number on every machine"),
)


def _code() -> str:
    content = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        content.update(file.relative_to(_PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return content.hexdigest()[:12]


def _commit() -> str:
    command = ["git", "-C", str(_PACKAGE), "rev-parse", "--short=12", "HEAD"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    return ""


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
