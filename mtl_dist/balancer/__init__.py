"""The balancer: what users call in their model's forward."""

from __future__ import annotations

from mtl_dist.balancer.arguments import OnNonfinite
from mtl_dist.balancer.errors import PeerFailed
from mtl_dist.balancer.evaluation import EvaluationSums, collect_evaluation
from mtl_dist.balancer.facade import Balancer

__all__ = ["Balancer", "EvaluationSums", "OnNonfinite", "PeerFailed", "collect_evaluation"]
