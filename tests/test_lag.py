"""lag=1: the weights of a step follow from the step before it, and everything else stays as it is."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from subjects import SUBJECTS, build
from torch import Tensor, nn

from mtl_dist import Balancer, Engine, FeatureProbe, FeatureTap, ParameterProbe, Rule, SharedLayerProbe
from mtl_dist.balancer import PeerFailed
from mtl_dist.probes import Probe
from mtl_dist.stats import TaskStats
from mtl_dist.virtual import VirtualRanks
from mtl_dist.weighting import (
    MGDA,
    Equal,
    Every,
    Fixed,
    GradNorm,
    InverseGradNorm,
    InverseLoss,
    LastSeen,
    PriorLoss,
    Relative,
    Smooth,
    State,
    TokenShare,
)

TASKS = ("task0", "task1", "task2")
STEPS = 6


@dataclass(frozen=True)
class InTheForward(SharedLayerProbe):
    """The oracle: measures before the backward, also with lag=1."""

    lagged = Probe.lagged


@dataclass(frozen=True)
class FeatureInTheForward(FeatureProbe):
    lagged = Probe.lagged


class Net(nn.Module):
    """Float64, so that two orders of the same sums agree to 1e-12."""

    def __init__(self, rule: Rule, form: str = "mapping", **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.last = nn.Linear(5, 6), nn.Linear(6, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 1) for _ in TASKS])
        self.double()
        self.form = form
        self.balancer = Balancer(TASKS, rule, **settings)

    def loss(self, i: int, z: Tensor, y: Tensor) -> Tensor:
        return (self.heads[i](z.tanh())[:, 0] - y[:, i]).square().mean() + 0.1

    def forward(self, x: Tensor, y: Tensor, ids: Tensor, counts: dict[str, int] | None = None) -> Tensor:
        h = self.trunk(x).tanh()
        layered = isinstance(self.balancer.probe, SharedLayerProbe)
        given, layer = (h, {"layer": self.last}) if layered else (self.last(h), {})
        if self.form == "losses":
            z = self.last(h)
            losses = {task: self.loss(i, z, y) for i, task in enumerate(TASKS)}
            return self.balancer(losses, counts=counts)
        if self.form == "mixture":
            return self.balancer(given, lambda z: self.by_sample(z, y, ids), task_ids=ids, **layer)
        if self.form == "joint":
            heads: Any = lambda z: {task: self.loss(i, z, y) for i, task in enumerate(TASKS)}  # noqa: E731
        else:
            heads = {task: (lambda z, i=i: self.loss(i, z, y)) for i, task in enumerate(TASKS)}
            if counts is not None:
                heads = {task: head for task, head in heads.items() if counts[task]}
        return self.balancer(given, heads, counts=counts, **layer)

    def by_sample(self, z: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        out = torch.stack([head(z.tanh())[:, 0] for head in self.heads], 1)
        return (out - y).square().gather(1, ids[:, None])[:, 0] + 0.1


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    return x, y, torch.randint(0, 3, (size,), generator=generator)


def train(
    net: Net, steps: int = STEPS, first: int = 0, *, reads: bool = True, heads: bool = True
) -> list[dict[str, Any]]:
    trained = net.parameters() if heads else [*net.trunk.parameters(), *net.last.parameters()]
    optimizer = torch.optim.SGD(trained, 0.02)
    rows = []
    for step in range(first, first + steps):
        net.zero_grad()
        loss = net(*batch(step))
        loss.backward()
        optimizer.step()
        report = net.balancer.report if reads else None
        if report is not None:
            rows.append({"loss": loss.item(), "weights": report.weight_vector, "gram": report.stats.gram})
    return rows


def parameters(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def assert_same_rows(got: list[dict[str, Any]], expected: list[dict[str, Any]], **close: float) -> None:
    for a, b in zip(got, expected, strict=True):
        for key, value in b.items():
            torch.testing.assert_close(a[key], value, **{"rtol": 1e-9, "atol": 1e-12, **close})


# ---- what it means ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Fixed([3.0, 1.0, 0.5]), Equal(), PriorLoss([3.0, 1.0, 0.5])], ids=repr)
def test_weights_that_follow_from_no_batch_are_the_same_with_a_lag(rule: Rule) -> None:
    """From the first step on."""
    nets = Net(rule), Net(rule, lag=1)
    rows = [[row["loss"] for row in train(net)] for net in nets]
    assert rows[0] == pytest.approx(rows[1], rel=1e-9)
    torch.testing.assert_close(*map(parameters, nets), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("later", [{"lag": 1}, {"window": 2}])
@pytest.mark.parametrize("rule", [TokenShare(), Relative(TokenShare(), to="task0")], ids=repr)
def test_a_rule_about_its_own_batch_is_refused(rule: Rule, later: dict[str, int]) -> None:
    """Counts of the batch before are not the token mean of this one."""
    with pytest.raises(ValueError, match=r"counts of its own batch, and with (lag=1|window=2)"):
        Balancer(TASKS, rule, **later)


@pytest.mark.parametrize("keeps", [lambda rule: Every(rule, 2), lambda rule: Smooth(rule, 0.9), LastSeen])
def test_a_combinator_that_uses_earlier_batches_refuses_it_too(keeps: Callable[[Rule], Rule]) -> None:
    with pytest.raises(ValueError, match=r"TokenShare\(\) weighs by the counts of its own batch"):
        keeps(TokenShare())


def test_a_rule_that_refuses_made_up_losses_can_be_used() -> None:
    """It is asked for its weights before the first batch; what it says then is not the user's."""

    @dataclass(frozen=True)
    class Picky(Rule):
        def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
            if not (stats.losses > 10).all():
                raise ValueError("losses are > 10 here")
            return torch.full_like(stats.losses, 2.0), state

    weights = Balancer(TASKS, Picky(), lag=1).state_dict()["weights"]
    assert torch.equal(weights, torch.full((3,), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("name", [name for name in SUBJECTS if not build(name, TASKS).own_batch])
def test_every_rule_uses_the_statistics_of_the_step_before(name: str) -> None:
    """Its weights are those that the rule gives for the reported statistics, one step later."""
    rule = build(name, TASKS)
    net = Net(rule, lag=1)
    state, weights = rule.init(TASKS, torch.device("cpu")), net.balancer.state_dict()["weights"].clone()
    rows = train(net)
    before = copy.deepcopy(net.balancer)
    assert before.step == STEPS
    replayed = Net(rule, lag=1)
    optimizer = torch.optim.SGD(replayed.parameters(), 0.02)
    for step, row in enumerate(rows):
        torch.testing.assert_close(row["weights"], weights, rtol=1e-9, atol=1e-12)
        optimizer.zero_grad()
        replayed(*batch(step)).backward()
        optimizer.step()
        weights, state = rule.update(replayed.balancer.report.stats, state)


@pytest.mark.parametrize(
    "rule", [InverseGradNorm(), MGDA(), GradNorm(), InverseLoss(), Every(MGDA(), 3)], ids=repr
)
@pytest.mark.parametrize("form", ["mapping", "mixture", "joint", "losses"])
@pytest.mark.parametrize(
    ("probe", "oracle"),
    [(FeatureProbe(), FeatureInTheForward()), (SharedLayerProbe(), InTheForward()),
     (SharedLayerProbe(form="kernel"), InTheForward(form="kernel")),
     (SharedLayerProbe(sketch=8), InTheForward(sketch=8))],
    ids=["features", "layer", "kernel", "sketch"],
)  # fmt: skip
def test_measuring_in_the_backward_equals_measuring_before_it(
    rule: Rule, form: str, probe: Probe, oracle: Probe
) -> None:
    if form == "losses" and rule.needs:
        rule = InverseLoss()
    net, expected = Net(rule, form, probe=probe, lag=1), Net(rule, form, probe=oracle, lag=1)
    # the heads of tasks with a weight near zero learn a little more, see below
    heads = not isinstance(rule, (MGDA, Every))
    assert_same_rows(train(net, heads=heads), train(expected, heads=heads))
    torch.testing.assert_close(parameters(net), parameters(expected), rtol=1e-9, atol=1e-12)


def test_a_window_has_its_weights_from_the_window_before_with_and_without_lag() -> None:
    for rule in (MGDA(), InverseLoss()):
        nets = [Net(rule, window=2), Net(rule, window=2, lag=1)]
        rows = [train(net, 7, heads=False) for net in nets]
        assert len(rows[0]) == len(rows[1]) == 6  # the first report stands at the end of the first window
        assert_same_rows(*rows)
        assert nets[0].balancer.step == nets[1].balancer.step == 3


def test_weights_that_are_known_before_the_first_step_are_equal() -> None:
    net = Net(MGDA(), lag=1)
    assert torch.equal(train(net, 1)[0]["weights"], torch.full((3,), 1 / 3, dtype=torch.float64))


# ---- weights near zero --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mapping", "mixture"])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_a_zero_weight_hides_no_gradient_and_the_trunk_receives_none(form: str, scale: float) -> None:
    wanted = torch.tensor([0.0, 2.0, 1e-5], dtype=torch.float64) * scale
    fixed = Fixed(dict(zip(TASKS, wanted.tolist(), strict=True)))
    net, plain = Net(fixed, form, probe=FeatureProbe(), lag=1), Net(fixed, form, probe=FeatureProbe())
    for step in range(2):  # the first step has equal weights
        for one in (net, plain):
            one.zero_grad()
            loss = one(*batch(step))
            loss.backward()
    torch.testing.assert_close(
        net.balancer.report.stats.gram, plain.balancer.report.stats.gram, rtol=1e-9, atol=0
    )
    for a, b in zip(net.trunk.parameters(), plain.trunk.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12 * scale)
    heads = [[head.weight.grad for head in one.heads] for one in (net, plain)]
    torch.testing.assert_close(heads[0][1], heads[1][1], rtol=1e-12, atol=0)
    # at least 2^-10 of the largest weight
    torch.testing.assert_close(heads[0][2], heads[1][2] * (2.0**-10 * 2 / 1e-5), rtol=1e-9, atol=0)
    assert heads[1][0].abs().max() == 0
    assert heads[0][0].abs().max() > 0


def test_all_weights_zero() -> None:
    net = Net(Fixed(dict.fromkeys(TASKS, 0.0)), probe=FeatureProbe(), lag=1)
    rows = train(net, 3)
    assert rows[2]["loss"] == 0
    assert (rows[2]["gram"].diagonal() > 0).all()


def test_with_the_tap_heads_keep_their_own_gradient() -> None:
    net, tap = Net(InverseGradNorm(), lag=1), Net(InverseGradNorm(), probe=FeatureTap(), lag=1)
    for step in range(2):
        for one in (net, tap):
            one.zero_grad()
            one(*batch(step)).backward()
    weights = net.balancer.report.weight_vector
    torch.testing.assert_close(tap.balancer.report.weight_vector, weights, rtol=1e-9, atol=0)
    torch.testing.assert_close(tap.trunk.weight.grad, net.trunk.weight.grad, rtol=1e-9, atol=1e-12)
    for weight, own, weighted in zip(weights, tap.heads, net.heads, strict=True):
        torch.testing.assert_close(own.weight.grad * weight, weighted.weight.grad, rtol=1e-9, atol=1e-12)


# ---- one backward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [FeatureProbe(), FeatureTap(), SharedLayerProbe()], ids=repr)
def test_the_heads_run_once_forward_and_once_backward(probe: Probe) -> None:
    net = Net(MGDA(), probe=probe, lag=1)
    forwards, backwards = [], []
    net.heads[0].register_forward_hook(lambda *_: forwards.append(1))
    net.heads[0].register_full_backward_hook(lambda *_: backwards.append(1))
    train(net, 3)
    assert len(forwards) == len(backwards) == 3


def test_loss_scale_and_accumulation_are_divided_out() -> None:
    net, scaled = Net(MGDA(), lag=1), Net(MGDA(), lag=1)
    net(*batch(0)).backward()
    (scaled(*batch(0)) * 1024 / 4).backward()
    torch.testing.assert_close(
        net.balancer.report.stats.gram, scaled.balancer.report.stats.gram, rtol=1e-12, atol=0
    )


def test_a_second_backward_through_one_step_is_refused() -> None:
    loss = Net(MGDA(), lag=1)(*batch(0))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward through the same step"):
        loss.backward()


def test_heads_that_share_a_result_are_refused() -> None:
    memo: list[Tensor] = []

    def first(z: Tensor) -> Tensor:
        memo.append(z.exp())
        return memo[0].mean()

    z = torch.ones(3, requires_grad=True) * 1
    balancer = Balancer(["a", "b"], MGDA(), lag=1)
    with pytest.raises(ValueError, match="'b' depends on what the head of task 'a' computed"):
        balancer(z, {"a": first, "b": lambda z: memo[0].square().mean()})
    joint = Balancer(["a", "b"], MGDA(), lag=1)
    joint(z, lambda z: {"a": z.exp().mean(), "b": z.exp().square().mean()}).backward()
    assert joint.report.stats.gram[0, 1] > 0


def test_a_head_that_changes_the_features_is_refused_in_a_step_without_a_measurement_too() -> None:
    z = torch.ones(3, requires_grad=True) * 1
    heads = {"a": lambda z: z.relu_().sum(), "b": lambda z: z.square().sum()}
    balancer = Balancer(["a", "b"], InverseLoss(), lag=1)
    with pytest.raises(ValueError, match="changed the features in place"):
        balancer(z, heads)


# ---- calls and backwards that do not come in turns --------------------------------------------------------


def test_two_calls_before_one_backward_are_two_steps_in_their_order() -> None:
    net, expected = Net(GradNorm(), lag=1), Net(GradNorm())
    (net(*batch(0)) + net(*batch(1))).backward()
    assert net.balancer.step == 2
    for step in range(2):
        expected(*batch(step))  # the same statistics: the parameters do not change in between
    torch.testing.assert_close(net.balancer.state_dict()["rule.w"], expected.balancer.state_dict()["rule.w"])


@pytest.mark.parametrize("rule", [MGDA(), GradNorm(), Every(MGDA(), 2)], ids=repr)
def test_a_call_without_a_backward_is_no_step(rule: Rule) -> None:
    net, expected = Net(rule, lag=1), Net(rule, lag=1)
    for one in (net, expected):
        train(one, 2)
    net(*batch(9))  # as an evaluation in training mode does
    rows = [train(one, 4, 2) for one in (net, expected)]
    if not isinstance(rule, Every):  # whose next measurement was asked of the call that was no step
        assert_same_rows(*rows)
    assert net.balancer.step <= expected.balancer.step == 6
    assert net.balancer.step >= 4


# ---- faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [MGDA(), InverseLoss()], ids=repr)
def test_a_nan_raises_at_the_next_call_or_where_it_is_read(rule: Rule) -> None:
    for read in (
        lambda net: net(*batch(1)),
        lambda net: net.balancer.report.weights,
        lambda net: net.balancer.state_dict(),
    ):
        net = Net(rule, lag=1)
        x, y, ids = batch(0)
        y[:, 1] = torch.nan
        net(x, y, ids).backward()
        with pytest.raises(ValueError, match="NaN or infinite: task 'task1' on rank 0") as refused:
            read(net)
        assert str(refused.value).endswith('give on_nonfinite="hold"')  # with a lag, no step can be skipped


@pytest.mark.parametrize("rule", [MGDA(), InverseLoss(), GradNorm()], ids=repr)
def test_hold_keeps_weights_and_state(rule: Rule) -> None:
    net = Net(rule, lag=1, on_nonfinite="hold")
    train(net, 3)
    before = net.balancer.state_dict()
    x, y, ids = batch(3)
    y[:, 1] = torch.nan
    net(x, y, ids).backward()
    after = net.balancer.state_dict()
    assert bool(net.balancer.report.held)
    for key, value in before.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, after[key])


@pytest.mark.parametrize("form", ["mapping", "losses"])
def test_a_step_that_the_engine_skips_is_forgotten(form: str) -> None:
    rule = MGDA() if form == "mapping" else InverseLoss()
    skipped = [False]
    net = Net(rule, form, lag=1)
    net.balancer.set_engine(Engine(skipped=lambda: skipped[0]))
    train(net, 3)
    before = net.balancer.state_dict()
    net(*batch(3)).backward()
    skipped[0] = True
    after = net.balancer.state_dict()
    assert after["step"] == before["step"] == 3
    assert torch.equal(after["weights"], before["weights"])
    skipped[0] = False
    train(net, 2, 4)
    assert net.balancer.step == 5


def test_the_factor_zero_is_told_apart_from_a_nan() -> None:
    net = Net(MGDA(), lag=1)
    (0 * net(*batch(0))).backward()
    with pytest.raises(ValueError, match="differentiated with the factor 0"):
        net(*batch(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lag": 2}, "lag must be 0 or 1"),
        ({"lag": True}, "lag must be 0 or 1"),
        ({"lag": 1, "on_nonfinite": "skip"}, "cannot undo it"),
        ({"counts": "equal"}, "give lag=1"),
        ({"lag": 1, "counts": "same"}, 'counts must be "given" or "equal"'),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Balancer(TASKS, MGDA(), **settings)


# ---- state --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mapping", "mixture", "losses"])
@pytest.mark.parametrize("rule", [GradNorm(), InverseLoss()], ids=repr)
@pytest.mark.parametrize("window", [None, 2])
def test_a_run_resumes_bitwise_between_the_measurement_and_its_use(
    form: str, rule: Rule, window: int | None
) -> None:
    if form == "losses":
        rule = InverseLoss()
    settings: dict[str, Any] = {"lag": 1, "window": window}
    whole, part = Net(rule, form, **settings), Net(rule, form, **settings)
    train(whole, 7, reads=False)
    train(part, 3, reads=False)
    resumed = Net(rule, form, **settings)
    resumed.load_state_dict(part.state_dict())
    resumed.balancer.load_state_dict(part.balancer.state_dict())
    train(resumed, 4, 3, reads=False)
    assert torch.equal(parameters(resumed), parameters(whole))
    ours, theirs = resumed.balancer.state_dict(), whole.balancer.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items() if isinstance(value, Tensor))


def test_loading_forgets_what_is_on_its_way() -> None:
    net = Net(GradNorm(), lag=1)
    train(net, 2)
    saved = net.balancer.state_dict()
    net(*batch(5)).backward()
    net.balancer.load_state_dict(saved)
    assert net.balancer.step == 2
    assert torch.equal(net.balancer.state_dict()["rule.w"], saved["rule.w"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_goes_on_as_the_original_between_the_measurement_and_its_use(copied: Callable) -> None:
    net = Net(GradNorm(), lag=1)
    train(net, 2, reads=False)
    net(*batch(5)).backward()
    other = copied(net)
    ours, theirs = net.balancer.state_dict(), other.balancer.state_dict()
    assert ours["step"] == theirs["step"] == 3
    assert all(torch.equal(ours[key], value) for key, value in theirs.items() if isinstance(value, Tensor))


def test_a_call_without_its_backward_stays_with_the_original() -> None:
    net = Net(GradNorm(), lag=1)
    loss = net(*batch(0))
    other = copy.deepcopy(net)
    loss.backward()
    assert (net.balancer.step, other.balancer.step) == (1, 0)


def test_a_report_waits_where_it_is_read() -> None:
    net = Net(MGDA(), lag=1)
    collectives = Counting()
    net.balancer._synchronizer.use(collectives)
    reports = []
    for step in range(3):
        net(*batch(step)).backward()
        reports.append(net.balancer.report)
        assert net.balancer.report is reports[-1]
        assert [report.step for report in reports] == list(range(step + 1))
        assert collectives.events[-1] == "begin"  # the statistics of this step
    net(*batch(3))
    assert net.balancer.report is reports[-1]  # no statistics of the new step yet
    assert [report.weights for report in reports] != [reports[0].weights] * 3
    assert copy.deepcopy(reports[-1]).losses == reports[-1].losses


def test_a_report_that_never_arrives_says_so() -> None:
    net = Net(MGDA(), lag=1)
    saved = net.balancer.state_dict()
    net(*batch(0)).backward()
    report = net.balancer.report
    net.balancer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="the statistics of step 0 did not arrive"):
        report.weights  # noqa: B018


def test_inside_a_window_the_report_is_that_of_the_window_before() -> None:
    net = Net(MGDA(), lag=1, window=2)
    seen = []
    for step in range(5):
        net(*batch(step)).backward()
        seen.append(None if net.balancer.report is None else net.balancer.report.step)
    assert seen == [None, 0, 0, 1, 1]


def test_held_calls_keep_the_weights() -> None:
    net = Net(InverseGradNorm(), lag=1)
    train(net, 2)
    with net.balancer.held():
        net(*batch(7)).backward()
    weights = dict(net.balancer.weights)
    assert net.balancer.step == 2
    net(*batch(8)).backward()
    assert net.balancer.report.weights == pytest.approx(weights)


def test_check_finds_the_same_gram() -> None:
    net = Net(MGDA(), lag=1, check=True)
    train(net, 4)
    assert not [f for f in net.balancer.findings if f.kind not in ("vertex", "sensitive")]


def test_evaluation_uses_what_the_next_step_will() -> None:
    net = Net(InverseGradNorm(), lag=1)
    train(net, 2, reads=False)
    net.eval()
    value = net(*batch(9)).item()
    net.train()
    with net.balancer.held():
        assert net(*batch(9)).item() == pytest.approx(value, rel=1e-12)


# ---- ranks --------------------------------------------------------------------------------------------

RAGGED = [{"task0": 3, "task1": 5, "task2": 8}, {"task0": 4, "task1": 0, "task2": 1}]


def on_ranks(net: Net, ranks: VirtualRanks, work: Callable[[int], Tensor], number: int = 2) -> float:
    def backward(rank: int) -> Tensor:
        loss = work(rank)
        (loss / number).backward()
        return loss

    return ranks.run(backward).item()


@pytest.mark.parametrize("counts", ["given", "equal"])
@pytest.mark.parametrize("form", ["mapping", "mixture", "joint", "losses"])
@pytest.mark.parametrize(
    "probe",
    [FeatureProbe(), FeatureTap(), SharedLayerProbe(), SharedLayerProbe(form="kernel"), ParameterProbe()],
    ids=repr,
)
def test_two_ranks_equal_one(counts: str, form: str, probe: Probe) -> None:
    if (form == "joint" and isinstance(probe, FeatureTap)) or (form == "mixture" and counts == "equal"):
        return  # refused, or not equal
    rule = InverseLoss() if form == "losses" else InverseGradNorm()
    one, two = Net(rule, form, probe=probe, lag=1), Net(rule, form, probe=probe, lag=1, counts=counts)
    ranks = VirtualRanks(2, two.balancer, two)
    optimizers = [torch.optim.SGD(net.parameters(), 0.02) for net in (one, two)]
    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        one(*batch(step)).backward()
        shards = ranks.split(batch(step))
        on_ranks(two, ranks, lambda rank, shards=shards: two(*shards[rank]))
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
        first, second = one.balancer.report, two.balancer.report
        torch.testing.assert_close(first.weight_vector, second.weight_vector, rtol=1e-9, atol=1e-12)
        if first.stats.gram is not None:
            torch.testing.assert_close(first.stats.gram, second.stats.gram, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("probe", [FeatureProbe(), SharedLayerProbe()], ids=repr)
def test_ragged_counts_and_absent_tasks(probe: Probe) -> None:
    """Losses are means over the first c_i rows; one process has the rows of both ranks."""
    net = Net(InverseGradNorm(), probe=probe, lag=1)
    whole = Net(InverseGradNorm(), probe=probe, lag=1)
    ranks = VirtualRanks(2, net.balancer, net)

    def loss(one: Net, shards: list[tuple[Tensor, Tensor]], counts: list[dict[str, int]]) -> Tensor:
        rows = {t: [(x[: c[t]], y[: c[t]]) for (x, y), c in zip(shards, counts, strict=True)] for t in TASKS}
        xs = torch.cat([x for x, _ in shards])
        h = one.trunk(xs).tanh()
        layered = isinstance(one.balancer.probe, SharedLayerProbe)
        given, layer = (h, {"layer": one.last}) if layered else (one.last(h), {})
        starts = [0, len(shards[0][0])]

        def head(i: int, z: Tensor) -> Tensor | None:
            parts = [z[start : start + c[TASKS[i]]] for start, c in zip(starts, counts, strict=False)]
            y = torch.cat([y for _, y in rows[TASKS[i]]])
            own = torch.cat(parts)
            return one.loss(i, own, y) if len(own) else None

        heads = {task: (lambda z, i=i: head(i, z)) for i, task in enumerate(TASKS)}
        total = {task: sum(c[task] for c in counts) for task in TASKS}
        return one.balancer(given, heads, counts=total, **layer)

    for step in range(3):
        parts = [batch(2 * step, 8)[:2], batch(2 * step + 1, 5)[:2]]
        for one in (net, whole):
            one.zero_grad()
        loss(whole, parts, RAGGED).backward()
        on_ranks(net, ranks, lambda rank, parts=parts: loss(net, [parts[rank]], [RAGGED[rank]]))
        for a, b in zip(net.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            net.balancer.report.stats.gram, whole.balancer.report.stats.gram, rtol=1e-9, atol=1e-12
        )


def test_a_broken_promise_of_equal_counts_is_an_error_on_every_rank() -> None:
    net = Net(InverseLoss(), "losses", lag=1, counts="equal")
    ranks = VirtualRanks(2, net.balancer, net)
    counts = [dict.fromkeys(TASKS, 4), {**dict.fromkeys(TASKS, 4), "task1": 3}]
    on_ranks(net, ranks, lambda rank: net(*batch(rank), counts[0]))
    with pytest.raises(ValueError, match=r'counts="equal" promises .* differ for task \[\'task1\'\]'):
        on_ranks(net, ranks, lambda rank: net(*batch(rank), counts[rank]))


@pytest.mark.parametrize("counts", ["given", "equal"])
def test_a_rank_that_fails_tells_the_others(counts: str) -> None:
    net = Net(MGDA(), lag=1, counts=counts)
    ranks = VirtualRanks(2, net.balancer, net)
    seen: list[type[Exception]] = []

    def work(rank: int) -> Tensor:
        try:
            x, y, ids = batch(rank)
            loss = net(x, y[:, :2] if rank else y, ids)
            loss.backward()
            assert net.balancer.report.weights
        except Exception as error:
            seen.append(type(error))
            raise
        return loss

    with pytest.raises(IndexError):
        ranks.run(work)
    assert set(seen) == {IndexError, PeerFailed}


def test_a_nan_names_its_rank() -> None:
    net = Net(MGDA(), lag=1)
    ranks = VirtualRanks(2, net.balancer, net)

    def work(rank: int) -> Tensor:
        x, y, ids = batch(rank)
        if rank:
            y[:, 2] = torch.nan
        return net(x, y, ids)

    with pytest.raises(ValueError, match="task 'task2' on rank 1"):
        on_ranks(net, ranks, work)


class Counting:
    """Collectives of two ranks that hold the same, which note when they are begun and waited for."""

    rank, world_size = 0, 2

    def __init__(self) -> None:
        self.events: list[str] = []

    def start_all_reduce(self, buffer: Tensor) -> Callable[[], None]:
        self.events.append("begin")
        buffer.mul_(2)
        return lambda: self.events.append("wait")

    def gather_text(self, text: str) -> list[str | None]:
        return [text, text]

    def all_reduce_and_leave(self, buffer: Tensor) -> None:
        self.events.append("leave")


@pytest.mark.parametrize("form", ["mapping", "losses", "mixture"])
def test_with_equal_counts_a_step_waits_for_nothing(form: str) -> None:
    net = Net(InverseLoss() if form == "losses" else MGDA(), form, lag=1, counts="equal")
    collectives = Counting()
    net.balancer._synchronizer.use(collectives)
    loss = net(*batch(0))
    assert collectives.events == (["begin"] if form == "losses" else [])
    loss.backward()
    assert collectives.events == ["begin"]
    net(*batch(1))
    assert collectives.events[:2] == ["begin", "wait"]


def test_with_given_counts_only_they_are_awaited_in_a_step() -> None:
    net = Net(MGDA(), lag=1)
    collectives = Counting()
    net.balancer._synchronizer.use(collectives)
    net(*batch(0)).backward()
    assert collectives.events == ["begin", "wait", "begin"]


# ---- counts that are told ahead ---------------------------------------------------------------------------


def test_counts_that_are_told_ahead_are_on_their_way_beside_the_trunk() -> None:
    net = Net(MGDA(), lag=1)
    collectives = Counting()
    net.balancer._synchronizer.use(collectives)
    net.balancer.expect(dict.fromkeys(TASKS, 1))
    assert collectives.events == ["begin"]
    net(*batch(0)).backward()
    assert collectives.events == ["begin", "wait", "begin"]


def test_told_counts_give_the_same_steps() -> None:
    nets = [Net(InverseGradNorm(), lag=1) for _ in range(3)]  # never told, told once, told again
    gradients = []
    for number, net in enumerate(nets):
        ranks = VirtualRanks(2, net.balancer, net)

        def work(rank: int, net: Net = net, told: int = number) -> Tensor:
            if told == 2:  # for a step that failed before its call
                net.balancer.expect({"task1": 1 + rank})
            if told:
                net.balancer.expect(RAGGED[rank])
            return net(*batch(rank), RAGGED[rank])

        for _ in range(2):
            net.zero_grad()
            on_ranks(net, ranks, work)
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


def test_other_counts_than_told_are_an_error() -> None:
    net = Net(MGDA(), lag=1)
    collectives = Counting()
    net.balancer._synchronizer.use(collectives)
    net.balancer.expect({"task0": 3, "task1": 1})
    with pytest.raises(ValueError, match=r"told other counts .* 'task0': 3 and then 1, 'task2': 0 and"):
        net(*batch(0))
    assert collectives.events == ["begin", "leave"]
    alone = Net(MGDA(), lag=1)
    alone.balancer.expect({"task0": 3, "task1": 1})
    with pytest.raises(ValueError, match="told other counts"):
        alone(*batch(0))


def test_expect_is_refused_where_no_count_is_awaited() -> None:
    for settings in ({}, {"lag": 1, "counts": "equal"}):
        with pytest.raises(ValueError, match="waits for counts alone"):
            Net(MGDA(), **settings).balancer.expect({"task0": 1})
    with pytest.raises(ValueError, match="unknown task"):
        Net(MGDA(), lag=1).balancer.expect({"tusk": 1})


def test_all_ranks_hear_a_notice_after_the_same_step_whoever_reads_reports() -> None:
    net = Net(MGDA(), lag=1, counts="equal")
    ranks = VirtualRanks(2, net.balancer, net)
    balancers = [net.balancer, *net.balancer._twins]
    for balancer in balancers:
        balancer.notice.listening = True
    balancers[1].notice.raised = True
    heard: list[list[bool]] = [[], []]

    def work(rank: int) -> Tensor:
        loss = net(*batch(rank))
        loss.backward()
        if rank == 0:
            assert net.balancer.report.weights
        heard[rank].append(balancers[rank].notice.heard)
        return loss

    for _ in range(3):
        ranks.run(work)
    assert heard == [[False, True, True]] * 2
