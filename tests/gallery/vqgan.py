"""An autoencoder with a quantised code and a discriminator, as VQGAN: the adaptive weight of its adversary.

`Relative(InverseGradNorm(), to="reconstruction")` gives the adversary the weight `‖∇r‖ / ‖∇a‖`, measured at
the decoder's last layer (Esser et al., CVPR 2021). Over ranks, the norms are those of the joined batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from mtl_dist import Balancer, Rule
from mtl_dist.weighting import Fixed, InverseGradNorm, Relative
from tests.gallery.loop import generator, train_loop
from tests.gallery.run import STEPS, parallel

PLAIN, RULE = Fixed([1.0, 0.5]), Relative(InverseGradNorm(), to="reconstruction")
LINES = 2


class Autoencoder(nn.Module):
    def __init__(self, rule: Rule | None) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 4, 1))
        self.codes = nn.Parameter(torch.randn(16, 4))
        self.decoder = nn.Sequential(nn.ConvTranspose2d(4, 8, 4, 2, 1), nn.SiLU())
        self.conv_out = nn.Conv2d(8, 1, 3, padding=1)
        self.balancer = None
        if rule is not None:
            self.balancer = Balancer(["reconstruction", "adversary"], rule)  # +

    def forward(self, x: Tensor, discriminator: nn.Module) -> tuple[Tensor, Tensor]:
        code = self.encoder(x).movedim(1, -1)
        nearest = self.codes[torch.cdist(code.reshape(-1, 4), self.codes).argmin(1)].view_as(code)
        commitment = (nearest.detach() - code).square().mean() + (nearest - code.detach()).square().mean()
        quantised = code + (nearest - code).detach()
        y = self.conv_out(self.decoder(quantised.movedim(-1, 1)))
        losses = {"reconstruction": (x - y).abs().mean(), "adversary": -discriminator(y).mean()}
        if self.balancer is None:
            loss = losses["reconstruction"] + 0.5 * losses["adversary"]
        else:
            loss = self.balancer(losses, parameters=self.conv_out.weight)  # +
        return loss + commitment, y.detach()


def train(rule: Rule | None, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    net = Autoencoder(rule)
    critic = nn.Sequential(nn.Conv2d(1, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 3))
    trained = parallel(critic)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)

    def step(model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            _, y = net(x, critic)
        hinge = softplus(-trained(x)).mean() + softplus(trained(y)).mean()
        optimizer.zero_grad()
        hinge.backward()
        optimizer.step()
        critic.requires_grad_(False)
        loss, _ = model(x, critic)
        critic.requires_grad_(True)
        return loss

    batches = torch.rand(STEPS, 8, 1, 8, 8, generator=generator())[:steps]
    return train_loop(net, batches, folder, resume, step=step, others=[critic])
