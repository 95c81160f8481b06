"""A shared linear layer z = W x as rows: the gradient of W is a sum of products `g_s^T x_s` over rows s.

A linear layer has one row per sample (or token). A convolution has one row per position of its output: x_s is
the patch of the input under the kernel there. Grouped convolutions have several independent products per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_dist.losses import Called

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Rows:
    """What a layer read and wrote, row by row.

    Attributes:
        inputs: `[R, groups, d_in]`, x; with a last column of ones where the bias counts.
        outputs: function from a gradient at the layer's output to `[R, groups, d_out]`.
        of_samples: function from task ids, in the output's leading dimensions, to `[R]`.
        width: d_out.
    """

    inputs: Tensor
    outputs: Callable[[Tensor], Tensor]
    of_samples: Callable[[Tensor], Tensor]
    width: int

    @property
    def groups(self) -> int:
        """Number of independent products per row."""
        return self.inputs.shape[1]

    @property
    def depth(self) -> int:
        """`d_in`, including the bias."""
        return self.inputs.shape[2]


def rows_of(layer: Any, x: Tensor, z: Tensor, *, bias: bool) -> Rows:
    """The rows of one call of a layer.

    Args:
        layer: `nn.Linear`, `nn.Conv1d/2d/3d`, or transformers' `Conv1D` (a linear layer).
        x: its input.
        z: its output.
        bias: whether the gradient of the bias counts too.

    Raises:
        TypeError: another kind of layer.
    """
    x = x.detach()
    with torch.autocast(x.device.type, enabled=False):
        rows = _of_convolution(layer, x, z) if isinstance(layer, _CONVOLUTIONS) else _of_linear(layer, x, z)
        if not bias:
            return rows
        ones = rows.inputs.new_ones(*rows.inputs.shape[:2], 1)
        return Rows(torch.cat([rows.inputs, ones], dim=2), rows.outputs, rows.of_samples, rows.width)


def _of_linear(layer: Any, x: Tensor, z: Tensor) -> Rows:
    if not isinstance(layer, (nn.Linear, Called)) and type(layer).__name__ != "Conv1D":
        raise TypeError(
            "SharedLayerProbe measures nn.Linear and nn.Conv1d/2d/3d, without activation (put that at the "
            f"beginning of the heads); got layer={layer!r}"
        )
    leading, width = z.shape[:-1], z.shape[-1]
    return Rows(
        x.reshape(-1, 1, x.shape[-1]),
        lambda g: g.reshape(-1, 1, width),
        lambda ids: _spread(ids, leading),
        width,
    )


def _of_convolution(layer: Any, x: Tensor, z: Tensor) -> Rows:
    if x.dim() != 2 + len(layer.kernel_size):
        raise TypeError(
            f"SharedLayerProbe: a convolution needs a batch, {2 + len(layer.kernel_size)} dimensions; got an "
            f"input of shape {tuple(x.shape)}: give x[None]"
        )
    groups, width = layer.groups, z.shape[1] // layer.groups
    patches = _patches(layer, x)  # [B, positions..., channels, kernel...]
    num_rows = z.shape[0] * math.prod(z.shape[2:])
    depth = x.shape[1] // groups * math.prod(layer.kernel_size)
    by_position = (z.shape[0], *z.shape[2:])
    return Rows(
        patches.reshape(num_rows, groups, depth),
        lambda g: g.movedim(1, -1).reshape(num_rows, groups, width),
        lambda ids: _spread(ids, by_position),
        width,
    )


def _patches(layer: Any, x: Tensor) -> Tensor:
    """`[B, positions..., channels, kernel...]`, what the kernel sees at every position."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    patches = F.pad(x, _padding(layer), mode=mode)
    dimensions = len(layer.kernel_size)
    for axis in range(dimensions):
        size, step = layer.kernel_size[axis], layer.dilation[axis]
        # a window over the dilated kernel, of which every step-th entry is seen
        patches = patches.unfold(2 + axis, step * (size - 1) + 1, layer.stride[axis])[..., ::step]
    return patches.movedim(1, 1 + dimensions)


def _padding(layer: Any) -> list[int]:
    """As `F.pad` takes it: last axis first, before and after."""
    if layer.padding == "valid":
        return [0, 0] * len(layer.kernel_size)
    padding: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            padding += [total // 2, total - total // 2]
        else:
            padding += [layer.padding[axis]] * 2
    return padding


def _spread(ids: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Task ids of the leading dimensions, repeated over the other dimensions, flat.

    Raises:
        ValueError: the shape of the ids does not begin `shape`.
    """
    if tuple(ids.shape) != tuple(shape[: ids.dim()]):
        raise ValueError(f"task_ids of shape {tuple(ids.shape)} do not fit the layer's rows {tuple(shape)}")
    return ids.reshape(*ids.shape, *[1] * (len(shape) - ids.dim())).expand(shape).flatten()
