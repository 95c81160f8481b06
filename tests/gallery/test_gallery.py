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
    "rt_detr": (warm.TRAINER, ("scipy",)),
    "seq2seq": (warm.TRAINER, ()),
    "vqgan": (warm.TORCH, ()),
    "dpo": (warm.TRAINER, ("trl", "peft")),
    "faster_rcnn": (warm.TORCH, ("torchvision",)),
    "yolo": (warm.TORCH, ("ultralytics",)),
    "fabric": (warm.LIGHTNING, ()),
    "lightning_net": (warm.LIGHTNING, ()),
    "sentences": (warm.TRAINER, ("sentence_transformers",)),
    "sft_lora": (warm.TRAINER, ("trl", "peft")),
    "sft_padding_free": (warm.TRAINER, ("trl", "peft")),
}
# those that take longer, or need the extra `clients`
LONG = {"detr", "diffusion", "dpo", "faster_rcnn", "graphs", "lightning_net", "multi_token", "sentences"}
LONG |= {"rt_detr", "seq2seq", "sft_lora", "sft_padding_free", "vqgan", "yolo"}

# clients that divide by numbers of one rank, so that without a balancer two ranks train other than one
OFF = {"detr", "graphs", "multi_token", "rt_detr", "seq2seq", "yolo"}
# batches of two data sets on two ranks are no batch of one process
APART = {"sentences"}


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
            extra = "detectors" if package in ("torchvision", "ultralytics") else "clients"
            pytest.skip(f'{package} is not installed: pip install "mtl-dist[{extra}]"')
    (alone,) = trained(client, tmp_path, 1)
    assert off(alone["plain"]["parameters"], alone["own"]["parameters"]) <= EXACT, "not the client's numbers"
    assert alone["own"]["losses"] == pytest.approx(alone["plain"]["losses"], rel=EXACT)
    assert off(alone["own"]["parameters"], alone["rule"]["parameters"]) > 1e-4, "the rule changes nothing"
    for facts in trained(client, tmp_path, 2):
        if client in APART:
            assert off(facts["plain"]["parameters"], facts["own"]["parameters"]) <= EXACT
        else:
            own_ranks = off(alone["plain"]["parameters"], facts["plain"]["parameters"])
            assert (own_ranks > 10 * EXACT) == (client in OFF), "is the client right by itself?"
            for way in ("own", "rule"):
                assert off(alone[way]["parameters"], facts[way]["parameters"]) <= EXACT, way
        for one in (alone, facts):
            assert torch.equal(one["resumed"]["parameters"], one["rule"]["parameters"]), (
                "resume is not bitwise"
            )


BOUNDS = {"causal_lm": 5, "sft_lora": 8, "sft_padding_free": 8}  # of lines; 3 elsewhere
ELSEWHERE = {"lightning_net": 2, "sft_padding_free": 3}  # lines that stand in the program it is made of


def test_the_lines_a_user_adds_are_those_of_the_page() -> None:
    """Lines of each program that end in `# +`, beside imports."""
    texts = {client: (FOLDER / f"{client}.py").read_text(encoding="utf-8") for client in CLIENTS}
    lines = {name: int(re.search(r"^LINES = (\d+)", text, re.MULTILINE)[1]) for name, text in texts.items()}
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    stated = re.findall(r"^\| [^|]+ \| `(\w+)\.py` \| (\d+) \|", page, flags=re.MULTILINE)
    assert {client: int(number) for client, number in stated} == lines
    for client, text in texts.items():
        added = len(re.findall(r"# \+$", text, flags=re.MULTILINE)) + ELSEWHERE.get(client, 0)
        assert added == lines[client] <= BOUNDS.get(client, 3), client
