"""A small hierarchical VAE: groups of latents at two scales, with residual normal posteriors.

The prior of a group is `p = N(μ, σ²)`, its posterior `q = N(μ + Δμ, (σ Δσ)²)`. Then

    KL(q ‖ p) = ½ (Δμ² / σ² + Δσ² - log Δσ² - 1)

(Vahdat and Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder", NeurIPS 2020; there is no batch
normalisation here, because its statistics would be those of one rank.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_dist.recipes._base import eval_rows
from mtl_dist.recipes.hierarchical_vae.spectral import SpectralNorms
from mtl_dist.stats import stats_dtype

LEVELS = 17  # values of a pixel
_SHRUNK = (4, 4, 2, 2)  # of each group, from the top: its latents have 1/4 or 1/2 of the image's height
TASKS = ("pixels", *(f"kl_{group}" for group in range(len(_SHRUNK))))


def scales(side: int) -> tuple[int, ...]:
    """Height and width of the latents of each group, from the top, for images of `side` pixels."""
    return tuple(side // factor for factor in _SHRUNK)


def num_noise(side: int, latents: int) -> int:
    """Number of latents of an image."""
    return latents * sum(scale**2 for scale in scales(side))


def soft_clamp(x: Tensor) -> Tensor:
    """`5 tanh(x / 5)`: logarithms of scales stay in a range in which their exponentials are harmless."""
    return 5 * (x / 5).tanh()


def residual_kl(shift: Tensor, log_ratio: Tensor, log_scale: Tensor) -> Tensor:
    """KL of every latent, in nats: from Δμ, log Δσ and log σ, all of one shape."""
    # ½ (Δμ² / σ² + Δσ² - log Δσ² - 1)
    return 0.5 * ((shift / log_scale.exp()).square() + (2 * log_ratio).exp() - 2 * log_ratio - 1)


class Cell(nn.Module):
    """A residual cell of two convolutions.

    Args:
        channels: of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        """`[B, C, H, W]`, unchanged in shape."""
        out: Tensor = h + 0.1 * self.second(F.silu(self.first(F.silu(h))))
        return out


