"""Losses with count 0 and masked samples: no gradient, whatever they hold; counts that cannot be: refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_dist import Balancer, FeatureProbe, FeatureTap, ParameterProbe, SharedLayerProbe
from mtl_dist.losses import samples, tasks
from mtl_dist.virtual import VirtualRanks
from mtl_dist.weighting import MGDA, Equal, InverseLoss

RULES = [Equal(), InverseLoss(), MGDA()]
POLICIES = ["raise", "hold", "skip"]


def net() -> SimpleNamespace:
    torch.manual_seed(0)
    return SimpleNamespace(trunk=nn.Linear(4, 8), last=nn.Linear(8, 8), a=nn.Linear(8, 1), b=nn.Linear(8, 1))


def parameters(model: SimpleNamespace) -> list[Tensor]:
    return [p for module in vars(model).values() for p in module.parameters()]


def gradients(model: SimpleNamespace) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters(model)]


def masked_mean(model: SimpleNamespace, mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: (mask * (model.b(z).squeeze(-1) - 1).square()).sum() / mask.sum()


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
EMPTY = {
    "masked mean": lambda model: masked_mean(model, torch.zeros(6)),
    "mean over no row": lambda model: lambda z: model.b(z[:0]).square().mean(),
    "root at zero": lambda model: lambda z: (0 * model.b(z)).square().sum().sqrt(),
    "infinite": lambda model: lambda z: model.b(z).sum() / 0,
    "constant": lambda model: lambda z: z.new_zeros(()),
    "NaN constant": lambda model: lambda z: z.new_full((), torch.nan),
}
PROBES = [FeatureProbe(), FeatureProbe(reevaluate=True), FeatureTap(), ParameterProbe()]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("probe", PROBES, ids=repr)
@pytest.mark.parametrize("loss", EMPTY)
@pytest.mark.parametrize("count", [0, torch.tensor(0), torch.tensor(0.0)], ids=repr)
def test_a_loss_with_count_0_trains_nothing(loss: str, probe: Any, policy: str, count: Any) -> None:
    """The gradients are those of a batch without this task, whatever the loss and its derivatives are."""
    if policy == "skip" and isinstance(probe, FeatureTap):
        return  # refused
    found = []
    for empty in (EMPTY[loss], lambda model: lambda z: None):
        model = net()
        balancer = Balancer(["a", "b"], MGDA(), probe=probe, on_nonfinite=policy)
        heads = {"a": lambda z, model=model: model.a(z).square().mean(), "b": empty(model)}
        balancer(model.trunk(X).tanh(), heads, counts={"a": 6, "b": count}).backward()
        assert balancer.report.weights["a"] == 1.0
        found.append(gradients(model))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["function", "losses", "layer"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_so_it_is_in_every_form_of_the_call(form: str, rule: Any) -> None:
    model, counts = net(), {"a": 6, "b": 0}
    empty = masked_mean(model, torch.zeros(6))

    def losses(z: Tensor) -> dict[str, Tensor]:
        return {"a": model.a(z).square().mean(), "b": empty(z)}

    z = model.trunk(X).tanh()
    if form == "layer":
        Balancer(["a", "b"], rule, probe=SharedLayerProbe())(
            z, losses, layer=model.last, counts=counts
        ).backward()
    elif form == "function":
        Balancer(["a", "b"], rule)(z, losses, counts=counts).backward()
    elif rule != MGDA():
        Balancer(["a", "b"], rule)(losses(z), counts=counts).backward()
    assert all(g.isfinite().all() for g in gradients(model))
    assert not model.b.weight.grad is not None or not model.b.weight.grad.any()


def test_a_decoder_shared_with_a_counted_task_keeps_its_gradient() -> None:
    found = []
    for empty in (True, False):
        model = net()

        def losses(z: Tensor, model: Any = model, empty: bool = empty) -> dict[str, Tensor]:
            h = model.last(z).tanh()
            own = {"b": masked_mean(model, torch.zeros(6))(h)} if empty else {}
            return {"a": model.a(h).square().mean(), **own}

        Balancer(["a", "b"], Equal())(model.trunk(X), losses, counts={"a": 6, "b": 0}).backward()
        found.append(gradients(model))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)


def test_every_parameter_of_an_empty_head_is_still_visited() -> None:
    """Engines that wait for all parameters (DDP, ZeRO) see a complete backward, without special settings."""
    model, visited = net(), []
    for p in parameters(model):
        p.register_post_accumulate_grad_hook(lambda p: visited.append(id(p)))
    heads = {"a": lambda z: model.a(z).square().mean(), "b": masked_mean(model, torch.zeros(6))}
    Balancer(["a", "b"], Equal())(model.trunk(X), heads, counts={"a": 6, "b": 0}).backward()
    assert {id(p) for p in model.b.parameters()} <= set(visited)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("shape", [(6,), (6, 3)], ids=repr)
@pytest.mark.parametrize("layer", [False, True])
def test_masked_samples_train_nothing(rule: Any, policy: str, shape: tuple[int, ...], layer: bool) -> None:
    """NaN labels behind a mask give the gradients of labels that are there."""
    found = []
    ids = torch.arange(6) % 2
    for label in (torch.nan, 0.25):
        model = net()
        mask = torch.ones(shape, dtype=torch.bool)
        mask[3] = False
        mask.view(-1)[-1] = False
        y = torch.where(mask, 0.5, label)
        x = X if len(shape) == 1 else X[:, None].expand(6, 3, 4) * torch.tensor([1.0, 2, 3])[:, None]
        probe = SharedLayerProbe() if layer else None
        balancer = Balancer(["a", "b"], rule, probe=probe, on_nonfinite=policy)

        def losses(z: Tensor, model: Any = model, y: Tensor = y) -> Tensor:
            return (model.a(z.tanh()).squeeze(-1) - y).square()

        z = model.trunk(x).tanh()
        balancer(z, losses, task_ids=ids, mask=mask, layer=model.last if layer else None).backward()
        found.append([*gradients(model), balancer.report.weight_vector])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_masked_tokens_of_a_flattened_head_train_nothing() -> None:
    """Cross entropy takes [B T, V]; the NaN of a hidden token stays with this token."""
    found = []
    for bad in (torch.nan, 1.0):
        model, ids = net(), torch.tensor([0, 1])
        mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
        scale = torch.where(mask.bool(), 1.0, bad)

        def losses(z: Tensor, model: Any = model, scale: Tensor = scale) -> Tensor:
            logits = model.last(z).flatten(0, 1) * scale.flatten()[:, None]
            labels = torch.zeros(6, dtype=torch.long)
            return nn.functional.cross_entropy(logits, labels, reduction="none").view(2, 3)

        Balancer(["a", "b"], Equal())(
            model.trunk(X.view(2, 3, 4)), losses, task_ids=ids, mask=mask
        ).backward()
        found.append(gradients(model))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_nan_of_a_sample_that_counts_is_still_an_error() -> None:
    model = net()
    y, mask = torch.zeros(6), torch.ones(6)
    y[2], y[3], mask[3] = torch.nan, torch.nan, 0
    with pytest.raises(ValueError, match="NaN or infinite: task 'a'"):
        Balancer(["a", "b"], Equal())(
            model.trunk(X),
            lambda z: (model.a(z).squeeze(-1) - y).square(),
            task_ids=torch.arange(6) % 2,
            mask=mask,
        )


WRONG = [-1, -0.5, torch.nan, torch.inf, "8", None, [8], torch.tensor(-4.0), torch.tensor(torch.nan)]
WRONG += [torch.tensor(torch.inf), torch.tensor([1, 2]), torch.tensor(1j), torch.empty(0), object]


@pytest.mark.parametrize("form", ["heads", "function", "losses"])
@pytest.mark.parametrize("count", WRONG, ids=repr)
def test_a_count_that_is_no_number_of_samples_is_refused(count: Any, form: str) -> None:
    balancer = Balancer(["a", "b"], Equal())
    z = torch.randn(3, 2, requires_grad=True)
    heads = {"a": lambda z: z.sum(), "b": lambda z: z.square().sum()}
    values = {task: head(z) for task, head in heads.items()}
    arguments = {"heads": (z, heads), "function": (z, lambda _: values), "losses": (values,)}[form]
    with pytest.raises(ValueError, match="task 'b'") as error:
        balancer(*arguments, counts={"a": 3, "b": count})
    assert "\n" not in str(error.value)
    assert balancer.step == 0


@pytest.mark.parametrize(
    "mask", [-torch.ones(6), torch.full((6,), torch.nan), -torch.ones(6, dtype=torch.int8)]
)
def test_a_mask_that_holds_no_weights_is_refused(mask: Tensor) -> None:
    model = net()
    with pytest.raises(ValueError, match="mask= holds how much each sample counts, numbers >= 0"):
        Balancer(["a", "b"], Equal())(
            model.trunk(X), lambda z: z.square().sum(1), task_ids=torch.arange(6) % 2, mask=mask
        )


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can look at tensors, as if they were on an accelerator."""
    monkeypatch.setattr(tasks, "HOST", "none of these")
    monkeypatch.setattr(samples, "HOST", "none of these")


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize("policy", POLICIES)
def test_where_only_the_device_knows_the_count_a_nan_is_refused_with_the_remedy(policy: str) -> None:
    model, mask = net(), torch.zeros(6)
    heads = {"a": lambda z: model.a(z).square().mean(), "b": masked_mean(model, mask)}
    with pytest.raises(ValueError, match=r"task \['b'\] has count 0, and its loss is NaN .*Return None"):
        Balancer(["a", "b"], Equal(), on_nonfinite=policy)(
            model.trunk(X), heads, counts={"a": 6, "b": mask.sum()}
        )
    with pytest.raises(ValueError, match=r"mask= hides samples .*replace the labels"):
        Balancer(["a", "b"], Equal(), on_nonfinite=policy)(
            model.trunk(X),
            lambda z: model.a(z).squeeze(-1) * torch.nan,
            task_ids=torch.arange(6) % 2,
            mask=mask,
        )


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize("count", [-4.0, torch.nan, torch.inf])
def test_where_only_the_device_knows_the_count_a_wrong_one_is_refused(count: float) -> None:
    z = torch.randn(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"^the count of task 'b' must be >= 0, got"):
        Balancer(["a", "b"], Equal())({"a": z.sum(), "b": z.sum()}, counts={"a": 1, "b": torch.tensor(count)})


