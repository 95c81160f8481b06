"""Trains the cells of one launch, one after the other; started by matrix.py.

    run_cells.py CELLS OUT

CELLS is a JSON list of cells, OUT a folder: rank r adds `OUT/<number>.<r>.pt` when cell number is done.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from adapters import build
from cells import Cell
from ranks import BACKENDS, start, stop
from toy import DEVICE, TASKS, Net, global_batch, shard

from mtl_dist import RULES, Balancer, FeatureProbe, FeatureTap
from mtl_dist.stats import StepReport
from mtl_dist.weighting import Normalize

STEPS = 10
PROBES = {"FeatureTap": FeatureTap(), "FeatureProbe(reevaluate=False)": FeatureProbe(reevaluate=False)}


def make_balancer(cell: Cell) -> Balancer | None:
    if cell.rule == "sum":
        return None
    rule = RULES[cell.rule]()
    return Balancer(
        TASKS,
        Normalize(rule) if cell.rule == "inverse_grad_norm" else rule,  # of size 1, or its steps are too long
        probe=PROBES.get(cell.probe),
        window=cell.accumulation if cell.held else None,
        **({} if cell.lag == "none" else {"lag": 1, "counts": cell.lag}),
    )


def train(cell: Cell, rank: int, world_size: int) -> dict[str, Any]:
    """Weights of every micro-batch or window `[steps, n]`, parameters before and after."""
    torch._dynamo.reset()
    torch.manual_seed(7)
    balancer = make_balancer(cell)
    net = Net(balancer, cell).to(DEVICE)
    before = {name: p.detach().cpu().clone() for name, p in net.named_parameters()}
    engine = build(net, balancer, cell)
    reports: list[StepReport] = []

    def observe() -> None:
        """After each backward; a balancer that holds its weights reports at the end of the window."""
        # its values are read at the end, so that with lag a step overlaps with what follows
        if balancer is not None and balancer.report is not None and balancer.report.step == len(reports):
            reports.append(balancer.report)

    for step in range(STEPS):
        batches = [
            shard(global_batch(step, micro, cell.data), rank, world_size, cell.data).to(DEVICE)
            for micro in range(cell.accumulation)
        ]
        engine.step(batches, observe)
    if balancer is not None:
        assert balancer._synchronizer.world_size == world_size
        assert len(reports) == STEPS * (1 if cell.held else cell.accumulation)
    return {
        "facts": {"world_size": world_size, **engine.facts},
        "weights": torch.stack([r.weight_vector.cpu() for r in reports]) if reports else torch.zeros(0),
        "before": before,
        "after": {name.replace("_orig_mod.", ""): p.cpu() for name, p in engine.parameters().items()},
    }


def attempt(cell: Cell, rank: int, world_size: int) -> dict[str, Any]:
    """The result of a cell, or what it raised."""
    began = time.perf_counter()
    try:
        result = train(cell, rank, world_size)
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    gc.collect()  # engines, whose hooks hold process groups
    return {**result, "seconds": time.perf_counter() - began}


def main() -> None:
    cells = [Cell(**fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    out = Path(sys.argv[2])
    rank, world_size = start(DEVICE.type)
    if world_size == 1 and cells[0].family != "plain":
        dist.init_process_group(
            BACKENDS[DEVICE.type], init_method=f"file://{out}/store", rank=0, world_size=1
        )
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for number, cell in enumerate(cells):
        result = attempt(cell, rank, world_size)
        torch.save(result, out / f"{number}.{rank}.tmp")
        (out / f"{number}.{rank}.tmp").rename(out / f"{number}.{rank}.pt")
    stop()


if __name__ == "__main__":
    main()
