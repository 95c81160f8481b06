"""Spectral regularisation: the sum of the largest singular values of all convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SpectralNorms(nn.Module):
    """`Σ σ_max(W)` over the convolutions of a model, by power iteration with memory (Miyato et al. 2018).

    The left singular vectors are buffers, so a resumed run goes on with them. They follow from the weights
    alone and start from a fixed seed, so all ranks have the same ones. A weight is an `[out, rest]` matrix.

    Args:
        model: its convolutions are those of `modules()`.
        iterations: of the power method, in every call.
    """

    def __init__(self, model: nn.Module, iterations: int = 2) -> None:
        super().__init__()
        self.iterations = iterations
        draw = torch.Generator().manual_seed(0)
        for index, weight in enumerate(convolutions(model)):
            start = torch.randn(len(weight), generator=draw)
            self.register_buffer(f"left_{index}", F.normalize(start, dim=0))

    def forward(self, model: nn.Module) -> Tensor:
        """The sum, a scalar with a gradient; the vectors move closer to the singular vectors.

        Raises:
            ValueError: an engine has partitioned the weights.
        """
        total = []
        for index, weight in enumerate(convolutions(model)):
            left = self.get_buffer(f"left_{index}")
            # not a plain tensor (FSDP2), or an empty one (ZeRO-3)
            if type(weight.data) is not Tensor or len(weight) != len(left):
                raise ValueError(
                    "HierarchicalVAE: spectral regularisation needs whole weights, but the engine partitions "
                    f"them (shape {list(weight.shape)}); set recipe.spectral=0, or use DDP or ZeRO-2"
                )
            matrix = weight.flatten(1)
            with torch.no_grad():
                for _ in range(self.iterations):
                    right = F.normalize(left @ matrix, dim=0)
                    left.copy_(F.normalize(matrix @ right, dim=0))
                fixed = left.clone()  # autograd needs the vector of this call
            total.append(fixed @ matrix @ right)
        return torch.stack(total).sum()


def convolutions(model: nn.Module) -> list[Tensor]:
    """The weights of all convolutions of a model, in the order of its modules."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
