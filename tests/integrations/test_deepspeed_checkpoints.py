"""A balancer in plain DeepSpeed's checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm
from program import ROOT

from mtl_dist import Balancer, checkpoint
from mtl_dist.integrations.deepspeed import load_checkpoint, save_checkpoint
from mtl_dist.weighting import MGDA, RLW

SCRIPT = Path(__file__).parent / "deepspeed_run.py"


@pytest.mark.timeout(300)
def test_an_engine_and_its_balancer_resume_together(tmp_path: Path) -> None:
    out = tmp_path / "run"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "distributed")])
    done = warm.launch(SCRIPT, 2, out, env={"PYTHONPATH": path}, timeout=280, modules=warm.DEEPSPEED)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]
    for facts in ranks:
        assert (facts["world_size"], facts["zero"]) == (2, 1)
        assert (facts["path"], facts["client"]) == ("global_step3", 1)
        assert facts["resumed"] == facts["rows"][3:], "resume is not bitwise"
        assert facts["report"] == facts["rows"][2][0]
        assert "global_step3/other.json" in facts["refusal"]
    assert ranks[0]["rows"] == ranks[1]["rows"], "ranks disagree"


class Engine(SimpleNamespace):
    """Remembers what it was asked to do, and what stood in the folder then."""

    def __init__(self, rank: int = 0, *, node_local: bool = False) -> None:
        super().__init__(global_rank=rank, local_rank=0, global_steps=5, calls=[])
        self.use_node_local_storage = lambda: node_local

    def save_checkpoint(self, folder: str, **others: object) -> None:
        self.calls.append((sorted(f.name for f in Path(folder).glob("*/*.json")), others))
        (Path(folder) / "latest").write_text(str(others["tag"]) + "\n")

    def load_checkpoint(self, folder: str, **others: object) -> str:
        self.calls.append(others)
        return "loaded"


def test_the_balancers_files_are_there_before_latest_names_them(tmp_path: Path) -> None:
    engine, balancer = Engine(), Balancer(["a"], MGDA())
    save_checkpoint(balancer, engine, tmp_path, save_latest=True)
    assert engine.calls == [(["balancer.json"], {"tag": "global_step5", "save_latest": True})]
    assert load_checkpoint(balancer, engine, tmp_path) == "loaded"
    assert engine.calls[1:] == [{"tag": "global_step5"}]


@pytest.mark.parametrize(("node_local", "writes"), [(False, False), (True, True)])
def test_one_rank_writes_and_all_save(tmp_path: Path, node_local: bool, writes: bool) -> None:
    engine = Engine(1, node_local=node_local)
    save_checkpoint(Balancer(["a"], MGDA()), engine, tmp_path, "tag")
    assert (tmp_path / "tag" / "balancer.json").exists() == writes
    assert len(engine.calls) == 1


def test_nothing_is_loaded_where_the_balancer_does_not_fit(tmp_path: Path) -> None:
    engine, balancer = Engine(), Balancer(["a"], MGDA())
    with pytest.raises(FileNotFoundError, match="latest' is missing: give the tag"):
        load_checkpoint(balancer, engine, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"balancer\.json"):
        load_checkpoint(balancer, engine, tmp_path, "tag")
    checkpoint.save(Balancer(["a"], RLW()), tmp_path / "tag")
    with pytest.raises(ValueError, match="belongs to rule"):
        load_checkpoint(balancer, engine, tmp_path, "tag")
    assert not engine.calls
