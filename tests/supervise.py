"""Runs a command, and leaves none of its processes behind: `supervise.py PARENT COMMAND...`.

torchrun starts its workers in sessions of their own, so that ending its process group does not reach them.
Here Linux makes this process the parent of every orphan below it (a child subreaper). So all that the
command started is below this process until it has ended, and can be found and ended. That happens when the
command has ended, on SIGTERM, and when PARENT dies, however it dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator

SET_PARENT_DEATH_SIGNAL, SET_CHILD_SUBREAPER = 1, 36  # of <linux/prctl.h>
GRACE = 3.0  # seconds that what is left of a command that has ended has to end by itself


def own_descendants(parent: int) -> None:
    """Makes this process the parent of orphans below it. SIGTERM and the death of `parent` end them all."""

    def stop(*_: object) -> None:
        end_descendants()
        os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    if sys.platform == "linux":
        control = ctypes.CDLL(None, use_errno=True).prctl
        for option, value in ((SET_CHILD_SUBREAPER, 1), (SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)):
            if control(option, value, 0, 0, 0) != 0:
                raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it died before
        stop()


def children() -> Iterator[int]:
    """Processes whose parent this one is, the dead that were not waited for included."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="latin-1") as file:
            # the name of the program, in parentheses, may hold anything
            if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                yield int(name)


def all_ended() -> bool:
    """Waits for the dead among the children; whether none is alive."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


def end_descendants(grace: float = 0.0) -> None:
    """Ends all processes below this one, after `grace` seconds, and waits for them.

    The children of an ended process become this one's, and are ended in the next round.
    """
    limit = time.monotonic() + grace
    while not all_ended():
        if time.monotonic() >= limit:
            for pid in children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def main() -> int:
    """The command's own status."""
    own_descendants(int(sys.argv[1]))
    # Python ignores these two for itself
    ignored = [signal.SIGPIPE, signal.SIGXFSZ]
    command = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ, setsigdef=ignored)
    ended, status = os.waitpid(-1, 0)
    while ended != command:
        ended, status = os.waitpid(-1, 0)
    end_descendants(GRACE)
    if os.WIFSIGNALED(status):
        with contextlib.suppress(OSError):  # of SIGKILL
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    return os.WEXITSTATUS(status)


if __name__ == "__main__":
    sys.exit(main())
