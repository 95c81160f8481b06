"""The shared features as a list of leaves, and inner products of gradients at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # no public spelling yet in torch 2.13

from mtl_dist.stats import stats_dtype

Gradients = Sequence[Tensor | None]

# Elements of each gradient converted at a time: n x 0.25 MB stay in a CPU's cache, n x 8 MB fill a GPU.
_CHUNK_HOST = 1 << 15
_CHUNK_DEVICE = 1 << 20


@dataclass(frozen=True)
class Features:
    """Any pytree of tensors, split into the leaves that gradients are taken at and the rest.

    Attributes:
        leaves: floating-point tensors, each requiring gradients.
        spec: structure to rebuild the pytree.
        flat: all leaves of the pytree.
        positions: where `leaves` stand in `flat`.
    """

    leaves: tuple[Tensor, ...]
    spec: pytree.TreeSpec
    flat: tuple[Any, ...]
    positions: tuple[int, ...]

    @property
    def originals(self) -> tuple[Tensor, ...]:
        """The tensors that were given, one for each of `leaves`."""
        return tuple(self.flat[position] for position in self.positions)

    @property
    def versions(self) -> tuple[int, ...]:
        """How often each leaf's memory was written to."""
        return tuple(leaf._version for leaf in self.leaves)

    def rebuild(self, leaves: Sequence[Tensor]) -> Any:
        """The pytree with `leaves` in place of its floating-point tensors."""
        flat = list(self.flat)
        for position, leaf in zip(self.positions, leaves, strict=True):
            flat[position] = leaf
        return pytree.tree_unflatten(flat, self.spec)


def split(features: Any, *, detach: bool) -> Features:
    """The floating-point leaves of a pytree, ready to take gradients at.

    Args:
        features: tensor or pytree of tensors (and anything else, passed through).
        detach: cut the leaves off the graph that made them; leaves of a frozen trunk are always cut.

    Raises:
        ValueError: no floating-point tensor in `features`.
    """
    flat, spec = pytree.tree_flatten(features)
    positions = tuple(
        i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )
    if not positions:
        raise ValueError(
            f"features must hold a floating-point tensor to measure gradients at, got {features!r}"
        )
    tensors = (flat[position] for position in positions)
    leaves = tuple(_apart(t) if detach or not t.requires_grad else _aside(t) for t in tensors)
    return Features(leaves, spec, tuple(flat), positions)


def _apart(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _aside(tensor: Tensor) -> Tensor:
    """The same values one node further on, where no engine has put a hook.

    A gradient taken at the very output of a module that FSDP2 wrapped fires its pre-backward hook, and FSDP2
    then frees all parameters at the end of that gradient: those of the other tasks' heads too.
    """
    return tensor.view_as(tensor)


def gradient_gram(rows: Sequence[Gradients], device: torch.device) -> Tensor:
    """`[n, n]` inner products of n gradients, each a list of one tensor a leaf (None for a zero gradient).

    In float64, chunk by chunk. A float32 matrix product of 10^5 elements is wrong in the 6th digit, TF32 and
    autocast make it the 3rd, and squares of small gradients underflow; converting costs little, because
    features are small beside the model, and takes n x 0.25 MB of scratch memory on the CPU, n x 8 MB on GPUs.
    """
    gram = torch.zeros(len(rows), len(rows), dtype=stats_dtype(device), device=device)
    for leaf in zip(*rows, strict=True):
        _add_products(gram, [None if g is None else g.detach().flatten() for g in leaf])
    return gram


def _add_products(gram: Tensor, vectors: Gradients) -> None:
    """Adds the inner products of n vectors (None for zero) to `gram`, in place."""
    length = max((v.numel() for v in vectors if v is not None), default=0)
    size = min(length, _CHUNK_HOST if gram.device.type == "cpu" else _CHUNK_DEVICE)
    chunk = gram.new_zeros(len(vectors), size)  # one buffer: fresh ones cost the CPU page faults
    for start in range(0, length, max(size, 1)):
        width = min(size, length - start)
        for row, vector in zip(chunk, vectors, strict=True):
            if vector is not None:
                row[:width].copy_(vector[start : start + width])
        gram.addmm_(chunk[:, :width], chunk[:, :width].T)


def anchored(total: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """`total`, with a zero gradient at every leaf: a rank without any task still runs a backward."""
    result: Tensor = _Anchor.apply(total, *leaves)  # type: ignore[no-untyped-call]
    return result


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*leaves)
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(leaf) for leaf in ctx.saved_tensors)
