"""One forward is not one optimizer step: held weights, skipped steps, windows, recomputation, order."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtl_dist import Balancer, Engine, FeatureProbe, FeatureTap, Rule
from mtl_dist.probes import Probe
from mtl_dist.virtual import VirtualRanks
from mtl_dist.weighting import (
    FAMO,
    MGDA,
    Fixed,
    GradNorm,
    InverseGradNorm,
    InverseLoss,
    ReLoBRaLo,
    Smooth,
    Uncertainty,
)
from tests.faults.small import assert_same, bad_batch, batch, gradients, net

# recomputation


@pytest.mark.parametrize("rule", [MGDA(), GradNorm(), Uncertainty(lr=0.3)], ids=repr)
def test_a_call_that_the_backward_would_run_again_is_refused(rule: Rule) -> None:
    model = net(rule)
    with pytest.raises(RuntimeError, match="call the balancer outside"):
        checkpoint(model, batch().requires_grad_(), use_reentrant=False)
    assert model.balancer.step == 0
    model(batch()).backward()
    assert model.balancer.step == 1


def test_a_rank_that_is_refused_so_tells_the_others() -> None:
    model = net(GradNorm())
    ranks = VirtualRanks(2, model.balancer, model)
    heard: list[str] = []

    def work(rank: int) -> Tensor:
        try:
            if rank == 0:
                return checkpoint(model, batch().requires_grad_(), use_reentrant=False)
            return model(batch())
        except RuntimeError as error:
            heard.append(str(error))
            raise

    with pytest.raises(RuntimeError, match="call the balancer outside"):
        ranks.run(work)
    assert any("rank 0 failed before it had its statistics" in text for text in heard), heard


@pytest.mark.parametrize("probe", [FeatureProbe(), FeatureTap()], ids=repr)
def test_checkpointed_trunk_and_heads_are_right(probe: Probe) -> None:
    plain, saved = net(MGDA(), probe=probe), net(MGDA(), probe=probe)
    plain(batch()).backward()
    z = checkpoint(lambda x: saved.trunk(x).tanh(), batch(), use_reentrant=False)
    heads = {
        "a": lambda z: checkpoint(saved.heads["a"], z, use_reentrant=False).square().mean(),
        "b": lambda z: (checkpoint(saved.heads["b"], z, use_reentrant=False) - 1).square().mean(),
    }
    saved.balancer(z, heads).backward()
    assert saved.balancer.weights == pytest.approx(plain.balancer.weights, rel=1e-6)
    assert_same(gradients(saved), gradients(plain))


def test_a_reentrant_checkpoint_around_the_call_takes_one_step_each() -> None:
    model, plain = net(GradNorm()), net(GradNorm())
    for _ in range(3):
        checkpoint(model, batch().requires_grad_(), use_reentrant=True).backward()
        plain(batch()).backward()
    assert model.balancer.step == 3
    assert model.balancer.weights == pytest.approx(plain.balancer.weights, rel=1e-6)


# closures

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)).double()


def line_search(rule: Rule, *, held: bool) -> tuple[float, int]:
    """The larger of two losses after ten steps of L-BFGS, and the balancer's steps."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 16), nn.Tanh()).double()
    heads = nn.ModuleDict({task: nn.Linear(16, 1) for task in "ab"}).double()
    targets = {"a": X[:, 0] * X[:, 1], "b": X[:, 2].sin()}
    scales = {"a": 1.0, "b": 100.0}
    balancer = Balancer(["a", "b"], rule)
    optimizer = torch.optim.LBFGS(
        [*trunk.parameters(), *heads.parameters()], line_search_fn="strong_wolfe", max_iter=20
    )

    def loss(task: str, z: Tensor) -> Tensor:
        return (heads[task](z).squeeze(-1) - targets[task]).square().mean()

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = balancer(trunk(X), {t: lambda z, t=t: scales[t] * loss(t, z) for t in "ab"})
        total.backward()
        return total

    for _ in range(10):
        if held:
            with balancer.held(updates=1):
                optimizer.step(closure)
        else:
            optimizer.step(closure)
    with torch.no_grad():
        return max(loss(task, trunk(X)).item() for task in "ab"), balancer.step