@pytest.mark.usefixtures("on_a_device")
def test_where_only_the_device_knows_the_others_hear_of_what_is_refused() -> None:
    """Given losses are refused through the step too, which tells the other ranks."""
    z = torch.randn(3, 2, requires_grad=True)
    balancer = Balancer(["a", "b", "c"], Equal())
    ranks = VirtualRanks(2, balancer, nn.Module())
    counts = [{"a": 0.5, "b": torch.tensor(2.0), "c": 0.0}, {"a": 0.5, "b": torch.tensor(-2.0), "c": 0.0}]

    def work(rank: int) -> Tensor:
        try:
            return balancer(dict.fromkeys("abc", z.sum()), counts=counts[rank])
        except Exception as error:
            said[rank] = str(error)
            raise

    said = ["", ""]
    with pytest.raises(ValueError, match=r"^the count of task 'b' must be >= 0, got -2\.0:"):
        ranks.run(work)
    assert "task 'a'" not in said[1], "a half is a number of samples"
    assert "rank 1" in said[0]


def test_a_mask_that_holds_no_weights_is_told_value_by_value() -> None:
    mask = torch.tensor([1.0, -1.0, 0.0, torch.inf, 2.0, -3.0])
    with pytest.raises(ValueError, match=r"got \[-3\.0, -1\.0, inf\]$"):
        Balancer(["a", "b"], Equal())(
            torch.ones(6, 2), lambda z: z.square().sum(1), task_ids=torch.arange(6) % 2, mask=mask
        )


