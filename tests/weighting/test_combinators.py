"""Every, Normalize, Clamp, Warmup, Preference, Smooth, ...: what each does to the weights of its rule."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from mtl_dist.stats import TaskStats
from mtl_dist.weighting import (
    MGDA,
    Clamp,
    CoBa,
    Equal,
    Every,
    Fixed,
    Grouped,
    InverseGradNorm,
    InverseLoss,
    KeepNorm,
    Needs,
    Normalize,
    Preference,
    Relative,
    Rule,
    Smooth,
    Warmup,
)

CPU = torch.device("cpu")
TASKS = ("depth", "segment", "normal")


def stats(losses, step=0, present=(True, True, True), gram=None):
    losses = torch.tensor(losses, dtype=torch.float64)
    return TaskStats(losses, torch.tensor(present), gram, torch.tensor(present).double(), step)


@dataclass(frozen=True)
class Echo(Rule):
    """Weights are the losses; the state remembers which steps it saw."""

    def init(self, tasks, device):
        return {"steps": torch.full((9,), -1), "calls": torch.zeros((), dtype=torch.int64)}

    def update(self, stats, state):
        steps = state["steps"].clone()
        steps[state["calls"]] = stats.step
        return stats.losses.clone(), {"steps": steps, "calls": state["calls"] + 1}


def run(rule, steps):
    state = rule.init(TASKS, CPU)
    result = []
    for step in steps:
        weights, state = rule.update(step, state)
        result.append(weights.tolist())
    return result, state


def test_every_holds_the_weights_in_between_and_the_rule_counts_its_own_updates():
    losses = [[float(step), 2.0 * step, 3.0 * step] for step in range(7)]
    weights, state = run(Every(Echo(), 3), [stats(loss, step) for step, loss in enumerate(losses)])
    assert weights == [losses[step] for step in (0, 0, 0, 3, 3, 3, 6)]
    assert state["rule.steps"].tolist()[:4] == [0, 1, 2, -1]


def test_every_measures_gradients_only_where_the_rule_runs():
    rule = Every(Every(MGDA(), 2), 3)
    needed = [step for step in range(13) if rule.needs_at(step) is Needs.GRAM]
    assert needed == [0, 6, 12]
    gram = torch.eye(3, dtype=torch.float64)
    weights, _ = run(
        Every(InverseGradNorm(), 2), [stats([1.0] * 3, 0, gram=4 * gram), stats([1.0] * 3, 1, gram=None)]
    )
    assert weights == [[0.5] * 3, [0.5] * 3]


def test_every_gives_a_task_without_weight_the_mean_of_the_others():
    late = (True, True, False)
    weights, _ = run(
        Every(Echo(), 2),
        [
            stats([4.0, 8.0, 1.0], 0, late),
            stats([1.0, 1.0, 1.0], 1),
            stats([1.0, 1.0, 5.0], 2),
            stats([9.0, 9.0, 9.0], 3, late),
            stats([2.0, 2.0, 1.0], 4, late),
            stats([9.0, 9.0, 9.0], 5),
        ],
    )
    assert weights[1] == [4.0, 8.0, 6.0]
    assert weights[5] == [2.0, 2.0, 5.0]  # absent at step 4: its weight of step 2 is held


def test_every_with_one_weight_gives_it_to_all():
    alone = (False, True, False)
    weights, _ = run(Every(Echo(), 2), [stats([1.0, 8.0, 1.0], 0, alone), stats([1.0] * 3, 1)])
    assert weights[1] == [8.0] * 3


def test_every_with_nobody_present_at_first_is_equal():
    weights, _ = run(Every(Echo(), 4), [stats([1.0] * 3, 0, (False,) * 3), stats([7.0] * 3, 1)])
    assert weights[1] == [1 / 3] * 3


@pytest.mark.parametrize(("total", "expected"), [(None, [0.6, 0.9, 1.5]), (10.0, [2.0, 3.0, 5.0])])
def test_normalize_fixes_the_sum(total, expected):
    (weights,), _ = run(Normalize(Echo(), total), [stats([2e200, 3e200, 5e200])])
    assert weights == pytest.approx(expected)


def test_normalize_of_weights_whose_sum_would_overflow():
    (weights,), _ = run(Normalize(Echo()), [stats([1.7e308, 1.7e308, 1.7e-3])])
    assert weights == pytest.approx([1.5, 1.5, 0.0])


def test_normalize_over_present_tasks_and_keeps_signs():
    weights, _ = run(
        Normalize(Echo()),
        [
            stats([2.0, 8.0, 6.0], 0, (True, False, True)),
            stats([-2.0, 1.0, 1.0], 1),
            stats([0.0, 0.0, 0.0], 2),
        ],
    )
    assert weights == [[0.5, 0.0, 1.5], [-1.5, 0.75, 0.75], [0.0, 0.0, 0.0]]


def test_clamp():
    (weights,), _ = run(Clamp(Echo(), 0.5, 2.0), [stats([0.1, 1.0, 9.0])])
    assert weights == [0.5, 1.0, 2.0]
    (weights,), _ = run(Clamp(Echo()), [stats([-1.0, 1.0, 1e30])])
    assert weights == [0.0, 1.0, 1e30]


def test_warmup_is_equal_then_the_rule_from_its_own_step_zero():
    rule = Warmup(Echo(), 2)
    weights, state = run(rule, [stats([2.0, 3.0, 4.0], step) for step in range(4)])
    assert weights == [[1 / 3] * 3] * 2 + [[2.0, 3.0, 4.0]] * 2
    assert state["rule.steps"].tolist()[:3] == [0, 1, -1]


def test_warmup_measures_nothing_until_it_ends():
    rule = Warmup(Every(InverseGradNorm(), 2), 3)
    assert [rule.needs_at(step) for step in range(7)] == [0, 0, 0, Needs.NORMS, 0, Needs.NORMS, 0]
    rule = Warmup(Every(InverseGradNorm(), 3), 2)
    assert [rule.needs_at(step) for step in range(7)] == [0, 0, Needs.NORMS, 0, 0, Needs.NORMS, 0]


def test_warmup_counts_the_tasks_present():
    (weights,), _ = run(Warmup(Echo(), 2), [stats([2.0, 3.0, 4.0], 0, (True, True, False))])
    assert weights[:2] == [0.5, 0.5]


def test_preference_multiplies_the_weights_not_the_losses():
    preferred = Preference(InverseLoss(), {"normal": 4.0, "depth": 1.0, "segment": 0.0})
    (weights,), _ = run(preferred, [stats([2.0, 5.0, 10.0])])
    assert weights == [0.5, 0.0, 0.4]  # scaled losses would have given [1/2, inf, 1/40]


def test_smooth_is_the_bias_corrected_average():
    weights, _ = run(Smooth(Echo(), 0.5), [stats([float(2**step)] * 3, step) for step in range(3)])
    assert [row[0] for row in weights] == pytest.approx([1, (0.5 + 2) / 1.5, (0.25 + 1 + 4) / 1.75])


def test_relative_gives_its_task_the_weight_one():
    steps = [
        stats([2.0, 8.0, 6.0], 0),
        stats([4.0, 0.0, 6.0], 1),  # weight 0: divided as before
        stats([4.0, 5.0, 6.0], 2, (True, False, True)),  # absent: the same
        stats([4.0, -2.0, 6.0], 3),
    ]
    weights, _ = run(Relative(Echo(), "segment"), steps)
    assert weights[0] == [0.25, 1.0, 0.75]
    assert weights[1] == [0.5, 0.0, 0.75]
    assert weights[2][::2] == [0.5, 0.75]
    assert weights[3] == [2.0, -1.0, 3.0]


@pytest.mark.parametrize(
    ("like", "plain"), [("sum", [1, 1, 1]), ("mean", [1 / 3] * 3), ("tokens", [0.5, 0.3, 0.2])]
)
def test_keep_norm_gives_the_length_of_the_plain_update(like, plain):
    gradients = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients *= torch.tensor([[1e-3], [1.0], [1e3]])
    step = replace(stats([1.0] * 3, gram=gradients @ gradients.T), counts=torch.tensor([5.0, 3.0, 2.0]))
    (inner,), _ = run(InverseGradNorm(), [step])
    (weights,), _ = run(KeepNorm(InverseGradNorm(), like), [step])
    update, wanted = (torch.tensor(w).double() @ gradients for w in (weights, plain))
    assert update.norm().item() == pytest.approx(wanted.norm().item(), rel=1e-6)
    assert weights[0] / inner[0] == pytest.approx(weights[2] / inner[2], rel=1e-12)


def test_keep_norm_leaves_an_update_of_length_zero_as_it_is():
    gram = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 4.0]], dtype=torch.float64)
    (weights,), _ = run(KeepNorm(Echo()), [stats([3.0, 3.0, 0.0], gram=gram)])
    assert weights == [3.0, 3.0, 0.0]


def test_keep_norm_measures_at_the_steps_of_every_around_it():
    rule = Every(KeepNorm(InverseLoss()), 2)
    assert [rule.needs_at(step) for step in range(3)] == [Needs.GRAM, Needs.LOSSES, Needs.GRAM]


def test_combinators_read_what_their_rule_reads():
    for inner in (Equal(), InverseLoss(), InverseGradNorm(), MGDA()):
        for outer in (Every(inner, 2), Normalize(inner), Clamp(inner), Warmup(inner, 1), Smooth(inner)):
            assert outer.needs is inner.needs
            assert outer.positive_losses is inner.positive_losses


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Every(Equal(), 0), "Every: interval must be an integer >= 1, got 0"),
        (lambda: Normalize(Equal(), 0.0), r"Normalize: total must be finite and positive, got 0\.0"),
        (lambda: Clamp(Equal(), 2.0, 1.0), r"Clamp: low must be <= high, got low=2\.0, high=1\.0"),
        (lambda: Clamp(Equal(), math.nan), "Clamp: low must be a number or an infinity, got nan"),
        (lambda: Warmup(Equal(), -1), "Warmup: steps must be an integer >= 0, got -1"),
        (lambda: Preference(Equal(), [-1.0]), r"Preference: weights must be .*non-negative, got \[-1\.0\]"),
        (lambda: Preference(Equal(), {"depth": 1.0}).init(TASKS, CPU), "Preference: weights must give one"),
        (lambda: Relative(Equal(), "dept").init(TASKS, CPU), "Relative: to must be one of .*, got 'dept'"),
        (
            lambda: KeepNorm(Equal(), "max"),
            "KeepNorm: like must be one of .*, got 'max'",
        ),
        (lambda: Smooth(Equal(), 1.0), r"Smooth: decay must be in \[0, 1\), got 1\.0"),
    ],
)
def test_bad_values_are_refused_by_name_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Grouped

VECTORS = torch.tensor([[3.0, 1, 0], [-1, 2, 0.5], [0.5, -1, 2]], dtype=torch.float64)
GROUPS = {"two": ["normal", "depth"], "one": ["segment"]}


def test_grouped_is_one_rule_inside_the_groups_and_one_between():
    step = stats([2.0, 3.0, 5.0], gram=VECTORS @ VECTORS.T)
    weights, _ = run(Grouped(MGDA(), MGDA(), GROUPS), [step])
    pair = VECTORS[[2, 0]]
    (inside,), _ = run_on(MGDA(), ["normal", "depth"], pair)
    groups = torch.stack([inside @ pair, VECTORS[1]])
    (between,), _ = run_on(MGDA(), ["two", "one"], groups)
    expected = torch.stack([between[0] * inside[1], between[1], between[0] * inside[0]])
    torch.testing.assert_close(torch.tensor(weights[0], dtype=torch.float64), expected, rtol=1e-9, atol=0)
    # the loss of a group is that of its weighted tasks
    fixed = Fixed({"depth": 1.0, "segment": 2.0, "normal": 3.0})
    weights, _ = run(Grouped(fixed, InverseLoss(), GROUPS), [step])
    assert weights[0] == pytest.approx([1 / 17, 2 / 6, 3 / 17])


def run_on(rule, tasks, vectors):
    """As `run`, for one step with these gradients."""
    ones = torch.ones(len(tasks), dtype=torch.float64)
    step = TaskStats(ones, ones > 0, vectors @ vectors.T, ones)
    weights, state = rule.update(step, rule.init(tasks, CPU))
    return [weights], state


def test_grouped_without_a_group_is_the_rule_of_the_others():
    step = stats([2.0, 3.0, 5.0], present=(True, False, True))
    weights, _ = run(Grouped(InverseLoss(), Equal(), GROUPS), [step])
    assert weights[0][0] == 0.5
    assert weights[0][2] == 0.2


def test_groups_of_all_or_of_single_tasks_are_the_rule_itself():
    step = stats([2.0, 3.0, 5.0], gram=VECTORS @ VECTORS.T)
    alone = {task: [task] for task in TASKS}
    (expected,), _ = run(MGDA(), [step])
    for rule in (Grouped(MGDA(), Equal(), {"all": TASKS}), Grouped(Equal(), MGDA(), alone)):
        (weights,), _ = run(rule, [step])
        assert weights == pytest.approx(expected, rel=1e-9)


def test_grouped_reads_what_its_rules_read():
    assert Grouped(InverseLoss(), Equal(), GROUPS).needs is Needs.LOSSES
    assert Grouped(InverseGradNorm(), Equal(), GROUPS).needs is Needs.NORMS
    assert Grouped(Equal(), InverseGradNorm(), GROUPS).needs is Needs.GRAM
    warm = Grouped(InverseLoss(), Warmup(MGDA(), 3), GROUPS)
    assert [warm.needs_at(step) for step in (2, 3)] == [Needs.LOSSES, Needs.GRAM]
    assert Grouped(InverseLoss(), Equal(), GROUPS).positive_losses
    assert Grouped(Equal(), InverseLoss(), GROUPS).positive_losses
    assert not Grouped(Equal(), Equal(), GROUPS).compares


def test_a_group_with_a_loss_below_zero_is_not_divided_by():
    """The rule inside may give negative weights: the balancer refuses what follows from NaN."""
    weights, _ = run(Grouped(Signed(), InverseLoss(), {"all": TASKS}), [stats([1.0, 1.0, 1.0])])
    assert all(math.isnan(weight) for weight in weights[0])


@dataclass(frozen=True)
class Signed(Rule):
    """Weights of both signs."""

    def update(self, stats, state):
        return torch.tensor([1.0, -3.0, 1.0], dtype=torch.float64), state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grouped(Equal(), Equal(), {}), "groups must each have tasks of their own, got {}"),
        (lambda: Grouped(Equal(), Equal(), {"a": []}), "groups must each have tasks of their own"),
        (
            lambda: Grouped(Equal(), Equal(), {"a": ["x"], "b": ["x"]}),
            "groups must each have tasks of their own",
        ),
        (lambda: Grouped(Equal(), CoBa(), GROUPS), "between must learn from the step alone"),
        (lambda: run(Grouped(Equal(), Equal(), {"a": ["depth"]}), []), "groups must have each of the tasks"),
    ],
)
def test_wrong_groups_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
