"""ParameterProbe: every task's gradient of all shared parameters, as the source theory defines it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mtl_dist.probes._base import Exchange, Probe, Reduced
from mtl_dist.probes._features import anchored, split
from mtl_dist.probes._losses import Heads, TaskLosses
from mtl_dist.probes._mixture import SampleLosses
from mtl_dist.probes._parameter_rows import Trunk, check_same_parameters, parameter_rows, reduced_gram
from mtl_dist.probes._partitioned import ZERO_3, in_graph
from mtl_dist.probes._replay import replayed
from mtl_dist.probes._sketch import CountSketch
from mtl_dist.probes.feature_probe import check_same, head_gradients, losses_at, undisturbed
from mtl_dist.stats import LocalStats

Parameters = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class ParameterProbe(Probe):
    """Measures the Gram of `∂L_i/∂θ`, θ all parameters that the features depend on, each k-th step.

    Gradients are averaged over ranks before they are multiplied, bucket by bucket, so the Gram is that of the
    concatenated batch, and its diagonal holds the squared norms over all shared parameters. Parameters of
    the heads do not count. Between measurements the weights hold, and the report has no norms.

    Costs of a measured step, with n tasks and P shared parameters:

    * Time: one pass through the heads (activations only; n for one function of all tasks) and n backward
      passes through the trunk. Trunks without narrow places (see `_segments`) take more, about half the trunk
      more for every further bucket.
    * Memory: n gradients of one bucket, or of the largest parameter, and n gradients of the activations at
      a cut; never n·P.
    * Communication: n·P numbers in reduce-scatters (exact), or n·sketch; and n² + O(n) numbers. Ranks compare
      their lists of parameters first, where the host waits.

    Features may be given as a function, `balancer(lambda: self.trunk(x), heads)`. It is needed where the
    engine frees parameters after use (ZeRO-3): the trunk is then evaluated once a task more, on the same
    random state, and n graphs of it live together. Everywhere else the features' own graph is used: plain
    torch, DDP, FSDP2, ZeRO 0-2.

    Tensor hooks that change a gradient on its way may be applied twice; use autograd functions for that.

    Attributes:
        every: k, steps from one measurement to the next.
        sketch: m, size of a random linear sketch that replaces the exact gradients; entries of the Gram, per
            product of the two norms, then have an error of standard deviation at most √(2/m). None: exact.
        bucket: elements of parameters whose gradients are held and reduced at a time.
        parameters: a function that returns the parameters that count (such as those of the last shared
            layer, which then costs less); None: all that the features depend on, found in their graph.
        reevaluate: evaluate the trunk again for each task; None: where the engine needs it.
        seed: of the sketches; every step draws anew.

    Raises:
        ValueError: no shared parameter behind the features, different ones on different ranks, or partitioned
            ones without a function for the features; on every rank.
    """

    every: int = 1
    sketch: int | None = None
    bucket: int = 1 << 22
    parameters: Parameters | None = field(default=None, repr=False)
    reevaluate: bool | None = None
    seed: int = 0

    takes_functions: ClassVar[bool] = True
    grams_add: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("every", "bucket"):
            if getattr(self, name) < 1:
                raise ValueError(f"ParameterProbe: {name} must be at least 1, got {getattr(self, name)}")
        if self.sketch is not None and self.sketch < 1:
            raise ValueError(f"ParameterProbe: sketch must be None or at least 1, got {self.sketch}")

    def __call__(self, features: Any, heads: Heads, exchange: Exchange) -> Tensor:
        """`Σ α_i s_i l_i`."""
        make = features if callable(features) else None
        again = exchange.measure and self._reevaluates(make, features, exchange)
        apart = self._apart(make, heads, exchange) if again and make is not None else None
        shared = split(make() if make is not None else features, detach=False)
        losses = losses_at(shared, heads, exchange)
        if apart is not None:
            check_same(apart.losses, losses, exchange)
        elif exchange.measure:
            trunk = Trunk.below(shared.leaves, self._wanted(), self.bucket)
            gradients = head_gradients(shared, losses, exchange)
            apart = _Measurement(losses, (trunk,) * len(exchange.tasks), gradients)
        reduced = exchange.reduce(losses.stats())
        if apart is not None:
            reduced = reduced.with_gram(self._measured(apart, exchange))
        weights = exchange.decide(reduced)
        total = losses.total(weights * reduced.shares)
        return total if losses.any_present else anchored(total, shared.leaves)

    def _measured(self, at: _Measurement, exchange: Exchange) -> Reduced:
        """The second reduction of a step: the Gram of gradients that the first kind of collective summed."""
        counts = at.losses.counts
        check_same_parameters(at.trunks[0], exchange, counts.device)
        sketch = None if self.sketch is None else CountSketch(self.sketch, (self.seed << 32) + exchange.step)
        blocks = parameter_rows(at.trunks, _at_present(at), counts)
        with undisturbed(at.trunks[0].leaves, at.losses, exchange):
            gram, faulty = reduced_gram(blocks, exchange, len(counts), counts.device, sketch)
        scale = exchange.loss_scale(counts.device)
        if scale is not None:
            gram = gram / scale.to(gram.dtype).square()
        zeros = LocalStats.zeros(len(counts), counts.device)
        return exchange.reduce(LocalStats(zeros.loss_sums, zeros.counts, gram), faulty)

    def _apart(self, make: Callable[[], Any], heads: Heads, exchange: Exchange) -> _Measurement:
        """A trunk evaluated once a task, and the heads once, without a trace."""
        trunks: list[Trunk] = []
        while True:
            with replayed(_devices()):
                made = split(make(), detach=False)
                # once: the engine gathers a layer's parameters as often as its forward ran
                trunks.append(Trunk.below(made.leaves, self._wanted(), self.bucket, once=True))
                if len(trunks) == len(exchange.tasks):  # the heads go on from the trunk's random state
                    probe = split(made.rebuild(made.leaves), detach=True)
                    losses = losses_at(probe, heads, exchange)
                    gradients = head_gradients(probe, losses, exchange)
                    return _Measurement(losses, tuple(trunks), gradients)

    def _reevaluates(self, make: Callable[[], Any] | None, features: Any, exchange: Exchange) -> bool:
        def find() -> bool:
            with replayed(_devices()):
                return in_graph(split(features if make is None else make(), detach=False))

        again = exchange.partitioned(find) if self.reevaluate is None else self.reevaluate
        if again and make is None:
            raise ValueError(
                f"ParameterProbe: {ZERO_3}. Give the features as a function, which is then called again for "
                "each task: balancer(lambda: self.trunk(x), heads)"
            )
        return again

    def _wanted(self) -> Callable[[Tensor], bool]:
        if self.parameters is None:
            return lambda tensor: isinstance(tensor, nn.Parameter)
        given = list(self.parameters())
        if any(hasattr(tensor, "full_tensor") for tensor in given):  # a DTensor, without importing it
            raise ValueError(
                "ParameterProbe: `parameters` returned sharded tensors, which are not in the graph; leave it "
                "None to take all parameters that the features depend on"
            )
        identities = {id(tensor) for tensor in given}
        return lambda tensor: id(tensor) in identities


@dataclass(frozen=True)
class _Measurement:
    """What a measurement starts from: local losses, and for each task a trunk and its gradients there."""

    losses: TaskLosses | SampleLosses
    trunks: tuple[Trunk, ...]
    gradients: Sequence[Sequence[Tensor | None]]


def _at_present(at: _Measurement) -> list[list[Tensor]]:
    """Gradients at the features; zeros where there is none, so that all ranks traverse the same layers."""
    present = at.losses.counts > 0
    return [
        [
            torch.zeros_like(leaf) if g is None else torch.where(here.to(g.device), g, torch.zeros_like(g))
            for g, leaf in zip(row, trunk.leaves, strict=True)
        ]
        for here, row, trunk in zip(present, at.gradients, at.trunks, strict=True)
    ]


def _devices() -> list[torch.device]:
    device = torch.accelerator.current_accelerator(check_available=True)
    return [] if device is None else [torch.device(device.type, torch.accelerator.current_device_index())]
