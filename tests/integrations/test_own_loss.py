"""`balance_by_column` and `balance_loss_dict` train the model's own losses, or say why they cannot."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Dataset as Rows
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForTokenClassification,
    Trainer,
    default_data_collator,
)
from transformers.loss import loss_for_object_detection

from mtl_dist import Balancer
from mtl_dist.integrations import accelerate, deepspeed, lightning, loss_dict, transformers
from mtl_dist.integrations._own_loss import check_own_loss
from mtl_dist.integrations._row_losses import RowLosses
from mtl_dist.integrations.loss_dict import _all_ranks, _reducing, _this_rank
from mtl_dist.integrations.transformers import balance_by_column, balance_loss_dict, detach
from mtl_dist.weighting import Equal, TokenShare
from tests.gallery.causal_lm import DOMAINS, arguments, config, padded, table
from tests.gallery.seq2seq import T5, t5
from tests.integrations.by_column_router import mixtral
from tests.integrations.test_by_column import BERT, llama

BART = {"vocab_size": 40, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2}
BART |= {"decoder_ffn_dim": 16, "max_position_embeddings": 64, "is_decoder": True}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}


class Weighted(BertForSequenceClassification):
    """Class weights, as for classes that are not balanced."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **others: Any) -> Any:
        outputs = super().forward(input_ids, **others)
        if labels is not None:
            outputs["loss"] = F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 9.0]))
        return outputs


class Regularised(LlamaForCausalLM):
    """A term that acts in training only."""

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None, **others: Any
    ) -> Any:
        outputs = super().forward(input_ids, attention_mask=attention_mask, labels=labels, **others)
        if labels is not None and self.training:
            outputs["loss"] = outputs.loss + outputs.logits.square().mean()
        return outputs


class Scaled(LlamaForCausalLM):
    """Logits that are more than the output head, which `chunk=` would not see."""

    def forward(self, *args: Any, labels: Any = None, **others: Any) -> Any:
        outputs = super().forward(*args, **others)
        outputs["logits"] = 3 * outputs.logits
        if labels is not None:
            outputs["loss"] = self.loss_function(outputs.logits, labels, self.config.vocab_size)
        return outputs


def with_own_function() -> nn.Module:
    model = llama()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    return model


OTHERS = {
    "labels are not shifted": (lambda: BartForCausalLM(BartConfig(**BART)), {}),
    "class weights": (lambda: Weighted(BertConfig(**BERT)), {}),
    "a term in training": (lambda: Regularised(config()), {}),
    "a loss_function of one's own": (with_own_function, {}),
    "scaled logits, in chunks": (lambda: Scaled(config()), {"chunked": True}),
}
KNOWN = {
    "llama": llama,
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),  # with its own special tokens, out of range here
    "mixtral, with a router": mixtral,
    "scaled logits": lambda: Scaled(config()),
    "masked": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "token classes": lambda: BertForTokenClassification(BertConfig(**BERT, num_labels=3)),
    "classes": lambda: BertForSequenceClassification(BertConfig(**BERT, num_labels=3)),
    "regression": lambda: BertForSequenceClassification(BertConfig(**BERT, num_labels=1)),
    "several classes": lambda: BertForSequenceClassification(
        BertConfig(**BERT, num_labels=3, problem_type="multi_label_classification")
    ),
    "half precision": lambda: llama().to(torch.bfloat16),
    "encoder and decoder": t5,
    "a configuration without a first token": lambda: T5ForTokenClassification(T5Config(**T5, num_labels=3)),
}


@pytest.mark.parametrize("which", OTHERS)
def test_another_loss_is_refused(which: str) -> None:
    make, settings = OTHERS[which]
    torch.manual_seed(0)
    model = make()
    with pytest.raises(ValueError, match=r"would train the mean of the losses of all .* is another one"):
        check_own_loss(model, RowLosses.of(model), **settings)


