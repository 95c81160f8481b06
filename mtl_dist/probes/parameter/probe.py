"""ParameterProbe: the gradient of every task at all shared parameters, as the source theory defines it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mtl_dist.engines import ZERO_3, buffers_kept, in_graph, is_sharded, replayed
from mtl_dist.losses import FeatureGradients, Heads, LocalLosses, split
from mtl_dist.probes.base import Probe, Reduced, StepContext, later_gram
from mtl_dist.probes.parameter.given import ELSEWHERE, check_reached, named
from mtl_dist.probes.parameter.rows import (
    Trunk,
    Weighing,
    check_same_parameters,
    parameter_rows,
    rows_of_losses,
)
from mtl_dist.probes.pipeline import Measured, evaluate, measure_without_trace, weigh
from mtl_dist.probes.settings import check_count, check_flag, check_seed
from mtl_dist.probes.sketch import CountSketch
from mtl_dist.probes.summed import summed_gram

Parameters = Callable[[], Iterable[Tensor]]
_PAST_UNITS = (
    "ParameterProbe: a loss reaches the trunk other than through the features (a PDE residual, a gradient "
    "penalty, a tied weight, something that the trunk computed on its way), and FSDP2 shards the parameters "
    "there: use DDP or ZeRO 0-2 for such losses, or FeatureProbe() where they only share a tied weight"
)


@dataclass(frozen=True)
class ParameterProbe(Probe):
    """Measures the Gram of `∂L_i/∂θ`, where θ are all parameters that the features depend on, every k steps.

    Gradients are averaged over ranks before they are multiplied, bucket by bucket, so the Gram is that of the
    concatenated batch, and its diagonal holds the squared norms over all shared parameters. Parameters of
    the heads do not count. Between measurements the weights hold, and the report has no norms.

    Costs of a measured step, with n tasks and P shared parameters:

    * Time: one pass through the heads (activations only; n passes if one function gives the losses of all
      tasks) and n backward passes through the trunk. Trunks without narrow places (see `segments.py`) take
      more, about half the trunk for every further bucket.
    * Memory: n gradients of one bucket (about a layer of a large trunk; at most n P / 8 numbers, unless one
      parameter is larger), and n gradients of the activations at a cut.
    * Communication: n P numbers in reduce-scatters (exact), or n m (sketch); and n² + O(n) numbers. Ranks
      compare their lists of parameters first, and the host waits for that.

    Features may be given as a function, `balancer(lambda: self.trunk(x), heads)`. This is needed where the
    engine frees parameters after use (ZeRO-3): the trunk is then evaluated once more for each task, on the
    same random state, and n graphs of it exist at once. Everywhere else (plain torch, DDP, FSDP2, ZeRO 0-2)
    the graph of the features is used.

    Losses may reach the shared parameters on other ways too: by derivatives with respect to the trunk's input
    (PDE residuals, gradient penalties), by a tied weight, or by something that the trunk computed on its way.
    The gradients of the losses themselves are then taken, by n backward passes through everything for each
    bucket (not under FSDP2 and ZeRO-3, where such losses are refused).

    Tensor hooks that change a gradient on its way may be applied twice; use autograd functions for that.

    Attributes:
        every: k, steps from one measurement to the next.
        sketch: m, size of a random linear sketch that replaces the exact gradients. Entries of the Gram,
            divided by the product of the two norms, then have an error of standard deviation at most √(2/m).
            None: exact.
        bucket: number of parameter elements whose gradients are held and reduced at a time. None: as
            many as the largest part of the graph between two narrow places, but at most an eighth of the
            shared parameters, and at least 4 million.
        parameters: a function that returns the parameters that count (such as those of the last shared
            layer, which costs less); None: all that the features depend on, found in their graph.
        reevaluate: evaluate the trunk again for each task; None: where the engine needs it.
        seed: of the sketches; every step draws a new sketch.

    Raises:
        ValueError: no shared parameter behind the features, different ones on different ranks, or partitioned
            ones without a function for the features; on every rank.
    """

    every: int = 1
    sketch: int | None = None
    bucket: int | None = None
    parameters: Parameters | None = field(default=None, repr=False)
    reevaluate: bool | None = None
    seed: int = 0

    takes_functions: ClassVar[bool] = True
    grams_add: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count(self, "every")
        check_count(self, "bucket", optional=True)
        check_count(self, "sketch", optional=True)
        check_flag(self, "reevaluate", optional=True)
        check_seed(self)
        if self.parameters is not None and not callable(self.parameters):
            raise ValueError(
                "ParameterProbe: parameters must be None or a function that returns them, got "
                f"{type(self.parameters).__name__}"
            )

    def __call__(self, features: Any, heads: Heads, step: StepContext) -> Tensor:
        """`Σ α_i s_i l_i`."""
        make = features if callable(features) else None
        before: Measured | None = None
        trunks: Sequence[Trunk] = ()
        if step.measure and self._reevaluates(make, features, step) and make is not None:
            trunks, before = self._without_trace(make, heads, step)
        batch = evaluate(
            features if make is None else make(),
            heads,
            step,
            reevaluate=False if before is None else None,
            before=before,
            follows=True,
        )
        if batch.measured is not None and before is None:
            trunk = Trunk.below(batch.shared.leaves, self._wanted(), self.bucket)
            trunks = [trunk] * len(step.tasks)
            if batch.measured.past and trunk.plan.units:
                raise ValueError(_PAST_UNITS)
        reduced = step.reduce(batch.losses.stats())
        if batch.measured is not None:
            reduced = self._with_gram(reduced, batch.measured, trunks, step)
        return weigh(batch, reduced, step)

    def of_losses(self, losses: LocalLosses, parameters: Any, step: StepContext) -> Reduced:
        """The statistics of losses that have their graph already, with the Gram at given parameters.

        Each loss goes back through its whole graph, once for each bucket of parameters.

        Args:
            losses: of this rank.
            parameters: a module, a tensor, or tensors: leaves of the graph, the same on every rank.
            step: this step.

        Raises:
            TypeError: something else.
            ValueError: parameters that are not trained, or that FSDP2 or ZeRO-3 shards.
        """
        trunk = named(parameters, self.bucket)
        check_reached(losses, trunk, step)
        counts = losses.counts
        with step.engine.before_backward(losses, trunk.plan.parameters) as scale, buffers_kept():
            if step.engine.units is not None:
                raise ValueError(ELSEWHERE.format(engine="FSDP2"))
            reduced = step.reduce(losses.stats())
            check_same_parameters(trunk, step, counts.device, reduced.world_size)
            weighing = Weighing.of(counts, reduced.total.counts, reduced.world_size)
            blocks = rows_of_losses(trunk, losses, scale, weighing)
            gram, faulty = summed_gram(blocks, step, len(counts), counts.device, self._sketch(step))
        gradients = FeatureGradients((), counts, scale=scale)
        return later_gram(reduced, gradients.unscaled(gram), faulty, step)

    def _with_gram(
        self, reduced: Reduced, measured: Measured, trunks: Sequence[Trunk], step: StepContext
    ) -> Reduced:
        counts = measured.losses.counts
        check_same_parameters(trunks[0], step, counts.device, reduced.world_size)
        sketch = self._sketch(step)
        weighing = Weighing.of(counts, reduced.total.counts, reduced.world_size)
        with step.engine.before_backward(measured.losses, trunks[0].leaves) as scale, buffers_kept():
            if measured.past:
                blocks = rows_of_losses(trunks[0], measured.losses, scale, weighing)
            else:
                blocks = parameter_rows(trunks, _all_leaves(measured, trunks), weighing)
            gram, faulty = summed_gram(blocks, step, len(counts), counts.device, sketch)
        return later_gram(reduced, measured.gradients.unscaled(gram), faulty, step)

    def _sketch(self, step: StepContext) -> CountSketch | None:
        return None if self.sketch is None else CountSketch(self.sketch, (self.seed << 32) + step.step)

    def _without_trace(
        self, make: Callable[[], Any], heads: Heads, step: StepContext
    ) -> tuple[Sequence[Trunk], Measured]:
        """One evaluation of the trunk per task, and one of the heads; their side effects are undone."""
        trunks: list[Trunk] = []
        while True:
            with replayed(_devices()):
                made = split(make(), detach=False)
                # once: the engine gathers a layer's parameters as often as its forward ran
                trunks.append(Trunk.below(made.leaves, self._wanted(), self.bucket, once=True))
                if len(trunks) == len(step.tasks):  # the heads continue with the trunk's random state
                    return trunks, measure_without_trace(made.rebuild(), heads, step)

    def _reevaluates(self, make: Callable[[], Any] | None, features: Any, step: StepContext) -> bool:
        def find() -> bool:
            with replayed(_devices()):
                return in_graph(split(features if make is None else make(), detach=False))

        again = self.reevaluate
        if again is None:
            again = step.engine.find_partitioned(find, step.rank)
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
        if any(map(is_sharded, given)):
            raise ValueError(
                "ParameterProbe: `parameters` returned sharded tensors, which are not in the graph; leave it "
                "None to take all parameters that the features depend on"
            )
        identities = {id(tensor) for tensor in given}
        return lambda tensor: id(tensor) in identities


def _all_leaves(measured: Measured, trunks: Sequence[Trunk]) -> list[list[Tensor]]:
    """Gradients at the features, zeros where there is none, so that all ranks traverse the same layers."""
    return [
        [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(row, trunk.leaves, strict=True)]
        for row, trunk in zip(measured.gradients.by_task(), trunks, strict=True)
    ]


def _devices() -> list[torch.device]:
    device = torch.accelerator.current_accelerator(check_available=True)
    return [] if device is None else [torch.device(device.type, torch.accelerator.current_device_index())]