class Group(nn.Module):
    """One group of latents: its prior, its posterior, and how it enters the decoder.

    Args:
        channels: of the features.
        latents: channels of the latents.
        first: whether the prior is the standard normal distribution.
    """

    def __init__(self, channels: int, latents: int, first: bool) -> None:
        super().__init__()
        self.prior = None if first else nn.Conv2d(channels, 2 * latents, 1)
        self.posterior = nn.Conv2d(2 * channels, 2 * latents, 3, padding=1)
        self.enter = nn.Conv2d(latents, channels, 1)
        self.cell = Cell(channels)

    def forward(self, h: Tensor, seen: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The next features, and the KL of every latent, `[B, latents, H, W]`.

        Args:
            h: `[B, C, H, W]`: features of the groups above.
            seen: `[B, C, H, W]`: features of the image. None: draw from the prior.
            noise: `[B, latents, H, W]`, standard normal.
        """
        if self.prior is None:
            mean, log_scale = torch.zeros_like(noise), torch.zeros_like(noise)
        else:
            mean, log_scale = self.prior(F.silu(h)).chunk(2, 1)
            log_scale = soft_clamp(log_scale)
        if seen is None:
            z, kl = mean + log_scale.exp() * noise, torch.zeros_like(noise)
        else:
            shift, log_ratio = self.posterior(F.silu(torch.cat([h, seen], 1))).chunk(2, 1)
            log_ratio = soft_clamp(log_ratio)
            kl = residual_kl(shift, log_ratio, log_scale)
            z = mean + shift + (log_scale + log_ratio).exp() * noise
        return self.cell(h + self.enter(z)), kl


class HierarchicalVAE(nn.Module):
    """Encoder, groups of latents from coarse to fine, and a categorical distribution for every pixel.

    Args:
        balancer: turns the reconstruction loss and the KL terms into the scalar loss.
        side: height and width S of the images; a multiple of 4.
        channels: number of features.
        latents: channels of the latents of a group.
        spectral: factor of the spectral regularisation; 0: none.
    """

    def __init__(self, balancer: nn.Module, side: int, channels: int, latents: int, spectral: float) -> None:
        super().__init__()
        self.balancer = balancer
        self.side, self.scales = side, scales(side)
        self.latents, self.spectral = latents, spectral
        self.read = nn.Conv2d(1, channels, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(2))
        self.up = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.cells = nn.ModuleList(Cell(channels) for _ in range(3))
        self.top = nn.Parameter(torch.zeros(channels, self.scales[0], self.scales[0]))
        self.groups = nn.ModuleList(Group(channels, latents, k == 0) for k in range(len(self.scales)))
        self.write = nn.Conv2d(channels, LEVELS, 1)
        self.norms = SpectralNorms(self) if spectral else None

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        """In training mode the balancer's scalar, in eval mode the sums that `Recipe.model` describes.

        The losses are nats per image. The spectral regularisation is no task, and no loss of a sample: it is
        added to the balancer's scalar.

        Args:
            image: `[B, S, S]` int64, levels from 0 to 16.
            noise: `[B, num_noise]`, standard normal: the noise of all latents of each sample. It comes with
                the sample, so that a sample has the same latents on whatever rank it is.
        """
        logits, kls = self.decode(noise, self.encode(image))
        pixels = F.cross_entropy(logits, image, reduction="none").sum((1, 2))
        terms = [kl.flatten(1) for kl in kls]
        if not self.training:
            dtype = stats_dtype(image.device)
            units = [term.to(dtype).sum(0) for term in terms]
            count = image.new_full((1,), len(image)).to(dtype)
            rows = [(unit.sum(), len(image), torch.cat([count, unit])) for unit in units]
            total = pixels.to(dtype).sum()
            size = torch.full_like(total, image.numel())
            return eval_rows([(total, len(image), torch.stack([total, size])), *rows])
        losses = dict(zip(TASKS, [pixels.mean(), *(term.sum(1).mean() for term in terms)], strict=True))
        scalar: Tensor = self.balancer(losses, counts=dict.fromkeys(TASKS, len(image)))
        return scalar if self.norms is None else scalar + self.spectral * self.norms(self)

    def encode(self, image: Tensor) -> dict[int, Tensor]:
        """Features of the image, by their height: `[B, C, S/2, S/2]` and `[B, C, S/4, S/4]`."""
        h = self.cells[0](self.read(image[:, None].to(self.top.dtype) / (LEVELS - 1) - 0.5))
        half = self.cells[1](self.down[0](F.silu(h)))
        quarter = self.cells[2](self.down[1](F.silu(half)))
        return {half.shape[-1]: half, quarter.shape[-1]: quarter}

    def decode(self, noise: Tensor, seen: dict[int, Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Logits of all pixels, `[B, 17, S, S]`, and the KL of every latent of each group."""
        h = self.top.expand(len(noise), -1, -1, -1)
        kls, parts = [], torch.split(noise, [self.latents * side**2 for side in self.scales], 1)
        for group, side, part in zip(self.groups, self.scales, parts, strict=True):
            if h.shape[-1] < side:
                h = self.up[0](F.interpolate(h, scale_factor=2.0))
            h, kl = group(h, None if seen is None else seen[side], part.reshape(-1, self.latents, side, side))
            kls.append(kl)
        return self.write(F.silu(self.up[1](F.interpolate(h, scale_factor=2.0)))), kls

    @torch.no_grad()
    def sample(self, noise: Tensor, generator: torch.Generator) -> Tensor:
        """`[B, S, S]` int64: images drawn from the model, by the noise `[B, num_noise]` of their latents."""
        logits, _ = self.decode(noise, None)
        chances = logits.softmax(1).permute(0, 2, 3, 1).reshape(-1, LEVELS)
        return torch.multinomial(chances, 1, generator=generator).view(-1, self.side, self.side)
