"""The training loop of the clients without a trainer of their own: plain torch, DDP where there are ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl_dist import Balancer
from tests.gallery.run import WORLD_SIZE, flat, mine, parallel


def train_loop(
    net: nn.Module,
    batches: Sequence[Any],
    folder: Path,
    resume: bool,
    *,
    lr: float = 0.05,
    step: Callable[[nn.Module, Any], Tensor] | None = None,
    others: Sequence[nn.Module] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Trains `net`, whose forward returns the loss, and keeps what a resumed run needs.

    Args:
        net: the client's model.
        batches: one for each step; ranks take their rows.
        folder: where the last call left its state.
        resume: go on from there.
        lr: learning rate.
        step: returns the loss of one batch, after steps of other optimizers; None: the model's output.
        others: modules that `step` trains, for the state.
        settings: of DDP.
    """
    model = parallel(net, **settings)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    balancers = [module for module in net.modules() if isinstance(module, Balancer)]
    file, first = folder.with_suffix(".pt"), 0
    if resume:
        state = torch.load(file, weights_only=True)
        first = state["step"]
        for module, saved in zip([net, *others], state["modules"], strict=True):
            module.load_state_dict(saved)
        optimizer.load_state_dict(state["optimizer"])
        for balancer, saved in zip(balancers, state["balancers"], strict=True):
            balancer.load_state_dict(saved)
    losses = []
    for batch in batches[first:]:
        loss = model(mine(batch)) if step is None else step(model, mine(batch))
        losses.append(loss.item() if WORLD_SIZE == 1 else 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = {"step": len(batches), "modules": [module.state_dict() for module in (net, *others)]}
    state |= {"optimizer": optimizer.state_dict(), "balancers": [one.state_dict() for one in balancers]}
    torch.save(state, file)
    return {"parameters": torch.cat([flat(module) for module in (net, *others)]), "losses": losses}


def generator(seed: int = 1) -> torch.Generator:
    """For the data, which every rank draws as a whole."""
    return torch.Generator().manual_seed(seed)


def group_norms(net: nn.Module) -> None:
    """Puts group normalisation in the place of batch normalisation, whose statistics are of one rank."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            net.set_submodule(name, nn.GroupNorm(1, module.num_features))
