"""`balance_by_column` with an encoder and a decoder, whose labels are not shifted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)

from mtl_dist import Balancer, FeatureProbe, SharedLayerProbe
from mtl_dist.integrations._columns import TASK_IDS
from mtl_dist.integrations._row_losses import RowLosses
from mtl_dist.integrations.transformers import balance_by_column
from mtl_dist.weighting import TokenShare
from tests.gallery.causal_lm import DOMAINS, arguments
from tests.gallery.run import flat
from tests.gallery.seq2seq import collated, pairs, t5
from tests.integrations.test_by_column import llama, off

M2M = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}
M2M |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16}
M2M |= {"decoder_ffn_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2}
M2M |= {"eos_token_id": 1, "decoder_start_token_id": 1, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}


def m2m() -> nn.Module:
    """Only its forward makes the decoder's inputs from labels."""
    torch.manual_seed(0)
    return M2M100ForConditionalGeneration(M2M100Config(**M2M))


def train(
    model: nn.Module, folder: Path, balancer: Balancer | None, steps: int = 3, **others: Any
) -> Trainer:
    args = arguments(folder, steps, save_strategy="no", **{"gradient_accumulation_steps": 1, **others})
    trainer = Trainer(model, args, train_dataset=pairs(), eval_dataset=pairs(9), data_collator=collated)
    if balancer is not None:
        balance_by_column(trainer, balancer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("make", [t5, m2m])
def test_token_share_is_the_plain_training(make: Any, tmp_path: Path) -> None:
    plain = make()
    before = train(plain, tmp_path, None).evaluate()
    for probe in (None, FeatureProbe(), SharedLayerProbe()):
        own = make()
        after = train(own, tmp_path, Balancer(DOMAINS, TokenShare(), probe=probe)).evaluate()
        assert off(flat(plain), flat(own)) <= 1e-6
        assert after["eval_loss"] == before["eval_loss"]
        assert {f"eval_loss/{name}" for name in DOMAINS} <= after.keys()
    assert off(flat(make()), flat(plain)) > 1e-2


def test_losses_are_means_over_the_labels_of_a_whole_step(tmp_path: Path) -> None:
    """T5 itself takes the mean of each micro-batch, so its own training is another one."""
    found = []
    for size, number in ((4, 1), (1, 4)):
        model = t5()
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": number}
        train(model, tmp_path, Balancer(DOMAINS, TokenShare()), **settings)
        found.append(flat(model))
    assert off(*found) <= 1e-6


def test_an_evaluation_generates_as_before(tmp_path: Path) -> None:
    found = []
    for balanced in (False, True):
        model = t5()
        args = Seq2SeqTrainingArguments(
            str(tmp_path), use_cpu=True, max_steps=1, save_strategy="no", report_to="none",
            predict_with_generate=True, generation_max_length=5, disable_tqdm=True,
        )  # fmt: skip
        trainer = Seq2SeqTrainer(
            model, args, train_dataset=pairs(), eval_dataset=pairs(9), data_collator=collated
        )
        if balanced:
            balance_by_column(trainer, Balancer(DOMAINS, TokenShare()))
        trainer.train()
        found.append(trainer.predict(pairs(9)))
    assert (found[0].predictions == found[1].predictions).all()
    assert found[1].metrics["test_loss"] == found[0].metrics["test_loss"]
    assert {f"test_loss/{name}" for name in DOMAINS} <= found[1].metrics.keys()


def test_rows_that_are_packed_are_refused() -> None:
    batch = {"labels": torch.ones(1, 6, dtype=torch.int64), TASK_IDS: torch.zeros(1, 5, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"one task for each row, and the batch has one for each of 5 input"):
        RowLosses.of(t5()).targets(batch)


def test_logits_of_another_shape_are_refused() -> None:
    """As of MusicGen, which has several codebooks."""
    rows, labels = RowLosses.of(t5()), torch.ones(2, 3, 4, dtype=torch.int64)
    targets = rows.targets({"labels": labels, TASK_IDS: torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"logits of shape \[8, 3, 40\] for labels of shape \[2, 3, 4\]"):
        rows.losses(torch.zeros(8, 3, 40), targets)


def test_a_model_of_images_that_generates_text_is_refused() -> None:
    """Its labels are shifted, and only its name says that it has a decoder."""
    kind = type("LlavaForConditionalGeneration", (type(llama()).__mro__[1],), {})
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.config = llama().config
    with pytest.raises(
        TypeError, match=r"encoders with a decoder \.\.\.ForConditionalGeneration, .*got Llava"
    ):
        RowLosses.of(model)