@pytest.mark.parametrize("rule", [InverseGradNorm(), ReLoBRaLo()], ids=repr)
def test_a_line_search_minimises_one_function_where_weights_are_held(rule: Rule) -> None:
    value, steps = line_search(rule, held=True)
    assert steps == 10
    assert value < 0.05
    value, steps = line_search(InverseGradNorm(), held=False)
    assert steps > 10, "the test cannot fail"


@pytest.mark.parametrize("probe", [FeatureProbe(), FeatureTap()], ids=repr)
def test_held_calls_use_the_weights_of_now_and_change_nothing(probe: Probe) -> None:
    model = net(GradNorm(), probe=probe)
    for seed in range(3):
        model(batch(seed)).backward()
    gradients(model)
    state, weights = model.balancer.state_dict(), model.balancer.weights
    with model.balancer.held():
        total = model(batch(7))
        total.backward()
    got = gradients(model)
    for key, value in model.balancer.state_dict().items():
        assert torch.equal(value, state[key]) if isinstance(value, Tensor) else value == state[key], key
    losses = model.losses(model.trunk(batch(7)).tanh())
    sum(weights[task] * loss for task, loss in losses.items()).backward()
    for name, expected in gradients(model).items():
        if name.startswith("trunk") or isinstance(probe, FeatureProbe):
            torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-7)
    model(batch(8)).backward()
    assert model.balancer.step == 4


def test_held_is_checked_and_can_be_nested() -> None:
    model = net(GradNorm())
    with pytest.raises(ValueError, match="updates must be a number of calls >= 0, got -1"):
        model.balancer.held(updates=-1).__enter__()
    with model.balancer.held(updates=2):
        model(batch())
        with model.balancer.held():
            model(batch())
        model(batch())
        model(batch())
    assert model.balancer.step == 2


# steps that the engine skips


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_skipped_optimizer_step_is_forgotten_whole(calls: int) -> None:
    def run(skip_at: int | None, leave_out: int | None) -> tuple[int, dict[str, float]]:
        skipped = [False]
        model = net(Smooth(Uncertainty(lr=0.1), 0.9))
        model.balancer.set_engine(Engine(skipped=lambda: skipped[0], closes_window=lambda: True))
        for step in range(4):
            inputs = [batch(10 * step + call) for call in range(calls)]
            if step != leave_out:
                sum(model(x) for x in inputs).backward()
                skipped[0] = step == skip_at
        model.balancer.state_dict()
        return model.balancer.step, model.balancer.weights

    for skip_at in (0, 1, 3):
        assert run(skip_at, None) == run(None, skip_at)


def test_a_skip_is_not_counted_twice() -> None:
    """`skipped` still tells of the step before while the next one's calls run."""
    model, skipped = net(GradNorm()), [False]
    model.balancer.set_engine(Engine(skipped=lambda: skipped[0], closes_window=lambda: True))
    model(batch(0)).backward()
    skipped[0] = True
    total = model(batch(1)) + model(batch(2))
    assert model.balancer.state_dict()["step"] == 2
    total.backward()
    skipped[0] = False
    assert model.balancer.state_dict()["step"] == 2


# windows


@pytest.mark.parametrize("rule", [GradNorm(lr=0.5), FAMO(lr=0.5), InverseGradNorm()], ids=repr)
def test_a_run_resumes_inside_a_window(rule: Rule) -> None:
    def run(save_at: int | None) -> list[dict[str, float]]:
        model, weights = net(rule, window=3), []
        for call in range(9):
            if call == save_at:
                other = net(rule, window=3)
                other.load_state_dict(model.state_dict())
                other.balancer.load_state_dict(copy.deepcopy(model.balancer.state_dict()))
                model = other
            model(batch(call) * (call + 1)).backward()
            weights.append(model.balancer.weights)
        return weights

    whole = run(None)
    assert len({tuple(w.values()) for w in whole}) > 2, "the weights never changed"
    for save_at in (1, 3, 4, 5):
        assert run(save_at) == whole


