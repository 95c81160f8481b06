"""Nothing that a test starts outlives it: not on the limit, not in sessions of its own, not on a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from program import run

# a process whose child starts a session of its own, as torchrun's workers do, and whose grandchild too
TREE = """
import os, sys, time
for _ in range(2):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
        else:
            {child}
        break
with open(sys.argv[1], "a") as file:
    file.write(f"{{os.getpid()}}\\n")
time.sleep({seconds})
"""
SLEEPS, LEAVES = "pass", "os._exit(0)"


def started(file: Path, number: int) -> list[int]:
    """Ids of the processes of a tree, once all have begun."""
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        found = [int(line) for line in file.read_text().split()] if file.exists() else []
        if len(found) == number:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{number} processes were expected, and {found} began")


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def none_left(pids: list[int]) -> bool:
    """Within moments: what is ended may take one to go."""
    limit = time.monotonic() + 10
    while alive(pids) and time.monotonic() < limit:
        time.sleep(0.02)
    return not alive(pids)


@pytest.mark.parametrize(("child", "number"), [(SLEEPS, 5), (LEAVES, 3)])
def test_the_limit_ends_every_process(tmp_path: Path, child: str, number: int) -> None:
    program = TREE.format(child=child, seconds=600)
    with pytest.raises(AssertionError, match="hung for 2 s"):
        run(sys.executable, "-S", "-c", program, tmp_path / "pids", timeout=2)
    assert not alive(started(tmp_path / "pids", number))


def test_what_it_printed_is_told() -> None:
    with pytest.raises(AssertionError, match=r"(?s)hung for 2 s.*it said this.*and that"):
        run("sh", "-c", "echo it said this; echo and that >&2; sleep 600", timeout=2)


def test_another_exception_ends_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pytest's own limit, which raises in the test, or Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    clock = subprocess.Popen(["sh", "-c", f"sleep 2; kill -USR1 {os.getpid()}"])
    try:
        with pytest.raises(KeyboardInterrupt):
            run(sys.executable, "-S", "-c", TREE.format(child=SLEEPS, seconds=600), tmp_path / "pids")
    finally:
        clock.wait()
        signal.signal(signal.SIGUSR1, before)
    assert not alive(started(tmp_path / "pids", 5))


def test_a_test_run_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    command = (sys.executable, "-S", "-c", TREE.format(child=LEAVES, seconds=600), str(tmp_path / "pids"))
    program = f"from program import run; run(*{command!r})"
    runner = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    )
    pids = started(tmp_path / "pids", 3)
    runner.kill()
    runner.wait()
    assert none_left(pids)


def test_what_an_ended_command_left_is_ended(tmp_path: Path) -> None:
    program = TREE.format(child=LEAVES, seconds="0 if os.getpid() == int(sys.argv[2]) else 600")
    done = run(
        "sh", "-c", 'exec "$0" "$@" $$', sys.executable, "-S", "-c", program, tmp_path / "pids", timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert not alive(started(tmp_path / "pids", 3))


@pytest.mark.parametrize(("command", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", -9)])
def test_the_status_is_the_commands(command: str, status: int) -> None:
    assert run("sh", "-c", command).returncode == status


def test_a_signal_is_ignored_by_nobody() -> None:
    """Python ignores SIGPIPE, and what it starts would inherit that."""
    done = run("bash", "-c", "trap -p; grep SigIgn /proc/self/status")
    assert int(done.stdout.split()[-1], 16) & (1 << (signal.SIGPIPE - 1)) == 0
