"""The cross-entropy in chunks of rows, and `balance_by_column(chunk=...)`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM, Trainer

from mtl_dist import Balancer, FeatureProbe, ParameterProbe, SharedLayerProbe
from mtl_dist.integrations.transformers import balance_by_column
from mtl_dist.losses import cross_entropy_in_chunks
from mtl_dist.weighting import InverseGradNorm, KeepNorm, TokenShare
from tests.gallery.causal_lm import DOMAINS, arguments, config, padded, table
from tests.gallery.run import flat


def problem(dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype).requires_grad_()

    labels = torch.randint(11, (3, 5), generator=draw)
    labels[0, 2], labels[2] = -100, -100
    return normal(3, 5, 7), normal(11, 7), normal(11) if bias else None, labels


def plain(h: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    logits = nn.functional.linear(h, w, b)
    logits = logits if h.dtype == torch.float64 else logits.float()
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), y.flatten(), reduction="none", ignore_index=-100
    )
    return losses.view(y.shape)


@pytest.mark.parametrize("chunk", [1, 4, 15, 1024])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_losses_and_gradients_are_those_of_whole_logits(
    dtype: torch.dtype, rtol: float, bias: bool, chunk: int
) -> None:
    found = []
    for function in (plain, lambda h, w, b, y: cross_entropy_in_chunks(h, w, y, bias=b, chunk=chunk)):
        hidden, weight, vector, labels = problem(dtype, bias)
        losses = function(hidden, weight, vector, labels)
        upstream = torch.linspace(-1, 2, 15).view(3, 5).to(losses.dtype)
        inputs = [one for one in (hidden, weight, vector) if one is not None]
        found.append([losses, *torch.autograd.grad((losses * upstream).sum(), inputs)])
    for expected, got in zip(*found, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol)
    assert (found[1][0][2] == 0).all()


def test_gradients_at_the_rows_do_not_visit_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, labels = problem(torch.float32, False)
    losses = cross_entropy_in_chunks(hidden, weight, labels, chunk=2)
    products: list[int] = []
    made = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda *a, **k: products.append(1) or made(*a, **k))
    torch.autograd.grad(losses.sum(), hidden, retain_graph=True)
    assert not products
    torch.autograd.grad(losses.sum(), weight)
    assert products


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"labels \[\.\.\.\] and chunk >= 1; got \(2, 3\), \(5, 3\), \(3,\) and 4"
    ):
        cross_entropy_in_chunks(
            torch.rand(2, 3), torch.rand(5, 3), torch.zeros(3, dtype=torch.int64), chunk=4
        )


def llama(**others: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config(**others))


def trained(folder: Path, balancer: Balancer | None, chunk: int | None, **others: Any) -> Tensor:
    model = llama(**others)
    trainer = Trainer(
        model, arguments(folder, 4, save_strategy="no"), train_dataset=table(), data_collator=padded
    )
    if balancer is not None:
        balance_by_column(trainer, balancer, chunk=chunk)
    trainer.train()
    return flat(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("probe", [None, FeatureProbe()], ids=repr)
def test_a_training_in_chunks_is_the_plain_training(tmp_path: Path, probe: Any, tied: bool) -> None:
    expected = trained(tmp_path, None, None, tie_word_embeddings=tied)
    got = trained(tmp_path, Balancer(DOMAINS, TokenShare(), probe=probe), 7, tie_word_embeddings=tied)
    assert float((got - expected).abs().max() / expected.abs().max()) <= 1e-6


@pytest.mark.parametrize("lag", [0, 1])
def test_a_gradient_rule_trains_in_chunks(tmp_path: Path, lag: int) -> None:
    rule = KeepNorm(InverseGradNorm(), like="tokens")
    balancers = [Balancer(DOMAINS, rule, lag=lag) for _ in range(2)]
    small, large = (trained(tmp_path, one, chunk) for one, chunk in zip(balancers, (3, 1000), strict=True))
    assert float((small - large).abs().max() / large.abs().max()) <= 1e-6
    assert min(balancers[0].report.grad_norms.values()) > 0


def first_gram(folder: Path, make: Callable[[nn.Module], Any], chunk: int | None) -> Tensor:
    model = llama()
    balancer = Balancer(DOMAINS, InverseGradNorm(), probe=make(model))
    args = arguments(folder, 1, save_strategy="no", gradient_accumulation_steps=1)
    trainer = Trainer(model, args, train_dataset=table(), data_collator=padded)
    balance_by_column(trainer, balancer, chunk=chunk)
    trainer.train()
    return balancer.report.stats.gram


def everything(_: nn.Module) -> ParameterProbe:
    return ParameterProbe()


def head(model: nn.Module) -> ParameterProbe:
    return ParameterProbe(parameters=lambda: [model.lm_head.weight])


def layer(_: nn.Module) -> SharedLayerProbe:
    return SharedLayerProbe()


@pytest.mark.parametrize(("make", "whole"), [(everything, everything), (head, layer)])
def test_gradients_at_parameters_are_those_of_whole_logits(tmp_path: Path, make: Any, whole: Any) -> None:
    got, expected = first_gram(tmp_path, make, 7), first_gram(tmp_path, whole, None)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize("lag", [0, 1])
def test_chunks_are_whole_logits_also_with_a_lag(lag: int) -> None:
    """Weights, and gradients at the features and at the weight of the head."""
    found = []
    for function in (plain, lambda h, w, b, y: cross_entropy_in_chunks(h, w, y, bias=b, chunk=4)):
        hidden, weight, _, labels = problem(torch.float64, bias=False)
        balancer = Balancer(("a", "b"), InverseGradNorm(), lag=lag)
        ids = torch.tensor([0, 1, 1])
        for _ in range(3):
            hidden.grad = weight.grad = None
            losses = partial(function, w=weight, b=None, y=labels)
            balancer(hidden * 1.0, losses, task_ids=ids, mask=labels != -100).backward()
        found.append([torch.tensor([*balancer.report.weights.values()]), hidden.grad, weight.grad])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_shared_layer_in_chunks_is_refused_with_another_way(tmp_path: Path) -> None:
    trainer = Trainer(llama(), arguments(tmp_path, 1), train_dataset=table(), data_collator=padded)
    balancer = Balancer(DOMAINS, InverseGradNorm(), probe=SharedLayerProbe())
    message = r"SharedLayerProbe.* needs the logits\. ParameterProbe\(parameters=lambda: "
    with pytest.raises(ValueError, match=message):
        balance_by_column(trainer, balancer, chunk=8)


def test_logits_that_the_model_changes_are_refused(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads))
    trainer = Trainer(model, arguments(tmp_path, 1), train_dataset=table(), data_collator=padded)
    with pytest.raises(ValueError, match=r"changes its logits after the head \(final_logit_softcapping\)"):
        balance_by_column(trainer, Balancer(DOMAINS, TokenShare()), chunk=8)
