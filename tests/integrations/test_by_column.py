"""`balance_by_column`: what it measures at the output head, which batches it reads, and what it refuses.

The trainings under one and two ranks are in tests/gallery.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import warm
from datasets import Dataset
from program import ROOT
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorWithFlattening,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
)

from mtl_dist import Balancer, FeatureProbe, FeatureTap, ParameterProbe, Rule, SharedLayerProbe
from mtl_dist.integrations._columns import TASK_IDS, ColumnCollator
from mtl_dist.integrations._fused_head import repacked
from mtl_dist.integrations.transformers import balance_by_column
from mtl_dist.weighting import MGDA, Fixed, InverseGradNorm, TokenShare
from tests.gallery.causal_lm import DOMAINS, arguments, config, padded, table
from tests.gallery.run import flat
from tests.integrations.by_column_router import COEFFICIENT, mixtral

BERT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 24, "max_position_embeddings": 16}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def off(expected: Tensor, got: Tensor) -> float:
    return float((expected - got).abs().max() / expected.abs().max())


def train(
    model: nn.Module,
    folder: Path,
    balancer: Balancer | None = None,
    *,
    data: Dataset | None = None,
    collator: Any = padded,
    steps: int = 4,
    callbacks: tuple[TrainerCallback, ...] = (),
    **others: Any,
) -> Trainer:
    data = table() if data is None else data
    args = arguments(folder, steps, save_strategy="no", **others)
    trainer = Trainer(
        model, args, train_dataset=data, eval_dataset=data, data_collator=collator, callbacks=list(callbacks)
    )
    if balancer is not None:
        balance_by_column(trainer, balancer, column="domain")
    trainer.train()
    return trainer


def llama(**others: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config(**others))


class Adapted(nn.Module):
    """A frozen linear layer and a low-rank adapter beside it, as PEFT makes it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.a, self.b = nn.Linear(base_layer.in_features, 2), nn.Linear(2, base_layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.b(self.a(x))


def first_gram(model: nn.Module, folder: Path, probe: Any) -> Tensor:
    balancer = Balancer(DOMAINS, MGDA(), probe=probe)
    train(model, folder, balancer, steps=1, gradient_accumulation_steps=1)
    return balancer.report.stats.gram


def test_the_gram_at_the_output_head_is_that_of_its_weight(tmp_path: Path) -> None:
    measured = first_gram(llama(), tmp_path, SharedLayerProbe())
    model = llama()
    probe = ParameterProbe(parameters=lambda: [model.lm_head.weight])
    torch.testing.assert_close(measured, first_gram(model, tmp_path, probe), rtol=1e-5, atol=0)


def test_tied_embeddings_count_with_the_use_in_the_head(tmp_path: Path) -> None:
    tied, own = llama(tie_word_embeddings=True), llama()
    own.model.load_state_dict(tied.model.state_dict())
    own.lm_head.weight.data.copy_(tied.lm_head.weight.data)
    grams = [first_gram(model, tmp_path, SharedLayerProbe()) for model in (tied, own)]
    torch.testing.assert_close(*grams, rtol=1e-6, atol=0)


def test_a_head_with_an_adapter_is_measured_at_its_base_layer(tmp_path: Path) -> None:
    plain, adapted = llama(), llama()
    adapted.lm_head = Adapted(adapted.lm_head)
    # the sum of both is another linear layer: the gradient of the base weight is that of the sum
    summed = plain.lm_head.weight.data + adapted.lm_head.b.weight.data @ adapted.lm_head.a.weight.data
    bias = adapted.lm_head.b.weight.data @ adapted.lm_head.a.bias.data + adapted.lm_head.b.bias.data
    plain.lm_head = nn.Linear(16, 40)
    plain.lm_head.weight.data.copy_(summed)
    plain.lm_head.bias.data.copy_(bias)
    grams = [first_gram(model, tmp_path, SharedLayerProbe()) for model in (adapted, plain)]
    torch.testing.assert_close(*grams, rtol=1e-4, atol=0)


@pytest.mark.parametrize("probe", [None, FeatureProbe()], ids=repr)
@pytest.mark.parametrize("collator", [padded, DataCollatorWithFlattening()], ids=["padded", "padding-free"])
def test_token_share_is_the_plain_training(tmp_path: Path, collator: Any, probe: Any) -> None:
    """With accumulation over micro-batches of different token counts, and a short last step."""
    data = table(37)  # 10 micro-batches of 4 and fewer
    plain, own = llama(), llama()
    settings = {"data": data, "collator": collator, "steps": 7, "gradient_accumulation_steps": 3}
    first = train(plain, tmp_path, None, **settings)
    second = train(own, tmp_path, Balancer(DOMAINS, TokenShare(), probe=probe), **settings)
    assert off(flat(llama()), flat(plain)) > 1e-2
    assert off(flat(plain), flat(own)) <= 1e-6
    before, after = first.evaluate(), second.evaluate()
    assert after["eval_loss"] == before["eval_loss"]
    counts = token_counts(data)
    mean = sum(after[f"eval_loss/{name}"] * counts[name] for name in DOMAINS) / sum(counts.values())
    assert mean == pytest.approx(mean_loss(own, data), rel=1e-5)


def token_counts(data: Dataset) -> dict[str, int]:
    return {
        name: sum(label != -100 for row in data if row["domain"] == name for label in row["labels"][1:])
        for name in DOMAINS
    }


def mean_loss(model: Any, data: Dataset) -> float:
    """Over all tokens of the data."""
    batch = padded([{key: row[key] for key in ("input_ids", "labels")} for row in data])
    with torch.no_grad():
        return model.eval()(**batch).loss.item()


def classified(collated: bool) -> Dataset:
    """Rows for token or sequence classification."""
    rows = []
    for number, row in enumerate(table(64)):
        ids = (row["input_ids"] * 3)[:8]
        labels = [-100 if k == 0 else t % 5 for k, t in enumerate(ids)] if collated else sum(ids) % 3
        rows.append({"input_ids": ids, "labels": labels, "domain": number % 3})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("kind", ["tokens", "rows", "regression", "several"])
def test_classification_with_shares_is_the_plain_training(tmp_path: Path, kind: str) -> None:
    data = classified(kind == "tokens")
    if kind == "regression":
        data = data.map(lambda row: {"labels": row["labels"] / 3})
    if kind == "several":
        data = data.map(lambda row: {"labels": [float(row["labels"] == k) for k in range(3)]})
    make = BertForTokenClassification if kind == "tokens" else BertForSequenceClassification
    labels = {"tokens": 5, "rows": 3, "regression": 1, "several": 3}[kind]
    results = []
    for rule in (None, TokenShare()):
        torch.manual_seed(0)
        model = make(BertConfig(**BERT, num_labels=labels))
        balancer = None if rule is None else Balancer(DOMAINS, rule)
        # one micro-batch per step: the plain training takes the mean of each
        trainer = train(
            model,
            tmp_path,
            balancer,
            data=data,
            collator=None,
            gradient_accumulation_steps=1,
            learning_rate=0.1,
        )
        results.append((flat(model), trainer.evaluate()))
    assert off(results[0][0], results[1][0]) <= 1e-6
    assert results[1][1]["eval_loss"] == results[0][1]["eval_loss"]
    assert {f"eval_loss/{name}" for name in DOMAINS} <= results[1][1].keys()


def test_gradient_rules_train_a_classifier_at_its_head(tmp_path: Path) -> None:
    model = BertForSequenceClassification(BertConfig(**BERT, num_labels=3))
    balancer = Balancer(DOMAINS, MGDA(), probe=SharedLayerProbe())
    train(model, tmp_path, balancer, data=classified(False), collator=None)
    assert min(balancer.report.grad_norms.values()) > 0
    assert balancer.report.cosines.fill_diagonal_(0).nan_to_num().abs().max() > 0, "tasks meet in the weight"


def test_the_loss_of_a_router_is_the_mean_over_micro_batches(tmp_path: Path) -> None:
    """The model's own loss adds it to each micro-batch, so Trainer sums it over an accumulation step."""
    own = mixtral()
    train(own, tmp_path, Balancer(DOMAINS, TokenShare()), steps=1, gradient_accumulation_steps=2)
    by_hand = mixtral()
    batches: list[dict[str, Tensor]] = []
    seen = Recorder(batches)
    trainer = Trainer(mixtral(), arguments(tmp_path, 1), train_dataset=table(), data_collator=seen)
    trainer.train()
    number = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    for batch in batches:
        labels = batch.pop("labels")
        outputs = by_hand(**batch)
        losses = nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        (losses / number + COEFFICIENT * outputs.aux_loss / len(batches)).backward()
    with torch.no_grad():
        for parameter in by_hand.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    assert off(flat(by_hand), flat(own)) <= 1e-6
    assert off(flat(by_hand), flat(trainer.model)) > 1e-5, "the plain training is right after all"


def test_the_loss_of_a_router_is_the_mean_over_ranks(tmp_path: Path) -> None:
    """Trainer multiplies the model's loss by the number of ranks, and the router's loss with it."""
    script, out = Path(__file__).parent / "by_column_router.py", tmp_path / "router"
    environment = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = warm.launch(script, 2, out, env=environment, modules=warm.TRAINER)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(2)]
    number = sum(int((rank["batch"]["labels"][:, 1:] != -100).sum()) for rank in ranks)

    def after_a_step(factor: float) -> Tensor:
        model = mixtral()
        for rank in ranks:
            batch = dict(rank["batch"])
            labels = batch.pop("labels")[:, 1:].flatten()
            outputs = model(**batch)
            losses = nn.functional.cross_entropy(
                outputs.logits[:, :-1].flatten(0, 1), labels, reduction="sum"
            )
            (losses / number + factor * COEFFICIENT * outputs.aux_loss / 2).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
        return flat(model)

    for rank in ranks:
        assert off(after_a_step(1.0), rank["own"]) <= 1e-6
        assert off(after_a_step(2.0), rank["plain"]) <= 1e-6, "Trainer is not off by the number of ranks"


