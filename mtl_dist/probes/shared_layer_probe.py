"""SharedLayerProbe: every task's gradient of the last shared layer's weight, before the backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mtl_dist.probes._base import Exchange, Probe, Reduced
from mtl_dist.probes._features import Features, anchored, split
from mtl_dist.probes._layer import LayerInput, Rows, rows_of
from mtl_dist.probes._layer_kernel import kernel_gram
from mtl_dist.probes._layer_rows import Products
from mtl_dist.probes._losses import Heads, TaskLosses
from mtl_dist.probes._mixture import SampleLosses
from mtl_dist.probes._parameter_rows import reduced_gram
from mtl_dist.probes._replay import replayed
from mtl_dist.probes._sketch import CountSketch
from mtl_dist.probes.feature_probe import check_same, head_gradients, losses_at, reevaluates, undisturbed
from mtl_dist.stats import LocalStats

Form = Literal["auto", "exact", "kernel"]
TaskOrSampleLosses = TaskLosses | SampleLosses


@dataclass(frozen=True)
class SharedLayerProbe(Probe):
    """Measures the Gram of `∂L_i/∂W`, W the weight of the last shared layer z = W x.

        balancer(x, heads, layer=self.last)                             # heads read z = self.last(x)
        balancer(hidden, losses, layer=model.lm_head, task_ids=domain)  # a shared output head

    All samples meet in W, so tasks that share no sample conflict here as they do in training, where their
    gradients at the features are orthogonal by construction. Needs no backward pass beyond FeatureProbe's:
    `∂l_i/∂W = g_i^T x` with `g_i = ∂l_i/∂z`. It is linear in the samples, so it adds over ranks, and the Gram
    is that of the globally averaged gradient. Engines see nothing but the layer's own forward.

    Costs of a measured step beside FeatureProbe's, with n tasks, R rows (samples, tokens, or positions of a
    convolution) over all ranks, and a layer `[d_out, d_in]`:

    * exact: n products `[d_out, R] [R, d_in]` (one where samples have `task_ids`), and n·d_out·d_in numbers
      reduced, some million at a time; never more of them in memory.
    * kernel, the same Gram through `x_s · x_t` of all pairs of rows: cheaper for fewer rows than inputs. R
      (d_in + n d_out) numbers gathered (R (d_in + d_out) with `task_ids`), where the host waits.
    * sketch: as exact, but n·m numbers reduced in one piece. Unbiased; entries of the Gram, per product of
      the two norms, have an error of standard deviation at most √(2/m). Every step draws anew.

    Where the layer's weight has other uses (tied embeddings), this one's gradient counts.

    Attributes:
        sketch: m; None: no sketch. (Nor for layers with fewer weights than that.)
        bias: whether the layer's bias counts too.
        form: "exact", "kernel", or "auto": what moves fewer numbers at the first step's batch.
        reevaluate: as for `FeatureProbe`.
        seed: of the sketches.

    Raises:
        ValueError: the balancer was called without `layer=`; a setting out of range.
        TypeError: a layer that is no linear layer or convolution.
    """

    sketch: int | None = None
    bias: bool = False
    form: Form = "auto"
    reevaluate: bool | None = None
    seed: int = 0

    takes_layers: ClassVar[bool] = True
    grams_add: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.sketch is not None and self.sketch < 1:
            raise ValueError(f"SharedLayerProbe: sketch must be None or at least 1, got {self.sketch}")
        if self.form not in ("auto", "exact", "kernel"):
            raise ValueError(f'SharedLayerProbe: form must be "auto", "exact" or "kernel", got {self.form!r}')

    def __call__(self, features: Any, heads: Heads, exchange: Exchange) -> Tensor:
        """`Σ α_i s_i l_i`."""
        if not isinstance(features, LayerInput):
            raise ValueError(
                "SharedLayerProbe needs the last shared layer, and the features as its input: "
                "balancer(x, heads, layer=self.last), where heads are functions of self.last(x)"
            )
        z = features.layer(features.input)
        rows = self._rows(features, z) if exchange.measure else None
        again = rows is not None and reevaluates(self, self.reevaluate, z, heads, exchange)
        measured = self._apart(z, rows, heads, exchange) if again and rows is not None else None
        shared = split(z, detach=False)
        losses = losses_at(shared, heads, exchange)
        products: Products | None = None
        if measured is not None:
            first, products = measured
            check_same(first, losses, exchange)
        elif rows is not None:
            products = _products(shared, rows, losses, exchange)
        reduced = exchange.reduce(losses.stats())
        if products is not None:
            reduced = reduced.with_gram(self._reduced(products, reduced.world_size, exchange))
        weights = exchange.decide(reduced)
        total = losses.total(weights * reduced.shares)
        return total if losses.any_present else anchored(total, shared.leaves)

    def _rows(self, features: LayerInput, z: Any) -> Rows:
        if not isinstance(features.input, Tensor) or not isinstance(z, Tensor):
            raise TypeError(
                "SharedLayerProbe: the layer must read and give one tensor; got "
                f"{type(features.input).__name__} and {type(z).__name__}"
            )
        return rows_of(features.layer, features.input, z, bias=self.bias)

    def _apart(
        self, z: Tensor, rows: Rows, heads: Heads, exchange: Exchange
    ) -> tuple[TaskOrSampleLosses, Products]:
        """Losses and gradients of an evaluation of the heads that leaves no trace."""
        probe = split(z, detach=True)
        with replayed([z.device]):
            losses = losses_at(probe, heads, exchange)
            return losses, _products(probe, rows, losses, exchange)

    def _reduced(self, products: Products, world_size: int, exchange: Exchange) -> Reduced:
        """The second reduction of a step: the Gram of what the first kind of collective summed."""
        n, device = products.num_tasks, products.inputs.device
        faulty = products.faulty
        if self._takes_kernel(products, exchange):
            gram = kernel_gram(products, exchange, world_size)
        else:
            sketch = self._sketch(products, exchange.step)
            gram, _ = reduced_gram(products.blocks(), exchange, n, device, sketch)
        scale = exchange.loss_scale(device)
        if scale is not None:
            gram = gram / scale.to(gram.dtype).square()
        zeros = LocalStats.zeros(n, device)
        return exchange.reduce(LocalStats(zeros.loss_sums, zeros.counts, gram), faulty)

    def _sketch(self, products: Products, step: int) -> CountSketch | None:
        groups, depth = products.inputs.shape[1:]
        size = groups * depth * products.gradients.shape[-1]
        if self.sketch is None or self.sketch >= size:
            return None
        return CountSketch(self.sketch, (self.seed << 32) + step)

    def _takes_kernel(self, products: Products, exchange: Exchange) -> bool:
        """The same on every rank: from the first step's number of rows, which ranks tell each other once."""
        groups, depth = products.inputs.shape[1:]
        if self.form == "exact" or self.sketch is not None or groups > 1:
            return False
        if self.form == "kernel":
            return True
        q, width = products.gradients.shape[0], products.gradients.shape[-1]

        def cheaper() -> bool:
            mine = torch.tensor([[len(products.inputs)]], device=products.inputs.device)
            num_rows = int(exchange.gather_rows(mine).sum())
            return num_rows * (2 * depth + q * width) < q * width * depth

        return exchange.once(f"shared layer {q} {width} {depth}", cheaper)


