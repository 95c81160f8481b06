"""Two machines: what happens when one dies, is cut off, has a disk of its own, or hears a signal.

bash launch/test.sh --long tests/cluster          as root, on Linux
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from machines import SETTINGS, course, last_step, torchrun, wait, wait_for_row
from namespaces import Lab, why_not
from program import train

REASON = why_not()
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
STEPS = ("steps=30", "checkpoint_every=10", "batch_size=32")
LIMIT = 240.0


@pytest.fixture
def lab():
    with Lab(2) as machines:
        yield machines


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The course of the same run on two ranks of one machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder, 2, *SETTINGS, *STEPS)
    return course(folder)


def start(lab: Lab, folder: Path, *settings: str, **others: object):
    out = f"output_dir={folder / 'run'}"
    return [
        torchrun(lab, place, folder / f"log{place}", out, *STEPS, *settings, **others) for place in (0, 1)
    ]


def said(folder: Path) -> str:
    return "\n".join((folder / f"log{place}").read_text(errors="replace") for place in (0, 1))


def ranks(lab: Lab, place: int) -> list[int]:
    """The training processes of a machine, without torchrun."""
    found = []
    for pid in lab.processes(place):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"mtl_dist.train" in command and b"torch.distributed.run" not in command:
            found.append(pid)
    return found


def test_two_machines_are_one_and_survive_the_end_of_one(lab, undisturbed, tmp_path):
    processes = start(lab, tmp_path)
    wait_for_row(tmp_path / "run", 14)
    lab.kill(1)
    started = time.monotonic()
    assert all(status != 0 for status in wait(processes, LIMIT))
    assert time.monotonic() - started < 60, "the other machine waits"
    assert last_step(tmp_path / "run") < 30
    assert wait(start(lab, tmp_path, "resume_from=auto"), LIMIT) == [0, 0], said(tmp_path)
    assert course(tmp_path / "run") == undisturbed


def test_the_machine_that_is_left_goes_on_by_itself(lab, undisturbed, tmp_path):
    """`--nnodes 1:2 --max-restarts 3`: nobody starts anything again."""
    options = ("--nnodes", "1:2", "--max-restarts", "3")
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    processes = start(lab, tmp_path, options=options, env=environment)
    wait_for_row(tmp_path / "run", 14)
    lab.kill(1)
    assert wait(processes, LIMIT)[0] == 0, said(tmp_path)
    found = course(tmp_path / "run")
    assert [row["train/global_step"] for row in found] == list(range(1, 31))
    for ours, theirs in zip(found, undisturbed, strict=True):  # on one rank, sums come in another order
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-3)
    assert "1 process(es) on cpu" in said(tmp_path)


def test_a_disk_of_its_own_is_refused_before_the_first_step(lab, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    settings = [f"output_dir={private}", *STEPS]
    places = {0: None, 1: private}
    processes = [
        torchrun(lab, place, tmp_path / f"log{place}", *settings, private=own)
        for place, own in places.items()
    ]
    assert all(status != 0 for status in wait(processes, LIMIT))
    words = "is not one folder for all ranks: ranks [1] on node1 cannot find what rank 0 on node0 wrote there"
    assert words in said(tmp_path)
    assert last_step(private) == 0


def test_names_as_debian_writes_them(undisturbed, tmp_path):
    with Lab(2, debian=True) as lab:
        assert wait(start(lab, tmp_path), LIMIT) == [0, 0], said(tmp_path)
    assert (
        "is 127.0.1.1 here (/etc/hosts), which other machines cannot reach: using GLOO_SOCKET_IFNAME=eth0"
        in (said(tmp_path))
    )
    assert course(tmp_path / "run") == undisturbed


def test_a_cut_cable_ends_the_ranks_within_the_timeout(lab, tmp_path):
    """torchrun on the machine that is cut off looks for the others up to 5 minutes longer."""
    start(lab, tmp_path, "timeout_minutes=0.5", "steps=100000")
    wait_for_row(tmp_path / "run", 14)
    lab.cut(1)
    limit = time.monotonic() + 120
    while living := [rank for place in (0, 1) for rank in ranks(lab, place)]:
        assert time.monotonic() < limit, f"ranks {living} wait\n{said(tmp_path)[-3000:]}"
        time.sleep(0.5)
    lab.mend(1)


def test_a_signal_on_one_machine_saves_on_all(lab, undisturbed, tmp_path):
    processes = start(lab, tmp_path, "checkpoint_every=1000")
    wait_for_row(tmp_path / "run", 5)
    (victim,) = ranks(lab, 1)
    os.kill(victim, signal.SIGUSR1)
    assert all(status != 0 for status in wait(processes, LIMIT))
    assert "is saved; resume_from=auto goes on from there" in said(tmp_path)
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step_")) == last_step(tmp_path / "run") >= 5
    assert wait(start(lab, tmp_path, "resume_from=auto"), LIMIT) == [0, 0], said(tmp_path)
    assert course(tmp_path / "run") == undisturbed


def test_zero_2_survives_the_end_of_a_machine(lab, tmp_path):
    runs = []
    for name, kill in (("whole", False), ("killed", True)):
        folder = tmp_path / name
        folder.mkdir()
        processes = start(lab, folder, engine="zero2")
        if kill:
            wait_for_row(folder / "run", 14)
            lab.kill(0)
            assert all(status != 0 for status in wait(processes, LIMIT))
            processes = start(lab, folder, "resume_from=auto", engine="zero2")
        assert wait(processes, LIMIT) == [0, 0], said(folder)
        runs.append(course(folder / "run"))
    assert runs[0] == runs[1]
    shutil.rmtree(tmp_path / "whole")
