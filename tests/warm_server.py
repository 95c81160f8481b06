"""Imports what takes seconds, once, then forks ranks that run a script: `warm_server.py MODULE...`.

A line of JSON on standard input asks for a server, or for a launch. A server is a fork that imports further
modules; the answer is what the imports printed. A launch is made by the server whose modules it names, and
answered when all its ranks have ended. The ranks are processes with the environment that torchrun would give
them; only their imports were made before. Two things differ from torchrun's: they order sets of strings
alike, as the seed of hashes is the server's, and the modules that were imported here do not see what a launch
adds to the environment. So nothing here may read it when it is imported, but for what every server is given:
see warm.py.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import random
import runpy
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from supervise import GRACE, end_descendants, own_descendants

FORKABLE = {"jemalloc_bg_thd"}  # of pyarrow; jemalloc itself ends it before a fork and starts it after
LAST_WORDS = 1.0  # seconds that the other ranks have to tell what they saw, when one has failed


def main() -> None:
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    own_descendants(os.getppid())
    tell(replies, {"said": warm(sys.argv[1:])})
    servers: dict[tuple[str, ...], tuple[io.TextIOBase, io.TextIOBase]] = {}
    while line := requests.readline():
        modules = tuple(json.loads(line)["modules"])
        server = servers.get(modules) or fork_server((requests, replies))
        if server is None:  # this is a server or a rank that has done its work
            return
        asked, answers = servers[modules] = server
        asked.write(line)
        asked.flush()
        answer = answers.readline()
        if not answer:  # the server has failed, and said why
            return
        replies.write(answer)
        replies.flush()


def fork_server(others: tuple[io.TextIOBase, ...]) -> tuple[io.TextIOBase, io.TextIOBase] | None:
    """Ends of the pipes to it and from it; None in it. `others` are not for it."""
    parent, requests, replies = os.getpid(), os.pipe(), os.pipe()
    if os.fork() == 0:
        for file in others:
            file.close()
        os.close(requests[1])
        os.close(replies[0])
        own_descendants(parent)
        serve(os.fdopen(requests[0]), os.fdopen(replies[1], "w"))
        return None
    os.close(requests[0])
    os.close(replies[1])
    return os.fdopen(requests[1], "w"), os.fdopen(replies[0])


def serve(requests: io.TextIOBase, replies: io.TextIOBase) -> None:
    """Answers the first request by its imports, the others by a launch each."""
    tell(replies, {"said": warm(json.loads(requests.readline())["modules"])})
    while line := requests.readline():
        request = json.loads(line)
        ranks = {}
        for rank in range(request["num_processes"]):
            pid = os.fork()
            if pid == 0:
                requests.close()  # the files, not their numbers, which a socket of the rank may get
                replies.close()
                become(request, rank)
                return
            ranks[pid] = rank
        tell(replies, {"statuses": wait(ranks)})


def tell(replies: io.TextIOBase, what: dict[str, Any]) -> None:
    replies.write(json.dumps(what) + "\n")
    replies.flush()


def warm(modules: list[str]) -> str:
    """Imports; returns what that printed. A thread that an import starts would be missing in the ranks."""
    own = os.dup(2)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            for module in modules:
                importlib.import_module(module)
        finally:
            os.dup2(own, 1)
            os.dup2(own, 2)
            os.close(own)
        file.seek(0)
        said = file.read()
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert sum(name not in FORKABLE for name in threads) == 1, f"{modules} start threads: {threads}"
    gc.collect()
    gc.freeze()  # collections in the ranks leave these pages shared
    return said


def become(request: dict[str, Any], rank: int) -> None:
    """Turns a fork into the process that torchrun would have started, and runs the script in it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for descriptor, name in enumerate((os.devnull, request["out"], request["err"])):
        file = os.open(name, os.O_RDWR | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    own = [sys.path[0], *split(os.environ.get("PYTHONPATH", ""))]
    gathered = [folder for folder in sys.path if folder not in own]
    os.environ.clear()
    os.environ.update(request["env"])
    if request["num_processes"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), ROLE_RANK=str(rank))
    os.chdir(request["cwd"])
    script = request["script"]
    first = os.path.dirname(script) if script.endswith(".py") else os.getcwd()
    sys.path[:] = [first, *split(os.environ.get("PYTHONPATH", "")), *gathered]
    sys.argv[:] = [script, *request["arguments"]]
    scatter()
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def split(path: str) -> list[str]:
    return path.split(os.pathsep) if path else []


def scatter() -> None:
    """Draws new seeds: processes that are started do not share them, and forks do."""
    random.seed()
    for generator, module in (("numpy", "numpy.random"), ("torch", "torch")):
        if generator in sys.modules:
            sys.modules[module].seed()


def wait(ranks: dict[int, int]) -> list[int | None]:
    """Status of each rank. Where one fails the others are ended, whose status is then None."""
    statuses: list[int | None] = [None] * len(ranks)
    while ranks:
        pid, status = os.waitpid(-1, 0)
        if pid in ranks:
            code = statuses[ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
            if code != 0:
                break
    end_descendants(LAST_WORDS if ranks else GRACE)
    return statuses


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
