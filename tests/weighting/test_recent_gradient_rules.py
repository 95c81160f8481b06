"""Rules of gradients that appeared since: explicit autograd, or scipy on the codes' problems."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares, minimize
from torch import nn

from mtl_dist.solvers import min_norm_weights
from mtl_dist.stats import TaskStats
from mtl_dist.weighting import PIVRG, AdaptiveWeight, CAGrad, Equal, FairGrad, IMGrad
from tests.weighting.gradients import Array, gradients, gram_of

CPU = torch.device("cpu")
TASKS = ("gan", "nll", "perceptual")


def stats(gram, losses=None, present=None):
    gram = torch.from_numpy(np.array(gram, dtype=float))
    n = len(gram)
    losses = torch.ones(n, dtype=torch.float64) if losses is None else torch.as_tensor(losses).double()
    present = torch.ones(n, dtype=torch.bool) if present is None else torch.tensor(present)
    return TaskStats(losses, present, gram, present.double())


def run(rule, gram: Array, scores=None) -> Array:
    tasks = [f"task{i}" for i in range(len(gram))]
    state = rule.init(tasks, CPU)
    if scores is not None:
        state = rule.observe(stats(gram, scores), state)
    return rule.update(stats(gram), state)[0].numpy()


def assert_close(got, expected, rtol=1e-12):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=0)


# AdaptiveWeight


def test_adaptive_weight_is_vqgans_at_the_last_layer():
    """The statements of taming-transformers, in one process on the whole batch."""
    torch.manual_seed(0)
    decoder, discriminator = nn.Linear(6, 8).double(), nn.Linear(8, 1).double()
    image = torch.randn(5, 8, dtype=torch.float64)
    output = decoder(torch.randn(5, 6, dtype=torch.float64))
    losses = [-discriminator(output).mean(), (output - image).abs().mean(), (output - image).square().mean()]
    rows = [torch.autograd.grad(loss, decoder.weight, retain_graph=True)[0].flatten() for loss in losses]
    gram = (torch.stack(rows) @ torch.stack(rows).T).numpy()
    d_weight = torch.clamp(rows[1].norm() / (rows[0].norm() + 1e-4), 0.0, 1e4) * 0.8
    for eps in (1e-4, 0.0):
        rule = AdaptiveWeight("nll", {"perceptual": 2.0}, eps=eps)
        weights, _ = rule.update(stats(gram), rule.init(TASKS, CPU))
        assert weights[1] == 1
        assert_close(weights[0], d_weight, rtol=1e-12 if eps else 1e-2)
        assert_close(weights[2], 2 * rows[1].norm() / (rows[2].norm() + eps))


def test_adaptive_weight_has_a_limit_and_a_memory():
    rule = AdaptiveWeight("nll", max_ratio=50.0)
    state = rule.init(TASKS, CPU)
    without = (True, False, True)
    gram = np.diag([1.0, 16.0, 1e-8])
    first, state = rule.update(stats(gram, present=without), state)
    assert_close(first[[0, 2]], [0.8, 0.8])
    weights, state = rule.update(stats(gram), state)
    assert_close(weights, [0.8 * 4, 1.0, 0.8 * 50])
    later, state = rule.update(stats(np.diag([4.0, 0.0, 0.0]), present=without), state)
    assert_close(later[[0, 2]], [0.8 * 2, 0.8 * 50])
    still, _ = rule.update(stats(np.diag([4.0, 0.0, 0.0])), state)
    assert still.tolist() == [0.0, 1.0, 0.0]


# PIVRG

SCORES = np.array([-3.0, 12.0, 4.0, 30.0, 1.0])


@pytest.mark.parametrize(("bound", "temperature"), [(2.0, 10.0), (8.0, 1.0)])
def test_pivrg_as_scipys_least_squares_on_the_codes_problem(bound, temperature):
    gram = gram_of(gradients("normal", 5))
    heat = max(np.ptp(SCORES) / np.log(bound), temperature)
    p = np.exp((SCORES - SCORES.max()) / heat)
    p *= 5 / p.sum()

    def residual(a: Array) -> Array:
        return gram @ a - np.sqrt(p / a)

    found = least_squares(
        residual, np.full(5, 0.2), bounds=(1e-12, np.inf), xtol=1e-15, ftol=1e-15, gtol=1e-15
    )
    weights = run(PIVRG(bound=bound, temperature=temperature), gram, SCORES)
    assert_close(weights, found.x, rtol=1e-6)
    assert_close(gram @ weights, np.sqrt(p / weights), rtol=1e-10)
    assert p.max() / p.min() == pytest.approx(bound)


def test_pivrg_of_equal_scores_is_fairgrad():
    gram = gram_of(gradients("opposed", 5))
    for scores in (None, np.full(5, -7.0)):
        assert_close(run(PIVRG(), gram, scores), run(FairGrad(2.0), gram), rtol=1e-10)


def test_pivrg_makes_drops_of_losses_and_baselines():
    gram, baselines = gram_of(gradients("normal", 5)), np.array([1.0, 2.0, 0.5, 8.0, 1e-3])
    losses = baselines * (1 + SCORES / 100)
    expected = run(PIVRG(), gram, SCORES)
    assert_close(run(PIVRG(baselines.tolist()), gram, losses), expected, rtol=1e-9)
    # a task that was not measured keeps its score
    rule = PIVRG()
    state = rule.observe(stats(gram, SCORES), rule.init("abcde", CPU))
    again = rule.observe(stats(gram, np.zeros(5), [False] * 5), state)
    assert torch.equal(again["scores"], state["scores"])


# IMGrad


def shortest(gram: Array) -> tuple[float, float]:
    """‖g₀‖ and cos(g₀, g_m)."""
    mean, m = np.full(len(gram), 1 / len(gram)), min_norm_weights(gram)
    length = np.sqrt(mean @ gram @ mean)
    return length, m @ gram @ mean / (length * np.sqrt(m @ gram @ m))


@pytest.mark.parametrize("kind", ["normal", "opposed"])
@pytest.mark.parametrize("a", [0.4, 0.8])
def test_imgrad_as_scipys_slsqp_on_the_codes_problem(kind, a):
    for n in (3, 5):
        gram = gram_of(gradients(kind, n))
        gram /= gram.diagonal().mean()
        mean = np.full(n, 1 / n)
        length, c = shortest(gram)

        def objective(w: Array, gram=gram, mean=mean, length=length, c=c) -> float:
            return (1.5 - c) * w @ gram @ mean + c * a * length * np.sqrt(w @ gram @ w)

        simplex = {"type": "eq", "fun": lambda w: w.sum() - 1}
        found = minimize(
            objective, mean, bounds=[(0, 1)] * n, constraints=simplex, options={"ftol": 1e-15, "maxiter": 500}
        )
        extra = run(IMGrad(a), gram) * (1 + a**2) - mean
        mine = extra / extra.sum()
        assert objective(mine) <= objective(found.x) + 1e-12
        np.testing.assert_allclose(mine, found.x, atol=2e-5)
        # the step has the length a‖g₀‖
        assert_close(np.sqrt(extra @ gram @ extra), a * length, rtol=1e-9)


def test_imgrad_is_cagrad_where_the_cosine_says_so():
    """Two orthogonal gradients of lengths 1 and t: `cos² = 4t²/(1 + t²)²`, which is 9/16 for this t."""
    t = np.sqrt((16 * 2 / 9 - 1) - np.sqrt((16 * 2 / 9 - 1) ** 2 - 1))
    gram = np.diag([1.0, t**2])
    assert_close(shortest(gram)[1], 0.75)
    assert_close(run(IMGrad(0.6), gram), run(CAGrad(0.6, rescale=1), gram), rtol=1e-9)


def test_imgrad_at_a_stationary_point_serves_the_worst_task():
    gram = gram_of(np.array([[3.0, 0], [-1, 0]]))
    # g₀ = 1, and the second gradient is against it
    assert_close(run(IMGrad(0.5), gram), [0.5 / 1.25, (0.5 + 0.5) / 1.25])
    np.testing.assert_allclose(run(IMGrad(0.0), gram), run(Equal(), gram))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AdaptiveWeight("other").init(TASKS, CPU),
            r"reference must be one .*, got 'other'",
        ),
        (
            lambda: AdaptiveWeight("nll", {"a": 1.0}).init(TASKS, CPU),
            r"weights must name tasks .*, got \['a'\]",
        ),
        (lambda: AdaptiveWeight("nll", {"gan": 0.0}), "AdaptiveWeight: weights must be finite and positive"),
        (lambda: PIVRG(bound=1.0), "PIVRG: bound must be finite and above 1, got 1"),
        (lambda: PIVRG([0.0, 1.0]), "PIVRG: baselines must be finite and positive"),
        (lambda: IMGrad(-0.1), "IMGrad: a must be finite and non-negative, got -0.1"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
