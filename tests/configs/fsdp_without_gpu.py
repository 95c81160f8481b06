"""Runs the training program under Accelerate's FSDP2 where there is no GPU, by its private switches.

Accelerate turns FSDP on for accelerators only. This makes it take the CPU's gloo group for one, which no user
should do: it is here so that `configs/engine/fsdp2.yaml` and the program meet FSDP2 in a test at all.
"""

import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
PartialState._shared_state["_cpu"] = False

from mtl_dist.train import main  # noqa: E402 - after the switches

sys.exit(main(sys.argv[1:]))
