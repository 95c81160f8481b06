"""Ladder side-tuning on a transformer, beside full fine-tuning, LoRA and linear probing.

A small language model is pretrained on one kind of text. Then it learns four kinds. As in Sung, Cho and
Bansal, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", NeurIPS 2022, no
gradient passes through the frozen trunk when a side network is trained: its layers store nothing for the
backward. LoRA (Hu et al. 2021) trains few parameters too, but its gradients pass through the whole trunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_dist.recipes._domains import streams
from mtl_dist.recipes.text_mixture import TextMixture, TextMixtureNet

Tune = Literal["side", "full", "lora", "linear"]
_BATCH, _RATE = 32, 3e-3  # of the pretraining
_INSTALL = 'pip install "mtl-dist[transformers,recipes]"'


class SideBlock(nn.Module):
    """A causal transformer layer of the side network.

    Args:
        width: size of its hidden states.
        attention_heads: number of its attention heads.
    """

    def __init__(self, width: int, attention_heads: int) -> None:
        super().__init__()
        self.attention_heads = attention_heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        """`[B, T, width]`, unchanged in shape."""
        parts = self.qkv(self.norms[0](h)).unflatten(2, (3 * self.attention_heads, -1)).transpose(1, 2)
        q, k, v = parts.chunk(3, 1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = h + self.out(attended)
        out: Tensor = h + self.mlp(self.norms[1](h))
        return out


class LadderTransformer(nn.Module):
    """A frozen transformer with a side network. It replaces the transformer.

    Args:
        trunk: a model of `transformers` that returns all hidden states.
        layers: number of its layers.
        width: size of its hidden states.
        side_width: size of the hidden states of the side network.
    """

    def __init__(self, trunk: nn.Module, layers: int, width: int, side_width: int) -> None:
        super().__init__()
        self.frozen = trunk.requires_grad_(False)
        self.rungs = nn.ModuleList(nn.Linear(width, side_width) for _ in range(layers))
        self.gates = nn.Parameter(torch.zeros(layers - 1))
        self.blocks = nn.ModuleList(SideBlock(side_width, 2) for _ in range(layers))
        self.up = nn.Linear(side_width, width)
        nn.init.zeros_(self.up.weight)  # training starts at the pretrained model
        nn.init.zeros_(self.up.bias)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """As the transformer: its last hidden states and the side network's, added."""
        with torch.no_grad():
            out = self.frozen(input_ids=input_ids, use_cache=use_cache, output_hidden_states=True)
        side: Tensor | None = None
        for k, (rung, block) in enumerate(zip(self.rungs, self.blocks, strict=True)):
            entry = rung(out.hidden_states[k + 1])
            # s_k = f_k(μ_k rung_k(h_k) + (1 - μ_k) s_{k-1})
            side = block(entry if side is None else torch.lerp(side, entry, self.gates[k - 1].sigmoid()))
        assert side is not None
        return SimpleNamespace(last_hidden_state=out.last_hidden_state + self.up(side))


@dataclass(frozen=True)
class SideTuningText(TextMixture):
    """Text mixture on a transformer that was pretrained on English prose only.

    Attributes:
        tune: what is trained besides the output head. "side": a side network beside the frozen transformer.
            "full": the transformer. "lora": adapters of rank `rank` at all its linear layers (peft).
            "linear": nothing.
        side_width: size of the hidden states of the side network.
        rank: rank of LoRA.
        pretrain_steps: optimizer steps of the pretraining, on batches of 32 sequences. 0: random parameters.
    """

    layers: int = 4
    tune: Tune = "side"
    side_width: int = 16
    rank: int = 4
    pretrain_steps: int = 300

    packages: ClassVar = {"transformers": _INSTALL, "sklearn": _INSTALL}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tune not in get_args(Tune):
            choices = ", ".join(get_args(Tune))
            raise ValueError(f"SideTuningText: tune must be one of {choices}, got {self.tune!r}")
        for name, least in (("side_width", 2), ("rank", 1), ("pretrain_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"SideTuningText: {name} must be at least {least}, got {getattr(self, name)}"
                )
        if self.side_width % 2:
            raise ValueError(f"SideTuningText: side_width must be even, got {self.side_width}")

    def model(self, balancer: nn.Module) -> nn.Module:
        """The pretrained network, with what `tune` says.

        Raises:
            ImportError: transformers is not installed, or peft with "lora".
        """
        net = TextMixtureNet(balancer, self.trunk(), self.width)
        self._pretrain(net)
        if self.tune == "side":
            net.trunk = LadderTransformer(net.trunk, self.layers, self.width, self.side_width)
        elif self.tune == "lora":
            net.trunk = self._with_adapters(net.trunk)
        elif self.tune == "linear":
            net.trunk.requires_grad_(False)
        return net

    def _pretrain(self, net: TextMixtureNet) -> None:
        """Trains `net` in place to predict the next byte of English prose. Takes seconds on a CPU."""
        if self.pretrain_steps == 0:
            return
        text = streams("prose")[0]
        seed = int(torch.randint(2**31, ()))  # from the global generator, like the parameters
        draw = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(net.parameters(), lr=_RATE)
        for _ in range(self.pretrain_steps):
            starts = torch.randint(len(text) - self.length - 1, (_BATCH, 1), generator=draw)
            tokens = text[starts + torch.arange(self.length + 1)].long()
            hidden = net.trunk(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
            loss = F.cross_entropy(net.head(hidden).transpose(1, 2), tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch 2.13 leaves it unannotated
            optimizer.step()
        net.zero_grad()

    def _with_adapters(self, trunk: nn.Module) -> nn.Module:
        try:
            from peft import (  # an optional dependency, for this choice only
                LoraConfig,
                inject_adapter_in_model,
            )
        except ImportError as error:
            raise ImportError('SideTuningText: tune="lora" needs peft: pip install peft') from error
        config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules="all-linear")
        adapted: nn.Module = inject_adapter_in_model(config, trunk)
        return adapted


__all__ = ["LadderTransformer", "SideTuningText"]
