"""The way of one batch through the files stays as short as it was made; see `benchmarks/walk.py`."""

from __future__ import annotations

from benchmarks.walk import walk

MOVES = 73  # half of what they were, and a look for the rehearsal of a pipeline stage; LOG.md, 2026-11-26


def test_a_batch_moves_from_file_to_file_as_little_as_it_did() -> None:
    found = walk()
    files = [file for file, _ in found.calls]
    assert files[0] == "balancer/facade.py", "the walk begins elsewhere: look at benchmarks/walk.py"
    assert {"probes/pipeline.py", "sync/synchronizer.py", "weighting/mgda.py"} <= set(files)
    assert len(found.moves) <= MOVES, "\n".join(found.moves)
