"""Ranks that are forked with their imports made are those that torchrun starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from program import ROOT, run

SCRIPT = Path(__file__).parent / "both_ways.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(ROOT), "/nowhere"]), "EXTRA": "1"}


def launched(way: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    if way == "warm":
        return warm.launch(SCRIPT, 2, *arguments, env=ENVIRONMENT)
    return run(sys.executable, *TORCHRUN, SCRIPT, *arguments, env=ENVIRONMENT)


def test_both_ways_run_the_same_ranks(tmp_path: Path) -> None:
    """Environment, arguments, paths and results; and draws from generators that nobody seeded."""
    found = {}
    for way in ("torchrun", "warm"):
        done = launched(way, tmp_path / way, "works")
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.splitlines()) == ["rank 0 prints", "rank 1 prints"]
        assert "rank 1 complains" in done.stderr
        found[way] = [json.loads(Path(f"{tmp_path / way}.{rank}").read_text()) for rank in range(2)]
    assert found["warm"] == found["torchrun"]
    assert [facts["environment"]["RANK"] for facts in found["warm"]] == ["0", "1"]
    assert found["warm"][0]["other draws on every rank"] == [True] * 3


@pytest.mark.parametrize("way", ["torchrun", "warm"])
def test_a_rank_that_fails_ends_the_others(tmp_path: Path, way: str) -> None:
    done = launched(way, tmp_path / way, "fails")
    assert done.returncode != 0
    assert "KeyError: 'no such file'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_on_the_limit_ranks_and_what_they_started_are_ended(tmp_path: Path) -> None:
    script = tmp_path / "sleeps.py"
    script.write_text(
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "open(sys.argv[1], 'a').write(f'{os.getpid()} {child.pid}\\n')\n"
        "print('begun')\n"
        "time.sleep(600)\n"
    )
    warm.launch(SCRIPT, 1, env={"ENDS": "1"})  # its server is there already: the limit is the script's alone
    with pytest.raises(AssertionError, match=r"(?s)hung for 3 s.*begun"):
        warm.launch(script, 2, tmp_path / "pids", timeout=3)
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 4
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_what_ranks_leave_is_ended(tmp_path: Path) -> None:
    script = tmp_path / "leaves.py"
    script.write_text("import subprocess; print(subprocess.Popen(['sleep', '600']).pid)\n")
    done = warm.launch(script, 1)
    assert done.returncode == 0
    assert not Path(f"/proc/{done.stdout.strip()}").exists()


def test_what_is_read_at_import_cannot_differ(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="DS_ACCELERATOR is read at import"):
        warm.launch(SCRIPT, 1, env={"DS_ACCELERATOR": "cuda"})


def test_a_thread_before_the_fork_is_refused(tmp_path: Path) -> None:
    thread = "threading.Thread(target=threading.Event().wait, daemon=True)"
    (tmp_path / "threaded.py").write_text(f"import threading; {thread}.start()\n")
    code = f"import sys; sys.path[:0] = [{str(SCRIPT.parent)!r}, {str(tmp_path)!r}]; import warm_server\n"
    done = run(sys.executable, "-c", code + "warm_server.warm(['threaded'])", timeout=60)
    assert "start threads" in done.stderr
