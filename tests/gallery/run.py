"""Trains one client of the gallery in all ways that are compared; started by test_gallery.py.

    run.py CLIENT OUT

CLIENT is a module of this folder. It has

* `PLAIN`, the rule whose weights are the client's own, and `RULE`, one that reads gradients;
* `train(rule, folder, steps, resume)`: parameters after `steps` optimizer steps, and the losses. Without a
  rule, the client as its users write it. `resume` goes on from what an earlier call left in `folder`.

Each rank writes `OUT.RANK`.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS, SAVED = 10, 6
RANK, WORLD_SIZE = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))


def flat(net: nn.Module) -> Tensor:
    """All parameters."""
    return torch.cat([p.detach().flatten() for p in net.parameters()]).double()


def mine(batch: Any) -> Any:
    """This rank's part of a batch: every W-th row."""
    if isinstance(batch, dict):
        return {key: mine(value) for key, value in batch.items()}
    return batch[RANK::WORLD_SIZE]


def parallel(net: nn.Module, **settings: Any) -> nn.Module:
    """The model as DDP trains it, where there are several ranks."""
    if WORLD_SIZE == 1:
        return net
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return nn.parallel.DistributedDataParallel(net, **settings)


def main() -> None:
    client, out = sys.argv[1:]
    torch.set_num_threads(1)
    module: Any = importlib.import_module(f"tests.gallery.{client}")
    facts = {}
    for name, rule in (("plain", None), ("own", module.PLAIN), ("rule", module.RULE)):
        facts[name] = module.train(rule, Path(f"{out}.{name}"), STEPS, False)
    module.train(module.RULE, Path(f"{out}.half"), SAVED, False)
    facts["resumed"] = module.train(module.RULE, Path(f"{out}.half"), STEPS, True)
    torch.save(facts, f"{out}.{RANK}")
    gc.collect()  # a DDP model that outlives its Gloo group can hang at exit (torch 2.13)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
