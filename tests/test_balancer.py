"""The facade on one process: modes, inputs, errors, state."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from explicit import gradients
from torch import Tensor, nn

from mtl_dist import Balancer, FeatureProbe, FeatureTap
from mtl_dist.weighting import FAMO, MGDA, Equal, GeometricMean, InitialLoss, InverseLoss, Smooth

ALL = [FeatureProbe(), FeatureProbe(reevaluate=True), FeatureTap()]
HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "a": lambda z: (z - 1).square().sum() + 1,
    "b": lambda z: (3 * z + z.flip(0)).square().sum() + 2,
}


def features() -> Tensor:
    return torch.tensor([0.5, -2.0, 1.5], requires_grad=True)


# ---- objective ----------------------------------------------------------------------------------


def test_losses_only() -> None:
    balancer = Balancer(["a", "b"], InverseLoss())
    a, b = torch.tensor(4.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    total = balancer({"a": a, "b": b})
    assert total.item() == pytest.approx(2.0)
    total.backward()
    assert (a.grad.item(), b.grad.item()) == (0.25, 2.0)
    assert balancer.report.weights == {"a": 0.25, "b": 2.0}
    assert balancer.report.losses == {"a": 4.0, "b": 0.5}


def test_default_for_gradient_rules_is_the_feature_probe() -> None:
    assert Balancer(["a"], MGDA()).probe == FeatureProbe()


def test_losses_only_rules_measure_nothing_unless_a_probe_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or original(*a, **k))
    Balancer(["a", "b"], GeometricMean())(features() * 1, HEADS)
    assert not calls
    given = Balancer(["a", "b"], GeometricMean(), probe=FeatureProbe())
    given(features() * 1, HEADS)
    assert len(calls) == 1  # one pass for both heads
    assert set(given.report.grad_norms) == {"a", "b"}


@pytest.mark.parametrize("probe", ALL, ids=repr)
def test_absent_tasks(probe: object) -> None:
    """Absent from the mapping, None from its head, or a count of 0 with a NaN mean: all the same."""
    present = {"b": HEADS["b"]}
    reference = Balancer(["b"], MGDA(), probe=probe)
    reference(features() * 1, present).backward()
    for heads, counts in (
        (present, None),
        ({**present, "a": lambda z: None}, None),
        ({**present, "a": lambda z: z[:0].mean()}, {"a": 0, "b": 1}),
    ):
        balancer = Balancer(["a", "b"], MGDA(), probe=probe)
        x = features()
        balancer(x * 1, heads, counts=counts).backward()
        assert balancer.report.weights == {"a": 0.0, "b": 1.0}
        assert balancer.report.losses["b"] == reference.report.losses["b"]
        assert torch.isnan(torch.tensor(balancer.report.losses["a"]))
        torch.testing.assert_close(x.grad, torch.autograd.grad(HEADS["b"](z := features()), z)[0])


@pytest.mark.parametrize("probe", ALL, ids=repr)
def test_no_task_at_all_gives_a_zero_gradient(probe: object) -> None:
    balancer = Balancer(["a", "b"], MGDA(), probe=probe)
    x = features()
    total = balancer(x * 1, {"a": lambda z: None})
    total.backward()
    assert total.item() == 0
    assert torch.equal(x.grad, torch.zeros(3))
    losses_only = Balancer(["a"], Equal())({})
    losses_only.backward()
    assert losses_only.item() == 0


def test_counts_as_tensors_numbers_and_default() -> None:
    for counts in (None, {"a": 3, "b": 3.0}, {"a": torch.tensor(3), "b": torch.tensor([3.0])}):
        balancer = Balancer(["a", "b"], MGDA())
        balancer(features() * 1, HEADS, counts=counts)
        expected = 1.0 if counts is None else 3.0
        assert balancer.report.stats.counts.tolist() == [expected, expected]
        assert balancer.report.losses["a"] == pytest.approx(HEADS["a"](features()).item())


def test_total_of_low_precision_losses_is_float32() -> None:
    balancer = Balancer(["a", "b"], Equal())
    total = balancer({"a": torch.tensor(1.0, dtype=torch.bfloat16), "b": torch.tensor(2.0**-9)})
    assert total.dtype == torch.float32
    assert total.item() == (1 + 2.0**-9) / 2  # lost in bfloat16
    assert balancer({"a": torch.tensor(1.0, dtype=torch.float64), "b": None}).dtype == torch.float64


# ---- modes --------------------------------------------------------------------------------------


def trained(rule: object = None) -> Balancer:
    balancer = Balancer(["a", "b"], rule or Smooth(MGDA(), 0.5))
    for shift in range(3):
        balancer(features() + shift, HEADS).backward()
    return balancer


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_evaluation_measures_nothing_and_changes_nothing(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    balancer = trained()
    before, report = balancer.state_dict(), balancer.report
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: pytest.fail("measured in evaluation"))
    monkeypatch.setattr(
        balancer._synchronizer, "reduce", lambda *a: pytest.fail("a collective in evaluation")
    )
    if mode == "eval":
        total = balancer.eval()(features(), HEADS)
    else:
        with torch.no_grad():
            total = balancer(features(), HEADS)
    weights = balancer.weights
    expected = sum(weights[task] * head(features()) for task, head in HEADS.items())
    torch.testing.assert_close(total, expected)
    assert balancer.report is report
    assert_same_state(balancer.state_dict(), before)


def test_evaluation_before_the_first_step_uses_equal_weights() -> None:
    balancer = Balancer(["a", "b"], MGDA()).eval()
    total = balancer({"a": torch.tensor(1.0), "b": torch.tensor(3.0)})
    assert total.item() == 2.0


def test_follows_the_model_it_is_part_of() -> None:
    model = nn.Module()
    model.linear = nn.Linear(2, 2)
    model.balancer = Balancer(["a"], Equal())
    model.eval()
    assert not model.balancer.training
    assert set(model.state_dict()) == {"linear.weight", "linear.bias"}
    model.load_state_dict(model.state_dict())
    assert [name for name, _ in model.named_parameters()] == ["linear.weight", "linear.bias"]
    assert not list(model.balancer.buffers())


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", ["ab", [], ["a", "a"], ["a", ""], [1, 2]])
def test_task_names(tasks: object) -> None:
    with pytest.raises(ValueError, match="task"):
        Balancer(tasks, Equal())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: b({"c": torch.tensor(1.0)}), ValueError, r"unknown task \['c'\] in the loss mapping"),
        (lambda b: b({"a": torch.ones(2)}), ValueError, r"task 'a' must be one .* shape \(2,\)"),
        (lambda b: b({"a": 1.5}), ValueError, r"got 1\.5"),
        (lambda b: b({"a": torch.tensor(1)}), ValueError, r"torch\.int64"),
        (lambda b: b(torch.tensor(1.0)), TypeError, "takes a mapping"),
        (lambda b: b({"a": torch.tensor(1.0)}, counts={"b": 1}), ValueError, "'a' has a loss but no count"),
        (lambda b: b({"a": torch.tensor(1.0)}, counts={"a": -1}), ValueError, "must be >= 0, got -1"),
        (lambda b: b({"a": torch.tensor(1.0)}, counts={"a": 1, "z": 2}), ValueError, "in the count mapping"),
        (lambda b: b(features(), {"z": HEADS["a"]}), ValueError, "in the heads"),
        (
            lambda b: b(features(), 3),
            TypeError,
            "heads must be a mapping of functions or a function, got int",
        ),
        (
            lambda b: b(features(), lambda z: z.sum()),
            TypeError,
            "must return a mapping of losses, got Tensor",
        ),
    ],
)
def test_bad_calls_say_what_was_received(call: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(Balancer(["a", "b"], Equal()))


@pytest.mark.parametrize("probe", ALL, ids=repr)
def test_a_misspelt_head_is_not_taken_for_an_absent_task(probe: object) -> None:
    with pytest.raises(ValueError, match=r"unknown task \['B'\] in the heads"):
        Balancer(["a", "b"], MGDA(), probe=probe)(features(), {"a": HEADS["a"], "B": HEADS["b"]})


def test_features_must_hold_a_floating_point_tensor() -> None:
    with pytest.raises(ValueError, match="floating-point tensor to measure gradients at"):
        Balancer(["a"], MGDA())(torch.tensor([1, 2]), {"a": lambda z: z.sum()})


def test_gradient_rules_refuse_losses_alone() -> None:
    with pytest.raises(ValueError, match=r"MGDA\(.*\) reads gradients: call balancer\(features, heads\)"):
        Balancer(["a"], MGDA())({"a": torch.tensor(1.0)})


@pytest.mark.parametrize("value", [0.0, -0.3])
@pytest.mark.parametrize("policy", ["raise", "hold", "skip"])
def test_loss_out_of_the_domain_of_a_log_rule(value: float, policy: str) -> None:
    balancer = Balancer(["a", "b"], Smooth(GeometricMean()), on_nonfinite=policy)
    before = balancer.state_dict()
    with pytest.raises(
        ValueError, match=rf"GeometricMean.* needs them > 0, got {{'b': {value}.*Add a constant"
    ):
        balancer({"a": torch.tensor(1.0), "b": torch.tensor(value, dtype=torch.float64)})
    assert_same_state(balancer.state_dict(), before)


def test_observe_teaches_rules_that_learn_from_other_losses() -> None:
    balancer = Balancer(["a", "b"], Smooth(FAMO(feedback="after")))
    losses = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    balancer(losses)
    before = balancer.state_dict()
    balancer.observe({"a": torch.tensor(1.0), "b": torch.tensor(3.0)})
    after = balancer.state_dict()
    assert not torch.equal(before["rule.rule.w"], after["rule.rule.w"])
    assert after["step"] == before["step"]
    balancer(losses)
    # the task that fell gets less weight than it would have without what was observed
    unobserved = Balancer(["a", "b"], Smooth(FAMO(feedback="after")))
    unobserved(losses)
    unobserved(losses)
    assert balancer.report.weights["a"] < unobserved.report.weights["a"]


def test_observe_refuses_rules_and_losses_that_it_cannot_use() -> None:
    with pytest.raises(ValueError, match=r"Equal\(\) takes no losses from outside the step"):
        Balancer(["a"], Equal()).observe({"a": torch.tensor(1.0)})
    balancer = Balancer(["a"], FAMO(feedback="after"))
    balancer({"a": torch.tensor(1.0)})
    before = balancer.state_dict()
    for bad in (torch.nan, -1.0):
        with pytest.raises(ValueError, match=r"task 'a' on rank 0|needs them > 0"):
            balancer.observe({"a": torch.tensor(bad)})
        assert_same_state(balancer.state_dict(), before)


def test_policy_is_checked() -> None:
    with pytest.raises(ValueError, match='"raise", "skip" or "hold", got'):
        Balancer(["a"], Equal(), on_nonfinite="ignore")
    with pytest.raises(ValueError, match="FeatureTap sees a bad gradient"):
        Balancer(["a"], MGDA(), probe=FeatureTap(), on_nonfinite="skip")


# ---- values that are not finite -----------------------------------------------------------------

BAD = {
    "loss": lambda z: z.sum() * torch.nan,
    "infinite loss": lambda z: z.sum() * torch.inf,
    "gradient": lambda z: (z - z.detach()).sqrt().sum(),  # finite, its derivative is not
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("probe", ALL, ids=repr)
def test_raise_names_the_task(kind: str, probe: object) -> None:
    balancer = Balancer(["a", "b"], MGDA(), probe=probe)
    with pytest.raises(ValueError, match="NaN or infinite: task 'b' on rank 0"):
        balancer(features() * 1, {"a": HEADS["a"], "b": BAD[kind]}).backward()


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("probe", ALL, ids=repr)
def test_hold_keeps_state_and_weights(kind: str, probe: object) -> None:
    balancer = Balancer(["a", "b"], Smooth(MGDA(), 0.5), probe=probe, on_nonfinite="hold")
    balancer(features() * 1, HEADS).backward()
    before, weights = balancer.state_dict(), balancer.report.weights
    balancer(features() * 1, {"a": HEADS["a"], "b": BAD[kind]}).backward()
    assert bool(balancer.report.held)
    assert balancer.report.weights == weights
    after = balancer.state_dict()
    assert (after.pop("step"), before.pop("step")) == (2, 1)
    assert_same_state(after, before)


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("reevaluate", [False, True])
def test_skip_makes_every_gradient_zero(kind: str, reevaluate: bool) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"trunk": nn.Linear(3, 3), "head": nn.Linear(3, 3), "bad": nn.Linear(3, 3)})
    probe = FeatureProbe(reevaluate=reevaluate)
    balancer = Balancer(["a", "b"], MGDA(), probe=probe, on_nonfinite="skip")
    good = {"a": lambda z: net["head"](z).square().mean(), "b": lambda z: net["bad"](z).square().mean()}
    bad = {"a": good["a"], "b": lambda z: BAD[kind](net["bad"](z))}
    total = balancer(net["trunk"](torch.ones(2, 3)), bad)
    total.backward()
    assert total.item() == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(net).values())
    assert all(p.grad is not None for p in net.parameters()), "an engine waits for every parameter"
    balancer(net["trunk"](torch.ones(2, 3)), good).backward()
    assert all(g.abs().sum() > 0 for g in gradients(net).values()), "the next step is an ordinary one"


def test_skipped_step_that_was_never_differentiated_leaves_no_trace() -> None:
    net = nn.Linear(3, 3)
    balancer = Balancer(["a"], MGDA(), on_nonfinite="skip")
    balancer(net(torch.ones(3)), {"a": BAD["loss"]})
    balancer(net(torch.ones(3)), {"a": lambda z: z.sum()}).backward()
    assert net.weight.grad.abs().sum() > 0


# ---- state --------------------------------------------------------------------------------------


def assert_same_state(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, Tensor) else value == b[key], key


@pytest.mark.parametrize("rule", [Smooth(MGDA(), 0.9), InitialLoss(steps=5), InverseLoss()], ids=repr)
def test_resume_is_bitwise(rule: object) -> None:
    def run(balancer: Balancer, steps: range) -> list[dict]:
        return [balancer(features() + 0.3 * s, HEADS) and balancer.report.weights for s in steps]

    whole = Balancer(["a", "b"], rule)
    expected = run(whole, range(8))[4:]
    first = Balancer(["a", "b"], rule)
    run(first, range(4))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Balancer(["a", "b"], rule)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert run(second, range(4, 8)) == expected
    assert second.step == 8
    assert_same_state(second.state_dict(), whole.state_dict())


def test_saved_state_is_a_copy() -> None:
    balancer = trained()
    saved = balancer.state_dict()
    before = copy.deepcopy(saved)
    balancer(features() * 5, HEADS)
    assert_same_state(saved, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "tasks": ["b", "a"]}, r"belongs to tasks \['b', 'a'\]"),
        (lambda s: {**s, "rule": "Equal()"}, r"belongs to rule 'Equal\(\)'"),
        (lambda s: {k: v for k, v in s.items() if k != "weights"}, r"missing keys \['weights'\]"),
        (lambda s: {**s, "rule.extra": torch.ones(1)}, r"unknown keys \['rule.extra'\]"),
        (
            lambda s: {**s, "rule.sum": torch.ones(3)},
            r"'rule.sum' must have shape \(2,\), got torch.Size\(\[3\]\)",
        ),
        (lambda s: {**s, "weights": [1.0, 2.0]}, "'weights' must have shape"),
    ],
)
def test_foreign_state_changes_nothing(change: Callable[[dict], dict], message: str) -> None:
    balancer = trained()
    before = balancer.state_dict()
    with pytest.raises(ValueError, match=message):
        balancer.load_state_dict(change(copy.deepcopy(before)))
    assert_same_state(balancer.state_dict(), before)


def test_no_warning_and_no_leak_of_the_graph() -> None:
    balancer = Balancer(["a", "b"], Smooth(MGDA()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            balancer(features() * 1, HEADS).backward()
    assert not any(
        value.requires_grad for value in balancer.state_dict().values() if isinstance(value, Tensor)
    )
    assert not balancer.report.stats.losses.requires_grad


def test_repr_tells_the_settings() -> None:
    text = repr(Balancer(["a"], Smooth(MGDA(), 0.5), on_nonfinite="hold"))
    assert "Smooth(rule=MGDA(" in text
    assert "FeatureProbe" in text
    assert "hold" in text


@pytest.mark.parametrize("settings", [{}, {"probe": FeatureTap()}, {"lag": 1}], ids=str)
def test_features_of_which_one_is_computed_from_another_count_once(settings):
    """As under the gates of MMoE: the experts, and the inputs that experts and gates read."""
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    trunk = 2 * x
    features = trunk.square(), trunk
    heads = {"a": lambda z: z[0].sum() + z[1].sum(), "b": lambda z: (z[0] * z[1]).sum()}
    balancer = Balancer(["a", "b"], MGDA(), **settings)
    balancer(features, heads).backward()
    # what each head reads itself, of both parts
    rows = [torch.ones(6, dtype=torch.float64), torch.cat([trunk, trunk.square()]).detach()]
    expected = torch.stack(rows) @ torch.stack(rows).T
    torch.testing.assert_close(balancer.report.stats.gram, expected)
