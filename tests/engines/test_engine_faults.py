"""An exception on one rank ends all ranks, under every engine."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import warm
from engine_faults import HEALED
from matrix import START_LIMIT, run_script

# a rank that fails alone waits 30 s for the others to hear of it (sync.py), then its launcher ends them
LEAVE_SECONDS = 30.0


def test_a_head_that_raises_on_one_rank_raises_on_all(tmp_path: Path) -> None:
    done = run_script(
        *("engine_faults.py", 2, "heads", tmp_path / "raised"), timeout=START_LIMIT, modules=warm.DEEPSPEED
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"raised.{rank}").read_text()) for rank in range(2)]
    for name in HEALED:
        assert ranks[1][name] == ["KeyError", "'no such label'"]
        assert ranks[0][name][0] == "PeerFailed", ranks[0][name]
        assert "rank 1 failed before it had its statistics" in ranks[0][name][1]


@pytest.mark.parametrize(
    ("engine", "torchrun"),
    [
        *(pytest.param(engine, True, marks=pytest.mark.long) for engine in ("ddp", "zero-2", "zero-3")),
        pytest.param("accelerate zero-2", True, marks=pytest.mark.long),
        ("fsdp2", True),
        # ended as torchrun ends them (test_warm.py), in a third of its time
        ("zero-3", False),
    ],
)
def test_an_exception_elsewhere_ends_the_job(engine: str, torchrun: bool) -> None:
    """Rank 0 waits in a collective of the engine's or ours; the launcher ends it."""
    done = run_script(
        *("engine_faults.py", 2, "before", engine),
        timeout=START_LIMIT,
        modules=warm.DEEPSPEED,
        torchrun=torchrun,
    )
    assert done.returncode != 0
    assert "KeyError: 'no such file'" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("engine", ["fsdp2", "zero-3"])
def test_a_head_that_raises_among_the_engines_collectives_ends_the_job(engine: str) -> None:
    """Rank 0 waits for parameters that rank 1 does not gather any more."""
    began = time.monotonic()
    limit = START_LIMIT + LEAVE_SECONDS
    done = run_script("engine_faults.py", 2, "head", engine, timeout=limit, torchrun=True)
    assert done.returncode != 0
    assert "KeyError: 'no such label'" in done.stderr
    assert time.monotonic() - began < START_LIMIT + LEAVE_SECONDS