def _products(shared: Features, rows: Rows, losses: TaskOrSampleLosses, exchange: Exchange) -> Products:
    """The local rows: gradients of `c_i l_i` at the layer's output, times the loss scale, and its inputs."""
    (z,) = shared.leaves
    dtype = torch.float64 if torch.float64 in (z.dtype, rows.inputs.dtype) else torch.float32
    inputs, n = rows.inputs.to(dtype), len(exchange.tasks)
    if isinstance(losses, SampleLosses):
        with undisturbed(shared.leaves, losses, exchange):
            (gradient,) = losses.gradients(shared.leaves, exchange.loss_scale(z.device))
        g = rows.outputs(torch.zeros_like(z) if gradient is None else gradient).to(dtype)
        return Products(inputs, g[None], rows.of_samples(losses.rows), n)
    gradients = inputs.new_zeros(n, len(inputs), rows.groups, rows.width)
    for row, count, (gradient,) in zip(
        gradients, losses.counts.to(dtype), head_gradients(shared, losses, exchange), strict=True
    ):
        if gradient is not None:
            row.copy_(rows.outputs(gradient)).mul_(count)
    absent = losses.counts == 0
    if absent.device.type != "cpu" or absent.any():  # no pass over all rows where the host may know
        gradients.masked_fill_(absent[:, None, None, None], 0)  # the mean over no sample is NaN
    return Products(inputs, gradients, None, n)
