"""SharedLayerProbe: the gradient of every task at the last shared layer's weight, before the backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mtl_dist.losses import FeatureGradients, Heads, LayerInput
from mtl_dist.probes.base import LaggedStep, Probe, ProbeMemory, Reduced, StepContext, later_gram
from mtl_dist.probes.lagged import lagged
from mtl_dist.probes.pipeline import evaluate, weigh
from mtl_dist.probes.settings import check_count, check_flag, check_seed
from mtl_dist.probes.shared_layer.compare import compared
from mtl_dist.probes.shared_layer.kernel import kernel_gram
from mtl_dist.probes.shared_layer.layer import Rows, rows_of
from mtl_dist.probes.shared_layer.products import Products
from mtl_dist.probes.sketch import CountSketch
from mtl_dist.probes.summed import summed_gram
from mtl_dist.stats import HOST

Form = Literal["auto", "exact", "kernel"]


class FormChoice(ProbeMemory):
    """Which form of layer takes the kernel, decided once per balancer and the same on all ranks.

    The two forms round differently, so a resumed run keeps what the first batch of the run has decided.

    Attributes:
        compared: whether the layer was once compared with the linear map that its weight says.
    """

    def __init__(self) -> None:
        self.compared = False
        self._kernel: dict[tuple[int, int, int], bool] = {}

    def __call__(self, form: tuple[int, int, int], decide: Callable[[], bool]) -> bool:
        """What `decide` gave when this form (sets of gradients, d_out, d_in) was first asked for."""
        if form not in self._kernel:
            self._kernel[form] = decide()
        return self._kernel[form]

    def state(self) -> dict[str, Tensor]:
        """`forms`: `[k, 4]` int64, a form and whether it takes the kernel."""
        rows = [[*form, int(kernel)] for form, kernel in self._kernel.items()]
        return {"forms": torch.tensor(rows, device=HOST)} if rows else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `ProbeMemory`."""
        forms = state.get("forms", torch.zeros(0, 4, dtype=torch.int64, device=HOST))
        if forms.dtype != torch.int64 or forms.dim() != 2 or forms.shape[1] != 4:
            raise ValueError(
                f"state 'probe.forms' must be int64 of shape [k, 4], got {forms.dtype} of "
                f"{list(forms.shape)}: the state is damaged"
            )
        self._kernel = {(q, width, depth): bool(kernel) for q, width, depth, kernel in forms.tolist()}


