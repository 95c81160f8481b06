"""Disks that are full, read-only, or lose their power. Needs root, to mount some."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from machines import SETTINGS, course
from namespaces import why_not
from program import CONFIG, environment, run, train
from safetensors.torch import save_file

from mtl_dist.training.checkpoints import checkpoints_of, save_checkpoint
from mtl_dist.training.resume import find_start
from mtl_dist.training.settings import load_settings
from mtl_dist.training.storage import check_storage, explain_storage
from mtl_dist.training.together import RunError

REASON = why_not()
needs_root = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def settings(output, *overrides):
    return load_settings(CONFIG, [f"output_dir={output}", *overrides])


@pytest.fixture
def small(tmp_path):
    """A disk of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int) -> None:
    free = shutil.disk_usage(folder).free
    (folder / "other").write_bytes(bytes(max(0, free - leave)))


class Writes:
    """What `save_checkpoint` uses of an accelerator: it writes 1 MB in one of the ways that real ones do."""

    num_processes, process_index, is_main_process, is_local_main_process = 1, 0, True, True
    distributed_type = "NO"

    class state:
        deepspeed_plugin = None

    def __init__(self, way):
        self.way = way

    def save_state(self, folder):
        self.way(Path(folder))


LARGE = torch.arange(131072.0).repeat(2)
WAYS = {
    "torch": lambda folder: torch.save({"a": LARGE}, folder / "a.bin"),
    "safetensors": lambda folder: save_file({"a": LARGE}, folder / "a.safetensors"),
    "python": lambda folder: (folder / "a").write_bytes(bytes(1 << 20)),
}


@needs_root
@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_is_told_and_left_as_it_was(small, way):
    saved = save_checkpoint(Writes(WAYS[way]), settings(small), 10)
    fill(small, 300_000)
    words = r"small. has no space left \(\d.* free, and a checkpoint needs 1.\d\d? MB\): delete files"
    with pytest.raises(RunError, match=words):
        save_checkpoint(Writes(WAYS[way]), settings(small), 20)
    assert list((small / "checkpoints").iterdir()) == [saved], "the unfinished one fills the disk no longer"
    assert find_start(settings(small, "resume_from=auto")).done == 10


@needs_root
def test_what_a_run_will_need_is_found_before_it_starts(small):
    save_checkpoint(Writes(WAYS["torch"]), settings(small), 10)
    check = ("--check", CONFIG, f"output_dir={small}", "steps=100", "checkpoint_every=10", "resume_from=auto")
    done = run("mtl-dist", "train", *check)
    assert done.returncode == 2
    assert "of free space, and its checkpoints will need 9.4" in done.stderr
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    with pytest.raises(
        ValueError, match=r"small' cannot be written: make it writable for this user, or choose"
    ):
        check_storage(small / "new")
    with pytest.raises(RunError, match=r"cannot be written \(Read-only file system\)"):
        save_checkpoint(Writes(WAYS["torch"]), settings(small), 20)


def test_other_errors_are_not_taken_for_the_disk(tmp_path):
    assert explain_storage(ConnectionResetError(104, "reset"), tmp_path) is None
    assert explain_storage(RuntimeError("CUDA out of memory"), tmp_path) is None
    assert "has no space left" in explain_storage(OSError(122, "Disk quota exceeded"), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file' is a file: choose another output_dir"):
        check_storage(tmp_path / "file" / "runs")


@needs_root
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_power_cut_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """A copy of the image under a live ext4 is what a power cut leaves: what was not flushed is not there."""
    image, disk = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as stream:
        stream.truncate(256 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    disk.mkdir()
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    every = ("steps=60", "checkpoint_every=2", "batch_size=32", "resume_from=auto")
    command = [*("python", "-m", "mtl_dist.train"), CONFIG, *SETTINGS, *every, "num_processes=1"]
    copies = []
    try:
        program = subprocess.Popen(
            [*map(str, command), f"output_dir={disk / 'run'}"],
            env=environment({"PYTHONPATH": str(CONFIG.parents[2])}),
        )
        while program.poll() is None:
            before = len(checkpoints_of(settings(disk / "run")))
            time.sleep(0.05)
            if before and len(copies) < 12 and before >= 2 * len(copies):
                copies.append((tmp_path / f"copy{len(copies)}", before))
                subprocess.run(["cp", "--sparse=always", image, copies[-1][0]], check=True)
        assert program.returncode == 0
        expected = course(disk / "run")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert len(copies) >= 6
    for number, (copy, before) in enumerate(copies):
        subprocess.run(["mount", "-o", "loop", copy, disk], check=True)  # the journal is replayed
        try:
            left = tmp_path / f"left{number}"
            shutil.copytree(disk / "run", left)
        finally:
            subprocess.run(["umount", "-l", disk], check=True)
        wanted = load_settings(CONFIG, [*SETTINGS, *every, f"output_dir={left}"])
        start = find_start(wanted)
        assert start.checkpoint is not None, "the run would begin again"
        assert start.notes == (), "a checkpoint is damaged"
        assert start.done >= 2 * before, "a checkpoint that had its name is gone"
        if number in (0, len(copies) - 1):
            train(left, 1, *SETTINGS, *every)
            assert course(left) == expected


@needs_root
def test_the_power_cut_can_do_harm(tmp_path):
    """Without a flush, the copy of a live image has the name and not the content."""
    image, disk = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as stream:
        stream.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    disk.mkdir()
    contents = {}
    for flushed in (False, True):
        subprocess.run(["mount", "-o", "loop", image, disk], check=True)
        try:
            (disk / f"{flushed}.tmp").write_bytes(b"state" * 1000)
            if flushed:
                with (disk / f"{flushed}.tmp").open("rb") as stream:
                    os.fsync(stream.fileno())
            (disk / f"{flushed}.tmp").rename(disk / f"{flushed}")
            folder = os.open(disk, os.O_RDONLY)
            if flushed:
                os.fsync(folder)
            os.close(folder)
            shutil.copy(image, tmp_path / "copy")
        finally:
            subprocess.run(["umount", "-l", disk], check=True)
        subprocess.run(["mount", "-o", "loop", tmp_path / "copy", disk], check=True)
        try:
            path = disk / f"{flushed}"
            contents[flushed] = path.read_bytes() if path.exists() else b""
        finally:
            subprocess.run(["umount", "-l", disk], check=True)
    assert contents == {False: b"", True: b"state" * 1000}
