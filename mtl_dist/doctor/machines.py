"""The check before a training on several machines starts: each of them runs it, and they meet at the head.

    mtl-dist doctor --machines 2 --head node0:29500 CONFIG key=value       on every machine

`launch/multinode.sh` runs it. It starts no training and needs no launcher: the head listens at its port, the
others connect, and each tells the others what it has. Every wait has an end.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from mtl_dist.doctor.facts import Facts, compare
from mtl_dist.doctor.line import Line
from mtl_dist.doctor.table import Table, TableError

_LOOK_SECONDS = 30.0  # NFS remembers for so long that a name was not there


def examine_machines(
    head: str, number: int, mine: Facts, folder: Path | None, seconds: float
) -> Iterator[Line]:
    """The lines, the same on every machine. If the machines do not meet, there is one.

    Args:
        head: host:port of the machine where they meet.
        number: of machines.
        mine: facts of this one.
        folder: that all must share; None if none is needed.
        seconds: how long to wait for the others.
    """
    try:
        with closing(Table(head, number, mine.host, seconds)) as table:
            everyone = table.exchange(mine.as_dict(), _LOOK_SECONDS)
            yield from compare([Facts(**facts) for facts in everyone])
            if folder is not None:
                yield _shared(table, folder)
    except TableError as error:
        yield Line("FAIL", "head", f"HEAD={head}", str(error))


def _shared(table: Table, folder: Path) -> Line:
    """Whether all machines see what the first one writes into a folder."""
    name, error = f".shared-{uuid.uuid4().hex}", ""
    if table.serves:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        except OSError as failure:
            error = str(failure)
    name, error = table.exchange([name, error], _LOOK_SECONDS)[0]
    sees = not error and _appears(folder / name)
    found = table.exchange([socket.gethostname(), sees], 2 * _LOOK_SECONDS)
    if table.serves:
        (folder / name).unlink(missing_ok=True)
    first, blind = found[0][0], [host for host, seen in found if not seen]
    if error:
        return Line("FAIL", "output", f"{first}: {error}", "choose an output_dir that can be written")
    if blind:
        return Line(
            "FAIL",
            "output",
            f"{str(folder)!r} is not one folder: {', '.join(blind)} cannot find what {first} wrote there",
            "choose an output_dir on a file system that all machines share, by its absolute path",
        )
    return Line("ok", "output", f"all machines see one folder {str(folder)!r}")


def _appears(path: Path) -> bool:
    end = time.monotonic() + _LOOK_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
