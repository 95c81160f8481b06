"""Engines: what one must tell a balancer. The only room that knows insides of FSDP2, DeepSpeed, pipelines."""

from __future__ import annotations

from mtl_dist.engines.deepspeed import deepspeed_facts, deepspeed_loss_scaler
from mtl_dist.engines.facts import Engine
from mtl_dist.engines.fsdp2 import UNIT_NODE, is_sharded
from mtl_dist.engines.graph import Edge, Past, accumulators, depends_on, edge_of, nodes
from mtl_dist.engines.pipeline import is_rehearsal
from mtl_dist.engines.recompute import will_run_again
from mtl_dist.engines.replay import SavedBuffers, buffers_kept, remember_buffers, replayed, restore_buffers
from mtl_dist.engines.storage import is_there, kept
from mtl_dist.engines.view import EngineView
from mtl_dist.engines.zero3 import ZERO_3, find_partitioned, in_graph, is_partitioned, whole_shape

__all__ = [
    "UNIT_NODE",
    "ZERO_3",
    "Edge",
    "Engine",
    "EngineView",
    "Past",
    "SavedBuffers",
    "accumulators",
    "buffers_kept",
    "deepspeed_facts",
    "deepspeed_loss_scaler",
    "depends_on",
    "edge_of",
    "find_partitioned",
    "in_graph",
    "is_partitioned",
    "is_rehearsal",
    "is_sharded",
    "is_there",
    "kept",
    "nodes",
    "remember_buffers",
    "replayed",
    "restore_buffers",
    "whole_shape",
    "will_run_again",
]