def test_a_failed_call_does_not_shift_the_window() -> None:
    model, plain = net(GradNorm(), window=2), net(GradNorm(), window=2)
    inputs: Sequence[Tensor | None] = [batch(0), None, batch(1), None, None, batch(2), batch(3)]
    steps, expected = [], []
    for x in inputs:
        if x is None:
            with pytest.raises(ValueError, match="NaN or infinite"):
                model(bad_batch())
            continue
        model(x)
        plain(x)
        steps.append(model.balancer.step)
        expected.append(plain.balancer.step)
    assert steps == expected == [0, 1, 1, 2]
    assert model.balancer.weights == plain.balancer.weights


# the order of updates


def test_two_forwards_of_the_tap_before_one_backward() -> None:
    """A backward runs in reverse order. That matters to rules with a memory only."""
    stateless = net(MGDA(), probe=FeatureTap())
    (stateless(batch(0)) + stateless(batch(1))).backward()
    assert stateless.balancer.step == 2
    stateful = net(GradNorm(), probe=FeatureTap())
    with pytest.raises(RuntimeError, match="call backward after each forward, or use FeatureProbe"):
        (stateful(batch(0)) + stateful(batch(1))).backward()
    separate, together = net(GradNorm(), probe=FeatureTap()), net(GradNorm())
    for seed in (0, 1):
        separate(batch(seed)).backward()
    (together(batch(0)) + together(batch(1))).backward()
    assert separate.balancer.weights == pytest.approx(together.balancer.weights, rel=1e-6)


class Two(nn.Module):
    """A model with a balancer at two depths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lower, self.upper = nn.Linear(4, 8), nn.Linear(8, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 1) for _ in range(4)])
        self.first, self.second = Balancer(["a", "b"], GradNorm()), Balancer(["c", "d"], GradNorm())

    def forward(self, x: Tensor) -> Tensor:
        z = self.lower(x).tanh()
        y = self.upper(z).tanh()

        def head(i: int) -> object:
            return lambda z: (self.heads[i](z) - i).square().mean()

        return self.first(z, {"a": head(0), "b": head(1)}) + self.second(y, {"c": head(2), "d": head(3)})


def test_virtual_ranks_take_all_balancers_of_the_model() -> None:
    model, plain = Two(), Two()
    ranks = VirtualRanks(2, model.first, model)
    shards = ranks.split(batch(0, 16))

    def work(rank: int) -> Tensor:
        total = model(shards[rank])
        (total / 2).backward()
        return total

    for _ in range(3):
        ranks.run(work)
        plain(batch(0, 16)).backward()
    for one, other in ((model.first, plain.first), (model.second, plain.second)):
        assert one.step == other.step == 3
        assert one.weights == pytest.approx(other.weights, rel=1e-6)


def test_weights_that_do_not_fit_the_total_are_refused_or_held() -> None:
    z = torch.ones(8, 4, requires_grad=True)
    heads = {
        "a": lambda z: nn.functional.binary_cross_entropy_with_logits(z.sum(1) * 23, torch.ones(8)),
        "b": lambda z: (z.sum(1) - 1).square().mean(),
    }
    with pytest.raises(ValueError, match=r"too large for the\s+precision of the total.*Clamp"):
        Balancer(["a", "b"], InverseLoss())(z, heads)
    held = Balancer(["a", "b"], InverseLoss(), on_nonfinite="hold")
    total = held(z, heads)
    assert torch.isfinite(total)
    assert held.report.held
    large = Balancer(["a", "b"], Fixed({"a": 1.0, "b": 1e300}))  # fits into float64
    assert large(z.double(), {task: lambda z: z.sum() for task in "ab"}).isfinite()