class Recorder:
    """A collator that keeps the batches of one optimizer step."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = padded(rows)
        if len(self.batches) < 2:
            self.batches.append(dict(batch))
        return batch


@pytest.mark.parametrize("value", [1, "prose", np.int64(1), torch.tensor(1)], ids=repr)
def test_tasks_are_names_or_indices(value: Any) -> None:
    rows = [{"input_ids": [1, 2], "labels": [1, 2], "domain": value}]
    assert ColumnCollator(padded, "domain", DOMAINS)(rows)[TASK_IDS].tolist() == [1]


@pytest.mark.parametrize("value", ["poems", 3, -1, True, 1.0, None], ids=repr)
def test_what_is_no_task_is_refused(value: Any) -> None:
    rows = [{"input_ids": [1, 2], "labels": [1, 2], "domain": value}]
    with pytest.raises(ValueError, match=r"has domain=.*one of the balancer's tasks \['code'"):
        ColumnCollator(padded, "domain", DOMAINS)(rows)


def test_rows_without_the_column_are_refused_unless_no_row_has_it() -> None:
    collator = ColumnCollator(padded, "domain", DOMAINS)
    rows = [{"input_ids": [1, 2], "labels": [1, 2], "domain": 0}, {"input_ids": [1], "labels": [1]}]
    with pytest.raises(ValueError, match="1 of 2 rows of a batch have no column 'domain'"):
        collator(rows)
    assert TASK_IDS not in collator([rows[1]])


def test_every_token_has_its_task_in_each_layout() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "domain": 2},
        {"input_ids": [4, 5], "labels": [4, 5], "domain": 0},
    ]
    flattened = ColumnCollator(DataCollatorWithFlattening(), "domain", DOMAINS)(rows)
    assert flattened[TASK_IDS].tolist() == [[2, 2, 2, 0, 0]]
    packed = [{**rows[0], "domain": [2, 2, 1]}, {**rows[1], "domain": [0, 1]}]
    assert ColumnCollator(padded, "domain", DOMAINS)(packed)[TASK_IDS].tolist() == [[2, 2, 1], [0, 1, 0]]
    assert ColumnCollator(left, "domain", DOMAINS)(packed)[TASK_IDS].tolist() == [[2, 2, 1], [0, 0, 1]]
    with pytest.raises(ValueError, match="the rows of a batch have 5 tokens, and the collator gave 4"):
        ColumnCollator(lambda rows: cut(padded(rows)), "domain", DOMAINS)(packed)


def left(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: value.flip(1) for key, value in padded(rows).items()}


def cut(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value[:, :2] for key, value in batch.items()}


def made(model: Any = None, *, data: Any = None, folder: Path, **others: Any) -> Trainer:
    args = arguments(folder, 1, **others)
    return Trainer(llama() if model is None else model, args, train_dataset=data, data_collator=padded)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    balancer = Balancer(DOMAINS, TokenShare())
    with pytest.raises(ValueError, match=r"has columns \['input_ids', 'labels', 'domain'\], and no 'topic'"):
        balance_by_column(made(data=table(), folder=tmp_path), balancer, column="topic")
    with pytest.raises(TypeError, match=r"knows the losses of models \.\.\.ForCausalLM.*got LlamaModel"):
        balance_by_column(made(llama().model, data=table(), folder=tmp_path), balancer)
    with pytest.raises(ValueError, match="dataset= is for SFTTrainer with packing=True"):
        balance_by_column(made(data=table(), folder=tmp_path), balancer, dataset=table())
    anew = Trainer(model_init=lambda: llama(), args=arguments(tmp_path, 1), train_dataset=table())
    with pytest.raises(ValueError, match="give the trainer a model"):
        balance_by_column(anew, balancer)
    with pytest.raises(ValueError, match="FeatureTap needs one function per task, and here one gives"):
        balance_by_column(made(data=table(), folder=tmp_path), Balancer(DOMAINS, MGDA(), probe=FeatureTap()))
    liger = made(data=table(), folder=tmp_path)
    liger.args.use_liger_kernel = True
    with pytest.raises(ValueError, match="use_liger_kernel=True computes the loss inside a kernel"):
        balance_by_column(liger, balancer)
    split = made(data=table(), folder=tmp_path)
    split.accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(cp_size=2))
    with pytest.raises(ValueError, match=r"context parallelism splits them over ranks, \{'cp_size': 2"):
        balance_by_column(split, balancer)


def test_a_trainer_of_trl_with_another_loss_is_refused() -> None:
    kind = type("GRPOTrainer", (), {"__module__": "trl.trainer.grpo_trainer", "compute_loss": print})
    trainer = kind()
    trainer.model, trainer.model_init, trainer.args = llama(), None, SimpleNamespace(use_liger_kernel=False)
    with pytest.raises(TypeError, match="Trainer, SFTTrainer and DPOTrainer, and GRPOTrainer has its own"):
        balance_by_column(trainer, Balancer(DOMAINS, TokenShare()))


@pytest.mark.parametrize(
    ("own", "given"),
    [(Dataset.from_list([{"input_ids": [1]}]), iter([])), (SimpleNamespace(column_names=None), [])],
    ids=["given", "own"],
)
def test_a_stream_that_trl_packs_is_refused(own: Any, given: Any) -> None:
    kind = type("SFTTrainer", (), {"__module__": "trl.trainer.sft_trainer", "compute_loss": print})
    trainer = kind()
    trainer.args, trainer.train_dataset = SimpleNamespace(packing=True), own
    with pytest.raises(ValueError, match="packed once more, and a stream is read only once"):
        repacked(trainer, given, "domain", DOMAINS)


@pytest.mark.parametrize(
    ("settings", "probe", "message"),
    [
        ({"loss_types": ["ipo"]}, None, r"knows the loss of DPO itself, with loss_type=\['sigmoid'\], got"),
        ({"ld_alpha": 0.5}, None, "with ld_alpha=None, got 0.5: set it so"),
        ({"aux_loss_enabled": True, "router_aux_loss_coef": 0.1}, None, "router_aux_loss_coef=0.0, got 0.1"),
        ({}, SharedLayerProbe(), "SharedLayerProbe.*: DPOTrainer never makes logits"),
    ],
)
def test_other_losses_of_pairs_are_refused(settings: dict[str, Any], probe: Any, message: str) -> None:
    """The training itself is tests/gallery/dpo.py, which needs TRL."""
    kind = type("DPOTrainer", (), {"__module__": "trl.trainer.dpo_trainer", "compute_loss": print})
    trainer = kind()
    known = {"loss_types": ["sigmoid"], "f_divergence_type": "reverse_kl", "ld_alpha": None}
    known |= {"use_weighting": False, "aux_loss_enabled": False, "router_aux_loss_coef": 0.0}
    vars(trainer).update(known | settings, accelerator=SimpleNamespace(parallelism_config=None))
    trainer.model, trainer.model_init, trainer.args = llama(), None, SimpleNamespace(use_liger_kernel=False)
    with pytest.raises(ValueError, match=message):
        balance_by_column(trainer, Balancer(DOMAINS, MGDA(), probe=probe))


def test_a_head_whose_output_is_changed_is_refused(tmp_path: Path) -> None:
    sizes = config().to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    soft_cap = {key: sizes[key] for key in (*keys, "num_key_value_heads", "max_position_embeddings")}
    model = Gemma2ForCausalLM(Gemma2Config(**soft_cap, head_dim=8, pad_token_id=0))
    balancer = Balancer(DOMAINS, MGDA(), probe=SharedLayerProbe())
    with pytest.raises(ValueError, match="Gemma2ForCausalLM changes the output of its head"):
        train(model, tmp_path, balancer, steps=1)
    train(model, tmp_path, Balancer(DOMAINS, InverseGradNorm()), steps=1)


def test_a_forward_outside_of_the_training_says_why_it_cannot_be(tmp_path: Path) -> None:
    trainer = made(data=table(), folder=tmp_path)
    balance_by_column(trainer, Balancer(DOMAINS, TokenShare()))
    batch = trainer.data_collator([table()[0]])
    with pytest.raises(RuntimeError, match=r"trained outside of trainer\.train\(\)"):
        trainer.model.train()(**batch)
    assert trainer.model.eval()(**batch).loss.item() > 0


@pytest.mark.parametrize("rule", [Fixed([1.0, 0.0, 0.0])], ids=repr)
def test_generation_and_plain_calls_are_untouched(tmp_path: Path, rule: Rule) -> None:
    model, prompt = llama(), torch.tensor([[1, 2, 3]])
    before = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    trainer = made(model, data=table(), folder=tmp_path)
    balance_by_column(trainer, Balancer(DOMAINS, rule))
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0), before)
    plain = llama().train()(input_ids=prompt, labels=prompt).loss
    assert torch.equal(model.train()(input_ids=prompt, labels=prompt).loss, plain)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [2, 3])
def test_under_zero(tmp_path: Path, stage: int) -> None:
    found = []
    for number in (1, 2):
        out = tmp_path / f"losses-{number}"
        done = warm.launch(
            *(Path(__file__).parent / "by_column_zero.py", number, out, stage),
            env={"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "False"},
            timeout=280,
            modules=warm.TRAINER,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(out.read_text()))
    for losses in found:
        assert losses["own"] == pytest.approx(losses["plain"], rel=1e-6)
    for way in ("own", "head", "logits"):
        assert found[1][way] == pytest.approx(found[0][way], rel=1e-6)
    assert found[0]["head"] != pytest.approx(found[0]["plain"], rel=1e-4)


class Wrapped(nn.Module):
    """Holds a model as PEFT does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = model, model.config

    def get_base_model(self) -> nn.Module:
        return self.inner

    def forward(self, **batch: Any) -> Any:
        return self.inner(**batch)


def test_a_model_inside_another_is_balanced_at_the_inner_one(tmp_path: Path) -> None:
    plain, own = llama(), Wrapped(llama())
    train(plain, tmp_path)
    train(
        own, tmp_path, Balancer(DOMAINS, TokenShare(), probe=SharedLayerProbe()), remove_unused_columns=False
    )
    assert off(flat(plain), flat(own)) <= 1e-6


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("probe", [None, SharedLayerProbe()], ids=repr)
def test_lora_on_the_output_head(tmp_path: Path, probe: Any) -> None:
    peft = pytest.importorskip("peft", reason='pip install "mtl-dist[clients]"')

    def adapted() -> nn.Module:
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        return peft.get_peft_model(llama(), settings)

    plain, own = adapted(), adapted()
    train(plain, tmp_path)
    train(own, tmp_path, Balancer(DOMAINS, TokenShare(), probe=probe))
    assert off(flat(plain), flat(own)) <= 1e-6
