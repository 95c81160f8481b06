"""Every client of docs/gallery.md: its own numbers, two ranks as one, a gradient rule, bitwise resume."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import warm
from program import ROOT
from torch import Tensor

FOLDER = Path(__file__).parent
SCRIPT = FOLDER / "run.py"
EXACT = 1e-6
# what is imported before ranks are forked, and what must be installed
CLIENTS = {
    "causal_lm": (warm.TRAINER, ()),
    "detr": (warm.TRAINER, ("scipy",)),
    "diffusion": (warm.TORCH, ()),
    "graphs": (warm.TORCH, ()),
    "mmoe": (warm.TORCH, ()),
    "multi_token": (warm.TRAINER, ()),
    "pinn": (warm.TORCH, ()),
    "vqgan": (warm.TORCH, ()),
    "fabric": (warm.LIGHTNING, ()),
    "lightning_net": (warm.LIGHTNING, ()),
    "sentences": (warm.TRAINER, ("sentence_transformers",)),
    "sft_lora": (warm.TRAINER, ("trl", "peft")),
    "sft_padding_free": (warm.TRAINER, ("trl", "peft")),
}
# those that take longer, or need the extra `clients`
LONG = {"detr", "diffusion", "graphs", "lightning_net", "multi_token", "sentences"}
LONG |= {"sft_lora", "sft_padding_free", "vqgan"}

# DETR divides by numbers of its own rank, and sentences of two data sets make no joined batch
APART = {"detr", "sentences"}


def trained(client: str, folder: Path, num_processes: int) -> list[dict]:
    """What each rank wrote."""
    out = folder / f"{client}-{num_processes}"
    environment = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    modules, _ = CLIENTS[client]
    done = warm.launch(SCRIPT, num_processes, client, out, env=environment, timeout=280, modules=modules)
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(num_processes)]


def off(expected: Tensor, got: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((expected - got).abs().max() / expected.abs().max())


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "client", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in CLIENTS]
)
def test_client(client: str, tmp_path: Path) -> None:
    for package in CLIENTS[client][1]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'{package} is not installed: pip install "mtl-dist[clients]"')
    (alone,) = trained(client, tmp_path, 1)
    assert off(alone["plain"]["parameters"], alone["own"]["parameters"]) <= EXACT, "not the client's numbers"
    assert alone["own"]["losses"] == pytest.approx(alone["plain"]["losses"], rel=EXACT)
    assert off(alone["own"]["parameters"], alone["rule"]["parameters"]) > 1e-4, "the rule changes nothing"
    for facts in trained(client, tmp_path, 2):
        if client in APART:
            assert off(facts["plain"]["parameters"], facts["own"]["parameters"]) <= EXACT
        else:
            for way in ("own", "rule"):
                assert off(alone[way]["parameters"], facts[way]["parameters"]) <= EXACT, way
        for one in (alone, facts):
            assert torch.equal(one["resumed"]["parameters"], one["rule"]["parameters"]), (
                "resume is not bitwise"
            )


@pytest.mark.parametrize("client", CLIENTS)
def test_the_lines_a_user_adds_are_those_of_the_page(client: str) -> None:
    """Lines of the program that end in `# +`, beside imports."""
    text = (FOLDER / f"{client}.py").read_text(encoding="utf-8")
    added = len(re.findall(r"# \+$", text, flags=re.MULTILINE))
    (stated,) = re.findall(r"^LINES = (\d+)$", text, flags=re.MULTILINE)
    assert 1 <= added <= int(stated)
