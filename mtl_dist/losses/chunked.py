"""The cross-entropy of a large vocabulary, some rows at a time: the logits never exist as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cross_entropy_in_chunks(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignored: int = -100,
    chunk: int = 1024,
) -> Tensor:
    """The cross-entropy of every row for the logits `hidden @ weight.T + bias`.

    With R rows, V words and width d, a plain loss holds several tensors `[R, V]`: logits, their float32 copy,
    and two gradients. This one holds `[chunk, V]`, and the gradient of each loss at `hidden`, `[R, d]`. So
    gradients at `hidden` cost nothing more, however often they are asked for. The backward computes the
    logits a second time, for the gradient of `weight`: 4 products of the size of the head instead of 3.

    Args:
        hidden: `[..., d]`.
        weight: `[V, d]`, not sharded by an engine.
        labels: integers `[...]`.
        bias: `[V]`.
        ignored: label of rows that do not count; their loss is 0.
        chunk: number of rows whose logits exist at a time.

    Returns:
        `[...]`, float32 (float64 where `hidden` is).

    Raises:
        ValueError: shapes that do not fit.
    """
    if labels.shape != hidden.shape[:-1] or weight.shape[-1] != hidden.shape[-1] or chunk < 1:
        raise ValueError(
            "cross_entropy_in_chunks: hidden is [..., d], weight [V, d], labels [...] and chunk >= 1; got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(labels.shape)} and {chunk}"
        )
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # as the layer itself would
        hidden = hidden.to(torch.get_autocast_dtype(device))
    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    frozen = None if bias is None else bias.detach()
    # two nodes, so that gradients at `hidden` do not compute those of the weight
    losses: Tensor = _AtRows.apply(rows, weight.detach(), frozen, wanted, ignored, chunk)  # type: ignore[no-untyped-call]
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        losses = losses + _AtWeight.apply(rows.detach(), weight, bias, wanted, ignored, chunk)  # type: ignore[no-untyped-call]
    return losses.view(labels.shape)


class _AtRows(torch.autograd.Function):
    """The losses, with the gradient at the rows."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignored: int, chunk: int
    ) -> Tensor:
        losses = rows.new_empty(len(rows), dtype=_precise(rows))
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        for part in _parts(len(rows), chunk):
            logits = _logits(rows[part], weight, bias)
            here, target = _targets(labels[part], ignored)
            total = logits.logsumexp(1)
            losses[part] = torch.where(here, total - logits.gather(1, target)[:, 0], 0)
            if gradient is not None:
                gradient[part] = _errors(logits, total, here, target).to(rows.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (upstream[:, None].to(gradient.dtype) * gradient, *[None] * 5)


class _AtWeight(torch.autograd.Function):
    """Zeros, with the gradient of the losses at the weight."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignored: int, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, bias, labels)
        ctx.ignored, ctx.chunk = ignored, chunk
        return rows.new_zeros(len(rows), dtype=_precise(rows))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, labels = ctx.saved_tensors
        of_weight = torch.zeros_like(weight, dtype=_precise(weight))
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=_precise(bias))
        for part in _parts(len(rows), ctx.chunk):
            logits = _logits(rows[part], weight, bias)
            here, target = _targets(labels[part], ctx.ignored)
            errors = _errors(logits, logits.logsumexp(1), here, target).mul_(upstream[part, None])
            of_weight += errors.to(rows.dtype).T @ rows[part]
            if of_bias is not None:
                of_bias += errors.sum(0)
        found = None if of_bias is None or bias is None else of_bias.to(bias.dtype)
        return None, of_weight.to(weight.dtype), found, None, None, None


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _parts(number: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, number, chunk)]


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        return torch.nn.functional.linear(rows, weight.to(rows.dtype), bias).to(_precise(rows))


def _targets(labels: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """Which labels count, and the index of each, `[r, 1]`."""
    here = labels != ignored
    return here, torch.where(here, labels, 0)[:, None]


def _errors(logits: Tensor, total: Tensor, here: Tensor, target: Tensor) -> Tensor:
    """`p - e`, in the place of the logits: the gradient of each row's loss there."""
    errors = logits.sub_(total[:, None]).exp_()
    errors.scatter_add_(1, target, errors.new_full(target.shape, -1.0))
    return errors.mul_(here[:, None])
