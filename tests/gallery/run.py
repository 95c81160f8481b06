"""Trains one client of the gallery in all ways that are compared, for test_gallery.py and launch/gpu.sh.

    run.py CLIENT OUT

CLIENT is a module of this folder. It has

* `PLAIN`, the rule whose weights are the client's own, and `RULE`, one that reads gradients;
* `train(rule, folder, steps, resume)`: parameters after `steps` optimizer steps, and the losses. Without a
  rule, the client as its users write it. `resume` goes on from what an earlier call left in `folder`.

Each rank writes `OUT.RANK`: tensors on the CPU, what torch said of operations that give other bits each time,
and the most memory of a GPU. The environment variable GALLERY_DEVICE says where clients train: cpu (default)
or cuda.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS, SAVED = 10, 6
DEVICE = os.environ.get("GALLERY_DEVICE", "cpu")
RANK, WORLD_SIZE = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))


def flat(net: nn.Module) -> Tensor:
    """All parameters, on the CPU."""
    return torch.cat([p.detach().flatten() for p in net.parameters()]).double().cpu()


def mine(batch: Any) -> Any:
    """This rank's part of a batch, on its device: every W-th row."""
    if isinstance(batch, dict):
        return {key: mine(value) for key, value in batch.items()}
    return batch[RANK::WORLD_SIZE].to(DEVICE)


def parallel(net: nn.Module, **settings: Any) -> nn.Module:
    """The model on its device, and as DDP trains it, where there are several ranks."""
    net.to(DEVICE)
    if WORLD_SIZE == 1:
        return net
    if not dist.is_initialized():
        dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    return nn.parallel.DistributedDataParallel(net, **settings)


def same_bits() -> list[str]:
    """Makes a GPU compute the same bits each time; the list takes torch's warnings of what does not."""
    found: list[str] = []
    if DEVICE != "cuda":
        return found
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read at the first matrix product
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False  # on by default; it rounds the inputs of convolutions to 10 bits
    shown = warnings.showwarning

    def note(message: Warning | str, *others: Any) -> None:
        if "deterministic" in str(message):
            found.append(str(message).splitlines()[0])
        shown(message, *others)

    warnings.showwarning = note
    return found


def main() -> None:
    client, out = sys.argv[1:]
    torch.set_num_threads(1)
    other_bits = same_bits()
    module: Any = importlib.import_module(f"tests.gallery.{client}")
    facts = {}
    for name, rule in (("plain", None), ("own", module.PLAIN), ("rule", module.RULE)):
        facts[name] = module.train(rule, Path(f"{out}.{name}"), STEPS, False)
    module.train(module.RULE, Path(f"{out}.half"), SAVED, False)
    facts["resumed"] = module.train(module.RULE, Path(f"{out}.half"), STEPS, True)
    more = {"other bits": sorted(set(other_bits)), "gpu_bytes": torch.cuda.max_memory_allocated()}
    torch.save({**facts, **more}, f"{out}.{RANK}")
    gc.collect()  # a DDP model that outlives its Gloo group can hang at exit (torch 2.13)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
