"""Compiles what DeepSpeed would compile at its first use on a CPU: `python launch/_deepspeed.py FOLDER`.

FOLDER is TORCH_EXTENSIONS_DIR. torch guards a compilation by a file called `lock`. One whose process was
killed stays, and every later launch waits for it, without a word and for ever. Here the lock is the
kernel's, which dies with its process, and a `lock` that no process has open is removed.
"""

import fcntl
import os
import sys
import time
from pathlib import Path

OPERATOR = "deepspeed_shm_comm"  # collectives in shared memory


def main() -> None:
    """Returns when the operator is there and nothing stands in the way of its use."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "mtl_dist.lock").open("w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        interrupted = remove_stale(folder / OPERATOR / "lock")
        if interrupted or not (folder / OPERATOR / f"{OPERATOR}.so").exists():
            compile_operator(folder)


def remove_stale(lock: Path) -> bool:
    """Waits for torch's lock where a process holds it; removes it, and says so, where none does."""
    while lock.exists():
        if not is_open(lock):
            lock.unlink(missing_ok=True)
            return True
        time.sleep(0.1)
    return False


def is_open(file: Path) -> bool:
    """Whether a process has it open, as the holder of torch's lock has. Of other users it cannot be seen."""
    try:
        wanted = file.stat()
    except FileNotFoundError:
        return False
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found = descriptor.stat()
        except OSError:  # closed meanwhile, or not ours
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False


def compile_operator(folder: Path) -> None:
    """Lets DeepSpeed do it, so that it finds what it looks for."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(folder)}
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    assert builder.NAME == OPERATOR, builder.NAME
    builder.load(verbose=False)


if __name__ == "__main__":
    main()