@pytest.mark.parametrize("which", KNOWN)
def test_known_losses_are_compared_and_nothing_changes(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, compared = KNOWN[which]().eval(), []
    model.base_model.train()
    own = RowLosses.losses
    monkeypatch.setattr(RowLosses, "losses", lambda *args: compared.append(1) or own(*args))
    before = (torch.get_rng_state(), [module.training for module in model.modules()], model.config.to_dict())
    check_own_loss(model, RowLosses.of(model))
    assert compared
    after = (torch.get_rng_state(), [module.training for module in model.modules()], model.config.to_dict())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert all(p.grad is None for p in model.parameters())


class WithBoxes(BertForTokenClassification):
    """It needs more than tokens, as models of documents do."""

    def forward(self, input_ids: Tensor, labels: Any = None, boxes: Any = None, **others: Any) -> Any:
        if boxes is None:
            raise ValueError("You have to specify boxes.\nThe second line is left out.")
        return super().forward(input_ids, labels=labels, **others)


def infinite() -> nn.Module:
    model = llama()
    model.lm_head.weight.data.fill_(float("inf"))
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: WithBoxes(BertConfig(**BERT)),
            "WithBoxes.*: ValueError: You have to specify boxes. Compare",
        ),
        (lambda: llama().to("meta"), "LlamaForCausalLM.*: this rank does not hold its weights. Compare them"),
        (infinite, "LlamaForCausalLM on a small batch: the model's own is NaN there. Compare them yourself"),
    ],
)
def test_a_loss_that_cannot_be_compared_is_told(
    make: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    with caplog.at_level(logging.WARNING, "mtl_dist"):
        check_own_loss(model, RowLosses.of(model), says=False)
        assert not caplog.messages
        check_own_loss(model, RowLosses.of(model))
    (message,) = caplog.messages
    assert re.search(reason, message), message


def trainer_of(model: nn.Module, folder: Path, data: Any = None, **others: Any) -> Trainer:
    settings = {"save_strategy": "no", "gradient_accumulation_steps": 1, **others}
    args = arguments(folder, 4, **settings)
    return Trainer(model, args, train_dataset=table() if data is None else data, data_collator=padded)


class SomeWithout(Rows):
    """The first rows have a column that later rows lack."""

    def __init__(self) -> None:
        self._rows = table().to_list()

    def __len__(self) -> int:
        return 16

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = dict(self._rows[number])
        if number >= 8:
            row.pop("domain")
        return row


def test_training_batches_without_the_column_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(llama(), tmp_path, SomeWithout(), train_sampling_strategy="sequential")
    balancer = Balancer(DOMAINS, TokenShare())
    balance_by_column(trainer, balancer)
    with pytest.raises(ValueError, match="1 training batches of this step have no column 'domain'"):
        trainer.train()
    assert balancer.step == 2


@pytest.mark.parametrize("chunk", [0, 1.5, "4", True])
def test_chunks_are_numbers_of_tokens(tmp_path: Path, chunk: Any) -> None:
    with pytest.raises(ValueError, match=r"chunk= is a number of tokens >= 1, or None, got"):
        balance_by_column(trainer_of(llama(), tmp_path), Balancer(DOMAINS, TokenShare()), chunk=chunk)


def test_one_balancer_at_a_time(tmp_path: Path) -> None:
    trainer, first = trainer_of(llama(), tmp_path), Balancer(DOMAINS, TokenShare())
    balance_by_column(trainer, first)
    second = Balancer(DOMAINS, TokenShare())
    with pytest.raises(ValueError, match=r"balanced by 'balancer' already, and a second balancer"):
        balance_by_column(trainer, second, name="second")
    detach(first, trainer)
    balance_by_column(trainer, second, name="second")
    trainer.train()
    assert (first.step, second.step) == (0, 4)


class Detector(PreTrainedModel):
    """Two losses in a dictionary beside their sum."""

    config_class = BertConfig

    def __init__(self, detached: bool = False) -> None:
        super().__init__(BertConfig())
        self.trunk, self.detached = nn.Linear(2, 4), detached
        self.post_init()
        self.loss_function = self._losses

    def _losses(self, z: Tensor, labels: Tensor) -> Any:
        losses = {"a": z.square().mean(), "b": (z.sum(1) - labels).square().mean()}
        shown = {task: loss.detach() for task, loss in losses.items()} if self.detached else losses
        return sum(losses.values()), shown

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss_function(self.trunk(x), labels)[0]}


