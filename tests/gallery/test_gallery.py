"""Every client of docs/gallery.md: its own numbers, two ranks as one, a gradient rule, bitwise resume."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import warm
from program import ROOT

from tests.gallery.judge import EXACT, PACKAGES, missing, off, resumes, trains_as_alone

FOLDER = Path(__file__).parent
SCRIPT = FOLDER / "run.py"
CLIENTS = sorted(PACKAGES)
EXTRAS = {"trl": "clients", "peft": "clients", "sentence_transformers": "clients", "scipy": "clients"}
EXTRAS |= {"torchvision": "detectors", "ultralytics": "detectors"}
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
    environment = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "GALLERY_DEVICE": "cpu"}
    modules = warm.TORCH  # imported before ranks are forked
    for package, more in (("transformers", warm.TRAINER), ("lightning", warm.LIGHTNING)):
        modules = more if package in PACKAGES[client] else modules
    done = warm.launch(SCRIPT, num_processes, client, out, env=environment, timeout=280, modules=modules)
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(num_processes)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "client", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in CLIENTS]
)
def test_client(client: str, tmp_path: Path) -> None:
    for package in missing(client):
        assert package in EXTRAS, f"{package} is not installed, which all tests need"
        pytest.skip(f'{package} is not installed: pip install "mtl-dist[{EXTRAS[package]}]"')
    (alone,) = trained(client, tmp_path, 1)
    trains_as_alone(alone)
    for facts in trained(client, tmp_path, 2):
        if client in APART:
            assert off(facts["plain"]["parameters"], facts["own"]["parameters"]) <= EXACT
        else:
            own_ranks = off(alone["plain"]["parameters"], facts["plain"]["parameters"])
            assert (own_ranks > 10 * EXACT) == (client in OFF), "is the client right by itself?"
            for way in ("own", "rule"):
                assert off(alone[way]["parameters"], facts[way]["parameters"]) <= EXACT, way
        for one in (alone, facts):
            assert resumes(one) == "bit for bit"


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