def infinite_slope(model: SimpleNamespace, mask: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The loss of "b" is finite, its gradient is not."""
    return {
        "a": lambda z: model.a(z).square().mean(),
        "b": lambda z: (mask[:, None] * model.b(z)).square().sum().sqrt(),
    }


@pytest.mark.usefixtures("on_a_device")
def test_where_only_the_device_knows_the_count_the_trunk_is_protected() -> None:
    model, mask = net(), torch.zeros(6)
    balancer = Balancer(["a", "b"], MGDA(), probe=FeatureTap())
    counts = {"a": torch.tensor(6), "b": mask.sum()}
    balancer(model.trunk(X), infinite_slope(model, mask), counts=counts).backward()
    assert model.trunk.weight.grad.isfinite().all()
    assert balancer.report.weights == {"a": 1.0, "b": 0.0}


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize("form", ["mapping", "function"])
def test_where_only_the_device_knows_the_count_a_nan_gradient_is_refused(form: str) -> None:
    model, mask = net(), torch.zeros(6)
    heads = infinite_slope(model, mask)
    given = heads if form == "mapping" else lambda z: {task: head(z) for task, head in heads.items()}
    counts = {"a": torch.tensor(6), "b": mask.sum()}
    with pytest.raises(ValueError, match=r"task \['b'\] has count 0, and .* has NaN gradients"):
        Balancer(["a", "b"], MGDA())(model.trunk(X), given, counts=counts)


@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 2, 3)])
def test_a_nan_gradient_of_a_sample_that_counts_stays_beside_hidden_ones(shape: tuple[int, ...]) -> None:
    """Only what the mask hides is cleaned, in losses of any shape."""
    trunk, mask = nn.Linear(2, 1), torch.ones(shape)
    mask[1] = 0
    x = torch.randn(*shape, 2)
    for bad, survives in ((1, False), (2, True)):
        trunk.zero_grad()
        labels = torch.zeros(shape)
        labels[1] = torch.nan

        def losses(z: Tensor, bad: int = bad, labels: Tensor = labels) -> Tensor:
            steep = torch.zeros(shape)
            steep[bad] = 1
            # the root of a square at 0: its value is finite, its gradient is not
            root = ((z.squeeze(-1) - z.squeeze(-1).detach()).square() * steep + 1 - steep).sqrt()
            return (z.squeeze(-1) - labels).square() + root

        balancer = Balancer(["a", "b"], Equal())
        balancer(trunk(x), losses, task_ids=torch.arange(6) % 2, mask=mask).backward()
        assert bool(trunk.weight.grad.isfinite().all()) is not survives
