"""What one process of a client must show; test_gallery.py and benchmarks/gpu/clients.py ask it."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

EXACT = 1e-6
HF, TRL = ("datasets", "transformers"), ("datasets", "transformers", "trl", "peft")
# clients, the slow ones first, and the packages without which they cannot run
PACKAGES: dict[str, tuple[str, ...]] = {
    "yolo": ("ultralytics", "torchvision"),
    "faster_rcnn": ("torchvision",),
    "dpo": TRL,
    "sft_lora": TRL,
    "sft_padding_free": TRL,
    "sentences": (*HF, "sentence_transformers"),
    "detr": (*HF, "scipy"),
    "rt_detr": (*HF, "scipy"),
    "seq2seq": HF,
    "causal_lm": HF,
    "multi_token": HF,
    "lightning_net": ("lightning",),
    "fabric": ("lightning",),
    "vqgan": (),
    "diffusion": (),
    "graphs": (),
    "pinn": (),
    "mmoe": (),
}


def missing(client: str) -> list[str]:
    """Its packages that are not installed."""
    return [package for package in PACKAGES[client] if importlib.util.find_spec(package) is None]


def off(expected: Tensor, got: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((expected - got).abs().max() / expected.abs().max())


def trains_as_alone(facts: dict[str, Any]) -> float:
    """`PLAIN` gives the client's own numbers, and `RULE` others; how far off the parameters are."""
    plain, own, rule = (facts[way] for way in ("plain", "own", "rule"))
    error = off(plain["parameters"], own["parameters"])
    assert error <= EXACT, f"not the client's numbers: parameters differ by {error:.1e}"
    for step, (expected, got) in enumerate(zip(plain["losses"], own["losses"], strict=True)):
        same = math.isclose(expected, got, rel_tol=EXACT, abs_tol=1e-12)
        assert same, f"not the client's numbers: loss {step} is {got}, not {expected}"
    change = off(own["parameters"], rule["parameters"])
    assert change > 1e-4, f"the rule changes nothing: parameters differ by {change:.1e}"
    return error


def resumes(facts: dict[str, Any]) -> str:
    """A resumed run is the same: bit for bit, unless torch has said which operation gives other bits."""
    whole, resumed = (facts[way]["parameters"] for way in ("rule", "resumed"))
    if torch.equal(whole, resumed):
        return "bit for bit"
    error, reason = off(whole, resumed), "; ".join(facts["other bits"])
    assert reason, f"resume is not bitwise: parameters differ by {error:.1e}"
    assert error <= EXACT, f"resume: parameters differ by {error:.1e}, and torch says: {reason}"
    return f"within {error:.0e}; torch says: {reason}"