def detecting(folder: Path, model: nn.Module) -> Trainer:
    rows = Dataset.from_list([{"x": [1.0, float(i % 3)], "labels": float(i % 2)} for i in range(16)])
    args = arguments(folder, 2, save_strategy="no", gradient_accumulation_steps=1)
    return Trainer(model, args, train_dataset=rows, data_collator=default_data_collator)


@pytest.mark.parametrize(
    ("counts", "message"),
    [({"a": 1}, "counts= is a function of what"), (lambda *_, **__: [1, 1], "counts= must return a number")],
)
def test_counts_of_a_loss_dictionary(tmp_path: Path, counts: Any, message: str) -> None:
    trainer = detecting(tmp_path, Detector())
    with pytest.raises(TypeError, match=message):  # noqa: PT012 - at the call, or at the first batch
        balance_loss_dict(trainer, Balancer(["a", "b"], Equal()), counts=counts)
        trainer.train()


def test_a_dictionary_of_detached_losses_is_refused(tmp_path: Path) -> None:
    trainer = detecting(tmp_path, Detector(detached=True))
    balancer = Balancer(["a", "b"], Equal())
    balance_loss_dict(trainer, balancer)
    with pytest.raises(ValueError, match="Detector returns in its dictionary were detached"):
        trainer.train()


def test_one_balancer_for_a_dictionary(tmp_path: Path) -> None:
    trainer, first = detecting(tmp_path, Detector()), Balancer(["a", "b"], Equal())
    balance_loss_dict(trainer, first)
    with pytest.raises(ValueError, match="balanced by 'balancer' already"):
        balance_loss_dict(trainer, Balancer(["a", "b"], Equal()), name="second")
    trainer.train()
    assert first.step == 2


@pytest.mark.parametrize(("boxes_of", "divisors"), [(_this_rank, (3.0, 1.0)), (_all_ranks, (2.0, 2.0))])
def test_the_boxes_that_losses_are_divided_by(
    boxes_of: Any, divisors: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks with 3 boxes and 1, and `ImageLoss.forward` of transformers, which divides the sum by W."""

    def reduce(boxes: Tensor, reduction: str = "mean") -> Tensor:
        return torch.tensor([4.0 if reduction == "sum" else 2.0])

    monkeypatch.setattr(loss_for_object_detection, "reduce", reduce)
    monkeypatch.setattr(loss_dict, "PartialState", lambda: SimpleNamespace(num_processes=2))
    for boxes, divisor in zip((3.0, 1.0), divisors, strict=True):
        found = _reducing(boxes_of, lambda n: loss_for_object_detection.reduce(n) / 2, torch.tensor([boxes]))
        assert found.item() == divisor
    assert loss_for_object_detection.reduce is reduce


@pytest.mark.parametrize(
    "connect", [accelerate.attach, lightning.attach, deepspeed.attach, transformers.attach]
)
def test_a_model_in_the_place_of_its_balancer(connect: Any) -> None:
    with pytest.raises(TypeError, match=r"got Linear in the place of the balancer: give the Balancer"):
        connect(nn.Linear(1, 1), object())


def test_other_things_in_the_place_of_a_balancer(tmp_path: Path) -> None:
    trainer = trainer_of(llama(), tmp_path)
    for balance in (balance_by_column, balance_loss_dict):
        with pytest.raises(TypeError, match="got LlamaForCausalLM in the place of the balancer"):
            balance(trainer, trainer.model)
    with pytest.raises(ValueError, match="a balancer's name has letters, digits, _ and -, got 3"):
        transformers.attach(Balancer(DOMAINS, Equal()), trainer, name=3)
