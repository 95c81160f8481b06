"""ParameterProbe is exact on every engine: W ranks, ragged shards, a task absent on one rank."""

from __future__ import annotations

import re

import pytest
import warm
from launcher import succeed

DDP = [
    "",
    ", small buckets",
    ", static_graph",
    ", gradient_as_bucket_view",
    ", checkpointed",
    ", given",
    ", evaluated again",
]
UNITS = ("layers", "trunk", "heads in the root", "root only", "later layers in the root")
FSDP2 = [
    *(f" {u}{b}" for u in UNITS for b in ("", ", small buckets")),
    " layers, kept",
    " trunk, kept",
    " heads in the root, kept",
    " layers, checkpointed",
]


def cells(family: str) -> set[str]:
    if family == "torch":
        return {*(f"ddp{case}" for case in DDP), *(f"fsdp2{case}" for case in FSDP2)}
    if family == "few":
        return {"ddp", "ddp, small buckets", "fsdp2 layers, small buckets"}
    found = {f"zero-{stage}{case}" for stage in range(4) for case in ("", ", small buckets")}
    return found | {f"zero-{stage}, given" for stage in range(3)}


def check(num_processes: int, family: str, timeout: float) -> None:
    modules = warm.DEEPSPEED if family == "deepspeed" else warm.TORCH
    out = succeed("parameter_engines.py", num_processes, family, timeout=timeout, modules=modules)
    lines = re.findall(r"^(.+): gram (\S+) parameters (\S+)$", out, re.MULTILINE)
    assert {name for name, _, _ in lines} == cells(family), out
    wrong = [line for line in lines if not (float(line[1]) < 1e-6 and float(line[2]) < 1e-6)]
    assert not wrong


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("num_processes", "family"), [(2, "torch"), (4, "few"), (2, "deepspeed")])
def test_gram_equals_explicit_autograd_on_the_whole_batch(num_processes: int, family: str) -> None:
    # DeepSpeed compiles its shared-memory collectives at first use, which takes most of a minute
    check(num_processes, family, 350)


@pytest.mark.long
@pytest.mark.timeout(700)
@pytest.mark.parametrize("family", ["torch", "deepspeed"])
def test_on_four_ranks(family: str) -> None:
    check(4, family, 650)
