"""Whether a model's own loss is the mean of the losses by row that take its place in training.

The kind of loss is known by the name of the class, and some names mislead: `BartForCausalLM` does not shift
its labels. A subclass, or `model.loss_function = ...`, may weigh classes or add terms.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtl_dist.engines import is_partitioned, is_sharded
from mtl_dist.integrations._columns import TASK_IDS
from mtl_dist.integrations._output_head import output_head
from mtl_dist.integrations._row_losses import IGNORED, RowLosses

_LOGGER = logging.getLogger("mtl_dist")
_ROWS, _TOKENS = 2, 8
_LONGEST = 200  # characters of a message of the model
_NOT_COMPARED = (
    "mtl_dist: balance_by_column trains the mean of the losses of all %ss, and could not compare it with the "
    "loss of %s on a small batch: %s. Compare them yourself: with TokenShare(), a few steps have the losses "
    "of a training without a balancer"
)


def check_own_loss(model: Any, rows: RowLosses, *, chunked: bool = False, says: bool = True) -> None:
    """Compares the two on a small batch that is made up here. The model and random numbers stay as they are.

    A model that such a batch does not suffice for, or whose weights an engine holds elsewhere, is not tried;
    a warning says so.

    Args:
        model: of `transformers`.
        rows: its losses.
        chunked: whether the logits will come from the output head alone.
        says: whether this rank warns.

    Raises:
        ValueError: they differ.
    """
    parameters = list(model.parameters())
    kind = "token" if rows.tokens else "row"
    try:
        if any(p.is_meta or is_sharded(p) or is_partitioned(p) for p in parameters):
            raise _NotTriedError("this rank does not hold its weights")
        batch = _made_up(model, rows)
        with _as_it_was(model, training=not chunked):
            outputs = model(**batch)
            logits = _of_head(model, batch) if chunked else outputs["logits"]
            loss, expected = outputs["loss"], _mean(rows, logits, batch)
        if bool(loss.isnan()):
            raise _NotTriedError("the model's own is NaN there")
    except Exception as error:  # it needs more than tokens: images, boxes, a padding token
        if says:
            what = f"{type(error).__name__}: " * (not isinstance(error, _NotTriedError))
            reason = what + str(error).strip().partition("\n")[0].rstrip(".")[:_LONGEST]
            _LOGGER.warning(_NOT_COMPARED, kind, type(model).__name__, reason)
        return
    if (router := outputs.get("aux_loss")) is not None:
        loss = loss - router_coefficient(model) * router.to(loss.device)
    own, found = float(loss), float(expected)
    rounding = 1e-5 if all(p.dtype in (torch.float32, torch.float64) for p in parameters) else 1e-2
    if abs(own - found) <= rounding * abs(found):
        return
    shifted = ", where each token predicts the next," if rows.shifted else ""
    raise ValueError(
        f"balance_by_column would train the mean of the losses of all {kind}s{shifted} and the loss of "
        f"{type(model).__name__} is another one: {found:.5g} and {own:.5g} on a small batch. It may not "
        "shift labels, weigh classes, add terms, or be a loss_function of your own. Call the balancer in the "
        f"model's forward, with the loss of every {kind}: balancer(losses, task_ids=...)"
    )


class _NotTriedError(Exception):
    """Why there is nothing to compare."""


def router_coefficient(model: Any) -> float:
    """What the model multiplies the loss of its router by."""
    return float(getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0))


def _of_head(model: Any, batch: dict[str, Any]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits: Tensor = output_head(model)(model.base_model(**inputs).last_hidden_state)
    return logits


def _mean(rows: RowLosses, logits: Tensor, batch: dict[str, Any]) -> Tensor:
    targets = rows.targets({**batch, TASK_IDS: torch.zeros(_ROWS, dtype=torch.int64)})
    mean: Tensor = (rows.losses(logits, targets) * targets.mask).sum() / targets.mask.sum()
    return mean


def _made_up(model: Any, rows: RowLosses) -> dict[str, Any]:
    """Tokens of two rows that differ, and labels of several classes, some of which do not count."""
    config, device = model.config, next(model.parameters()).device
    text = config.get_text_config()
    end, size = getattr(text, "eos_token_id", None), getattr(text, "vocab_size", 64)
    special = {getattr(text, f"{name}_token_id", None) for name in ("pad", "bos")} | {end}
    known = [token for token in range(min(size, 64)) if token not in special]
    picked = [known[(7 * place + 3) % len(known)] for place in range(_ROWS * _TOKENS)]
    tokens = torch.tensor(picked, device=device).view(_ROWS, _TOKENS)
    if isinstance(end, int) and end < size:
        tokens[:, -1] = end  # some classifiers read what stands there
    if not rows.tokens:
        labels = _labels_of_rows(config, device)
    elif _names_tokens(model):
        labels = (torch.arange(_ROWS * _TOKENS, device=device) % config.num_labels).view(_ROWS, _TOKENS)
    else:
        labels = tokens.clone()
    if rows.tokens:
        labels[0, 2] = labels[1, -1] = IGNORED
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    return batch | (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )


def _names_tokens(model: Any) -> bool:
    """Whether labels are classes of tokens instead of tokens."""
    return any(kind.__name__.endswith("ForTokenClassification") for kind in type(model).__mro__)


def _labels_of_rows(config: Any, device: torch.device) -> Tensor:
    kind, number = config.problem_type, int(config.num_labels)
    if kind == "regression" or (kind is None and number == 1):
        values = torch.tensor([0.5, -1.0], device=device)
        return values if number == 1 else values[:, None].expand(_ROWS, number).clone()
    classes = torch.arange(_ROWS, device=device) % number
    if kind == "multi_label_classification":
        return torch.nn.functional.one_hot(classes, number).float()
    return classes


@contextmanager
def _as_it_was(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Without a graph, in a mode; afterwards, mode, random state and settings are as before."""
    config: Any = model.config
    kind, modes = config.problem_type, [(module, module.training) for module in model.modules()]
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            learns = any(isinstance(module, _BatchNorm) for module, _ in modes)  # even without a graph
            model.train(training and not learns)
            yield
    finally:
        config.problem_type = kind  # models choose theirs by the labels of their first batch
        for module, mode in modes:
            module.training = mode