@dataclass(frozen=True)
class SharedLayerProbe(Probe):
    """Measures the Gram of `∂L_i/∂W`, where W is the weight of the last shared layer z = W x.

        balancer(x, heads, layer=self.last)                             # heads read z = self.last(x)
        balancer(hidden, losses, layer=model.lm_head, task_ids=domain)  # a shared output head

    All samples meet in W. So tasks that share no sample conflict here as they do in training, while their
    gradients at the features are always orthogonal. It needs no more backward passes than FeatureProbe:
    `∂l_i/∂W = g_i^T x` with `g_i = ∂l_i/∂z`. This is linear in the samples, so it adds over ranks, and the
    Gram is that of the globally averaged gradient. Engines see only the layer's own forward.

    Costs of a measured step in addition to those of FeatureProbe, with n tasks, R rows (samples, tokens, or
    positions of a convolution) over all ranks, and a layer `[d_out, d_in]`:

    * exact: n products `[d_out, R] [R, d_in]` (one where samples have `task_ids`), and n·d_out·d_in numbers
      reduced, some million at a time; never more of them in memory.
    * kernel, the same Gram through `x_s · x_t` of all pairs of rows: cheaper for fewer rows than inputs. R
      (d_in + n d_out) numbers are gathered (R (d_in + d_out) with `task_ids`), and the host waits for that.
    * sketch: as exact, but n·m numbers reduced in one piece. Unbiased. Entries of the Gram, divided by the
      product of the two norms, have an error of standard deviation at most √(2/m). Every step draws a new
      sketch.

    If the layer's weight has other uses (tied embeddings), only the gradient of this use counts.

    Attributes:
        sketch: m; None: no sketch. (Nor for layers with fewer weights than that.)
        bias: whether the layer's bias counts too.
        form: "exact", "kernel", or "auto": the one that moves fewer numbers at the first step's batch, which
            checkpoints keep.
        reevaluate: as for `FeatureProbe`.
        seed: of the sketches.

    Raises:
        ValueError: the balancer was called without `layer=`; a setting out of range; a layer whose output at
            the first measured step is not its weight times its input.
        TypeError: a layer that is neither a linear layer nor a convolution, or a complex one.
    """

    sketch: int | None = None
    bias: bool = False
    form: Form = "auto"
    reevaluate: bool | None = None
    seed: int = 0

    takes_layers: ClassVar[bool] = True
    grams_add: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count(self, "sketch", optional=True)
        check_flag(self, "bias")
        check_flag(self, "reevaluate", optional=True)
        check_seed(self)
        if self.form not in ("auto", "exact", "kernel"):
            raise ValueError(f'SharedLayerProbe: form must be "auto", "exact" or "kernel", got {self.form!r}')

    def __call__(self, features: Any, heads: Heads, step: StepContext) -> Tensor:
        """`Σ α_i s_i l_i`."""
        z, rows = self._layer_rows(features, step)
        batch = evaluate(z, heads, step, reevaluate=self.reevaluate)
        products = None
        if batch.measured is not None and rows is not None:
            products = _products(rows, batch.measured.gradients)
        reduced = step.reduce(batch.losses.stats())
        if products is not None and batch.measured is not None:
            reduced = self._with_gram(reduced, products, batch.measured.gradients, step)
        return weigh(batch, reduced, step)

    def lagged(self, features: Any, heads: Heads, step: LaggedStep) -> Tensor:
        """The same with the weights from before this step, measured in the one backward.

        The ranks exchange rows there, as always; only the last reduction runs beside the backward.
        """
        if not heads.apart:
            return self(features, heads, step)
        z, rows = self._layer_rows(features, step)

        def to_gram(gradients: FeatureGradients) -> tuple[Tensor, Tensor]:
            assert rows is not None
            products = _products(rows, gradients)
            return self._gram(products, step.world_size, step), products.faulty

        return lagged(z, heads, step, to_gram=to_gram)

    def _layer_rows(self, features: Any, step: StepContext) -> tuple[Any, Rows | None]:
        """The layer's output, and its rows if the step measures."""
        if not isinstance(features, LayerInput):
            raise ValueError(
                "SharedLayerProbe needs the last shared layer, and the features as its input: "
                "balancer(x, heads, layer=self.last), where heads are functions of self.last(x)"
            )
        z = self._output(features, step)
        return z, self._rows(features, z) if step.measure else None

    def memory(self) -> FormChoice:
        """The form of each layer, which follows from the first batch."""
        return FormChoice()

    def _output(self, features: LayerInput, step: StepContext) -> Any:
        memory: FormChoice = step.memory
        if memory.compared or not step.measure:
            return features.layer(features.input)
        z = compared(features.layer, features.input, step)
        memory.compared = isinstance(z, Tensor) and z.numel() > 0
        return z

    def _rows(self, features: LayerInput, z: Any) -> Rows:
        if not isinstance(features.input, Tensor) or not isinstance(z, Tensor):
            raise TypeError(
                "SharedLayerProbe: the layer must read one tensor and give one tensor; got "
                f"{type(features.input).__name__} and {type(z).__name__}"
            )
        if features.input.is_complex() or z.is_complex():
            raise TypeError(
                "SharedLayerProbe measures real layers, and this one is complex: use ParameterProbe(), or "
                "FeatureProbe()"
            )
        return rows_of(features.layer, features.input, z, bias=self.bias)

    def _with_gram(
        self, reduced: Reduced, products: Products, gradients: FeatureGradients, step: StepContext
    ) -> Reduced:
        faulty = products.faulty
        gram = self._gram(products, reduced.world_size, step)
        return later_gram(reduced, gradients.unscaled(gram), faulty, step)

    def _gram(self, products: Products, world_size: int, step: StepContext) -> Tensor:
        """`[n, n]`, this rank's part of the Gram."""
        if self._takes_kernel(products, step):
            return kernel_gram(products, step, world_size)
        sketch = self._sketch(products, step.step)
        return summed_gram(products.blocks(), step, products.num_tasks, products.inputs.device, sketch)[0]

    def _sketch(self, products: Products, step: int) -> CountSketch | None:
        groups, depth = products.inputs.shape[1:]
        size = groups * depth * products.gradients.shape[-1]
        if self.sketch is None or self.sketch >= size:
            return None
        return CountSketch(self.sketch, (self.seed << 32) + step)

    def _takes_kernel(self, products: Products, step: StepContext) -> bool:
        """The same on every rank: from the first step's number of rows, which ranks tell each other once."""
        groups, depth = products.inputs.shape[1:]
        if self.form == "exact" or self.sketch is not None or groups > 1:
            return False
        if self.form == "kernel":
            return True
        q, width = products.gradients.shape[0], products.gradients.shape[-1]

        def cheaper() -> bool:
            mine = torch.tensor([[len(products.inputs)]], device=products.inputs.device)
            num_rows = int(step.gather_rows(mine).sum())
            return num_rows * (2 * depth + q * width) < q * width * depth

        choice: FormChoice = step.memory
        return choice((q, width, depth), cheaper)


def _products(rows: Rows, found: FeatureGradients) -> Products:
    """The local rows: gradients of `c_i l_i` at the layer's output, times the loss scale, and its inputs."""
    sets, counts, owner = found.sets, found.counts, found.owner
    dtype = max(
        [rows.inputs.dtype, torch.float32, *[g.dtype for own in sets for g in own if g is not None]],
        key=lambda dtype: torch.finfo(dtype).bits,
    )
    inputs, n = rows.inputs.to(dtype), len(counts)
    if owner is not None:
        (gradient,) = sets[0]
        tasks = rows.of_samples(owner)
        if gradient is None:
            return Products(inputs, inputs.new_zeros(1, len(inputs), rows.groups, rows.width), tasks, n)
        g = rows.outputs(gradient).to(dtype)
        if found.row_factors is not None:
            g = g * found.row_factors.to(dtype)[tasks][:, None, None]
        return Products(inputs, g[None], tasks, n)
    gradients = inputs.new_zeros(n, len(inputs), rows.groups, rows.width)
    for row, count, (gradient,) in zip(gradients, counts.to(dtype), sets, strict=True):
        if gradient is not None:
            row.copy_(rows.outputs(gradient)).mul_(count)
    absent = counts == 0
    if absent.device.type != HOST or absent.any():  # no pass over all rows where the host can look
        gradients.masked_fill_(absent[:, None, None, None], 0)  # the mean over no sample is NaN
    return Products(inputs, gradients, None, n)
