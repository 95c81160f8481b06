"""The layer of a `transformers` model that makes its logits."""

from __future__ import annotations

from typing import Any

from torch import nn

from mtl_dist.balancer import Balancer
from mtl_dist.engines import is_partitioned, is_sharded
from mtl_dist.integrations._fused_head import is_sft
from mtl_dist.integrations._pairs import is_dpo
from mtl_dist.integrations._row_losses import RowLosses

# settings with which models change their logits after the head; None, 0 and 1 leave them
_CHANGES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
    "lm_head_multiplier",
)
_REMEDY = "Leave chunk= out, so that the model makes its logits"


def output_head(model: Any) -> nn.Module:
    """The layer that makes the logits.

    Raises:
        TypeError: it is not known, or not linear.
    """
    head = model.get_output_embeddings()
    for name in ("score", "classifier", "lm_head"):
        head = getattr(model, name, None) if head is None else head
    base = getattr(head, "original_module", getattr(head, "base_layer", head))  # inside PEFT's layers
    if not isinstance(base, nn.Linear) and type(base).__name__ != "Conv1D":
        raise TypeError(
            f"SharedLayerProbe: the output head of {type(model).__name__} is no linear layer, got "
            f"{type(base).__name__}: use FeatureProbe() or ParameterProbe()"
        )
    module: nn.Module = head
    return module


def check_chunked(trainer: Any, model: Any, balancer: Balancer, rows: RowLosses, chunk: Any) -> None:
    """Raises `ValueError` where the loss cannot be computed from the input of the output head, in chunks."""
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise ValueError(f"chunk= is a number of tokens >= 1, or None, got {chunk!r}")
    config = model.config.get_text_config()
    head = output_head(model)
    changed = [name for name in _CHANGES if getattr(config, name, None) not in (None, 0, 1)]
    reason = ""
    if not rows.shifted:
        reason = f"{type(model).__name__} is no causal language model"
    elif is_sft(trainer):
        reason = "SFTTrainer has chunks of its own, for rules that read losses"
    elif is_dpo(trainer):
        reason = "DPOTrainer has chunks of its own"
    elif type(head) is not nn.Linear:
        reason = f"the output head is a {type(head).__name__}, which is more than a weight and a bias"
    elif changed:
        reason = f"the model changes its logits after the head ({', '.join(changed)})"
    elif getattr(config, "output_router_logits", False):
        reason = "the loss of the router is computed behind the head"
    elif balancer.measures and balancer.probe.takes_layers:
        reason = (
            f"{balancer.probe!r} needs the logits. ParameterProbe(parameters=lambda: [model.lm_head.weight]) "
            "measures the weight of the head in chunks too"
        )
    if reason:
        raise ValueError(f"chunk=: {reason}. {_REMEDY}")


def whole_head(model: Any) -> Any:
    """The output head, whose weight this rank holds as a whole.

    Raises:
        ValueError: an engine shards it.
    """
    head: Any = output_head(model)
    if is_sharded(head.weight) or is_partitioned(head.weight):
        raise ValueError(f"chunk=: FSDP2 or ZeRO-3 shards the weight of the output head. {_REMEDY}")
    return head
