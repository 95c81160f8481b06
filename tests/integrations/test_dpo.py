"""DPOTrainer with each kind of reference, and its evaluation; on ranks it is in tests/gallery/dpo.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from mtl_dist import Balancer
from mtl_dist.integrations.transformers import balance_by_column
from mtl_dist.weighting import TokenShare
from tests.gallery.causal_lm import DOMAINS, config
from tests.gallery.run import flat


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL 1.16 uses names that transformers 5.23 renames
@pytest.mark.parametrize("settings", [{}, {"precompute_ref_log_probs": True}], ids=repr)
def test_shares_give_the_plain_training_with_each_reference(tmp_path: Path, settings: dict[str, Any]) -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip('trl is not installed: pip install "mtl-dist[clients]"')
    from trl import DPOConfig, DPOTrainer

    from tests.gallery.dpo import pairs
    from tests.gallery.sft_lora import tokenizer, trl_settings

    torch.manual_seed(1)
    reference = LlamaForCausalLM(config())
    found = []
    for balanced in (False, True):
        torch.manual_seed(0)
        args = DPOConfig(str(tmp_path), bf16=False, **settings, **trl_settings(tmp_path, 3))
        trainer = DPOTrainer(
            LlamaForCausalLM(config()),
            ref_model=reference,
            args=args,
            train_dataset=pairs(),
            eval_dataset=pairs(8),
            processing_class=tokenizer(),
        )
        if balanced:
            balance_by_column(trainer, Balancer(DOMAINS, TokenShare()), column="domain")
        trainer.train()
        found.append((flat(trainer.model), trainer.evaluate()))
    (plain, before), (own, after) = found
    assert float((plain - own).abs().max() / plain.abs().max()) <= 1e-6
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    counts = [sum(row["domain"] == name for row in pairs(8)) for name in DOMAINS]
    losses = [after.get(f"eval_loss/{name}", 0.0) for name in DOMAINS]  # a domain may be absent
    mean = sum(count * loss for count, loss in zip(counts, losses, strict=True)) / 8
    assert mean == pytest.approx(after["eval_loss"], rel=1e-5)
