"""Derivatives with respect to the input: exact under DeepSpeed ZeRO 0-2, refused in words elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

from launcher import succeed


def test_derivatives_under_engines_that_shard(tmp_path: Path) -> None:
    succeed("../faults/engine_derivatives.py", 2, str(tmp_path / "results"), timeout=200)
    for rank in range(2):
        results = json.loads((tmp_path / f"results.{rank}").read_text())
        assert all(results[f"zero-{stage}"] < 1e-5 for stage in range(3)), results
        for engine, message in (
            ("zero-3", "Give the features as a function"),
            ("fsdp2", "use DDP or ZeRO 0-2"),
        ):
            kind, text = results[engine]
            assert kind == "ValueError"
            assert re.search(message, text)
