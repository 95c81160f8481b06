"""Whether a layer is the linear map that its weight says: compared once, with the layer's own class."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mtl_dist.probes.base import StepContext

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ROUNDINGS = 16  # how many roundings of its precision, relative to the largest entry, two ways may differ by


def compared(layer: Any, x: Any, step: StepContext) -> Any:
    """The layer's output, after a look at whether it is linear in the layer's weight.

    A subclass with another forward, a hook that scales, masks or casts to few bits, or an adapter beside the
    weight would all give another gradient than `g^T x`.

    Raises:
        ValueError: it is not, by `refuse`.
    """
    base: Any = next((kind for kind in _LINEAR if isinstance(layer, kind)), None)
    if type(layer).__name__ == "Conv1D":  # transformers' linear layer
        base = type(layer)
    if (
        base is None or not isinstance(x, Tensor) or x.is_complex()
    ):  # such layers and inputs have their own check
        return layer(x)
    found: list[Tensor] = []

    def plain(module: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
        """Runs while an engine has the layer's parameters together, before its own hooks free them."""
        with torch.no_grad():
            own = inputs[0].dtype if inputs and isinstance(inputs[0], Tensor) else x.dtype
            found.append(base.forward(module, x.detach().to(own)))

    handle = layer.register_forward_hook(plain, prepend=True)
    try:
        with parametrize.cached() if parametrize.is_parametrized(layer) else nullcontext():
            z = layer(x)
    finally:
        handle.remove()
    if found and isinstance(z, Tensor):
        step.refuse(_differ(z.detach(), found[0]), partial(_not_linear, layer))
    return z


def _differ(z: Tensor, plain: Tensor) -> Tensor:
    if z.shape != plain.shape:
        return torch.ones((), dtype=torch.bool, device=z.device)
    if not z.numel():
        return torch.zeros((), dtype=torch.bool, device=z.device)
    precision = max(torch.finfo(z.dtype).eps, torch.finfo(plain.dtype).eps)
    error = (z.to(torch.float32) - plain.to(torch.float32)).abs().amax()
    differ: Tensor = error > _ROUNDINGS * precision * plain.to(torch.float32).abs().amax()
    return differ


def _not_linear(layer: Any) -> ValueError:
    kind = type(layer).__name__
    return ValueError(
        f"SharedLayerProbe: the output of layer={kind} is not its weight times its input plus its bias (a "
        "subclass with another forward, a hook, or an activation does this), so the gradient of the weight "
        "would be wrong: give the plain layer, and put the rest at the beginning of the heads; or use "
        "ParameterProbe(parameters=...)"
    )
