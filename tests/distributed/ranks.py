"""What every launched script begins with."""

from __future__ import annotations

import datetime
import gc
import os

import torch
import torch.distributed as dist

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def start(device: str = "cpu") -> tuple[int, int]:
    """Joins the job and returns (rank, world size). A silent fallback to one process fails here."""
    if device != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    torch.set_num_threads(1)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    assert world_size == int(os.environ["EXPECTED_WORLD_SIZE"]), f"the launcher started {world_size} ranks"
    if world_size > 1:
        dist.init_process_group(BACKENDS[device], timeout=datetime.timedelta(seconds=60))
        assert dist.get_world_size() == world_size
        return dist.get_rank(), world_size
    return 0, 1


def stop() -> None:
    """Leaves the job."""
    if dist.is_initialized():
        dist.barrier()
        gc.collect()  # a DDP model that outlives its Gloo group can hang at exit (torch 2.13)
        dist.destroy_process_group()
