"""What is particular to single rules of the Gram matrix: settings, orders, state, the article's example."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtl_dist.stats import TaskStats
from mtl_dist.weighting import (
    MGDA,
    PCD,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    GradVac,
    Krum,
    NashMTL,
    OfLogLosses,
    PCGrad,
    PrimaryAuxiliary,
    UPGrad,
)
from mtl_dist.weighting.gradvac import vaccinate
from mtl_dist.weighting.helpers import random_orders
from tests.weighting.gradients import gradients, gram_of
from tests.weighting.test_gram_oracles import run

CPU = torch.device("cpu")


def test_article_counter_example():
    """g₀ = (-2, -1), g₁ = (1, 0), g₂ = (1, 1): the article's refits stall at λ = (0.5, 1.5), u = (0, 0.5),
    where the main loss rises by ½; the optimum is λ = (1, 1), u = 0."""
    vectors = np.array([[-2.0, -1], [1, 0], [1, 1]])
    stalled = np.array([1, 0.5, 1.5])
    assert vectors[0] @ (stalled @ vectors) == -0.5
    weights = run(PrimaryAuxiliary(primary="task0", auxiliary=["task1", "task2"]), gram_of(vectors))
    np.testing.assert_allclose(weights, [1, 1, 1], atol=1e-12)
    np.testing.assert_allclose(weights @ vectors, 0, atol=1e-12)


def test_main_loss_never_rises_where_the_articles_refits_let_it():
    for seed in range(200):
        vectors = np.random.default_rng(seed).normal(size=(3, 3))
        update = run(PrimaryAuxiliary("task0"), gram_of(vectors)) @ vectors
        assert (vectors @ update >= -1e-12).all()


def test_without_the_primary_task_nothing_moves():
    gram = torch.from_numpy(gram_of(gradients("normal", 3)))
    gram[0], gram[:, 0] = 0, 0
    present = torch.tensor([False, True, True])
    stats = TaskStats(torch.ones(3, dtype=torch.float64), present, gram, present.double())
    for rule in (PrimaryAuxiliary("task0"), PCD("task0")):
        weights, _ = rule.update(stats, rule.init(["task0", "task1", "task2"], CPU))
        assert (weights == 0).all()


@pytest.mark.parametrize(
    ("normalization", "power_l2", "power_loss"), [("l2", 1, 0), ("loss", 0, 1), ("loss+", 1, 1)]
)
def test_mgda_of_normalised_gradients(normalization, power_l2, power_loss):
    vectors = gradients("normal", 4) * np.array([[1.0], [3], [0.1], [10]])
    losses = np.array([0.5, 2.0, 1.0, 7.0])
    s = np.linalg.norm(vectors, axis=1) ** power_l2 * losses**power_loss
    expected = run(MGDA(), gram_of(vectors / s[:, None])) / s
    np.testing.assert_allclose(run(MGDA(normalization), gram_of(vectors), losses), expected, rtol=1e-9)
    assert MGDA(normalization).positive_losses == bool(power_loss)


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("kind", ["normal", "opposed"])
def test_pcgrad_one_task_after_another(kind, seed):
    """The algorithm as published, on the gradients themselves, in the same orders."""
    vectors = gradients(kind, 6)
    total = np.zeros(vectors.shape[1])
    for i, order in enumerate(random_orders(6, seed, 0)):
        g = vectors[i].copy()
        for j in order:
            if j != i and g @ vectors[j] < 0:
                g -= g @ vectors[j] / (vectors[j] @ vectors[j]) * vectors[j]
        total += g
    got = run(PCGrad(seed=seed), gram_of(vectors)) @ vectors
    np.testing.assert_allclose(got, total, atol=1e-10 * np.abs(total).max())


def test_gradvac_one_task_after_another():
    """The algorithm as published, on the gradients themselves, over three steps."""
    beta, target = 0.3, np.zeros((5, 5))
    expected_target = np.zeros((5, 5))
    for step in range(3):
        vectors = gradients("opposed", 5, step)
        orders = random_orders(5, 0, step)
        total = np.zeros(vectors.shape[1])
        for i, order in enumerate(orders):
            g = vectors[i].copy()
            for j in order:
                if j == i:
                    continue
                other, rho = vectors[j], expected_target[i, j]
                phi = g @ other / np.linalg.norm(g) / np.linalg.norm(other)
                if phi < rho:
                    turn = rho * np.sqrt(1 - phi**2) - phi * np.sqrt(1 - rho**2)
                    g = g + np.linalg.norm(g) * turn / (np.linalg.norm(other) * np.sqrt(1 - rho**2)) * other
                expected_target[i, j] = (1 - beta) * rho + beta * phi
            total += g
        weights, target = vaccinate(gram_of(vectors), target, orders, beta)
        np.testing.assert_allclose(weights @ vectors, total, atol=1e-10 * np.abs(total).max())
        np.testing.assert_allclose(target, expected_target, atol=1e-12)


@pytest.mark.parametrize("rule", [PCGrad(), GradVac()], ids=lambda rule: type(rule).__name__)
def test_random_orders_depend_on_seed_and_step_alone(rule):
    gram = gram_of(gradients("opposed", 8))
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  # the global generator that must not matter
    first = run(rule, gram, steps=4)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    np.testing.assert_array_equal(run(rule, gram, steps=4), first)
    assert not np.array_equal(run(type(rule)(seed=3), gram, steps=4), first)
    orders = {random_orders(8, 0, step).tobytes() for step in range(5)}
    assert len(orders) == 5
    assert (np.sort(random_orders(8, 0, 0), axis=1) == np.arange(8)).all()


def test_pcd_drops_constraints_that_contradict_each_other():
    vectors = np.array([[1.0, 1.0], [1, 0], [-1, 0]])
    np.testing.assert_allclose(run(PCD(tau=0.1), gram_of(vectors)), [1, 0, 0])


def test_pcd_gives_the_share_it_promises():
    tau = 0.2
    for kind in ("normal", "opposed"):
        vectors = gradients(kind, 6)
        update = run(PCD(tau=tau), gram_of(vectors)) @ vectors
        assert np.linalg.norm(update) == pytest.approx(np.linalg.norm(vectors[0]))
        units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)  # the first step's normalisation
        direction = run(PCD(tau=tau), gram_of(units)) @ units
        w = run(PCD(tau=tau), gram_of(units))
        assert (units[1:] @ (direction / w[0]) >= tau - 1e-12).all()


def test_preference_enters_before_conflicts_are_resolved():
    gram = gram_of(gradients("opposed", 4))
    w = [1.0, 2.0, 0.0, 0.5]
    for rule in (UPGrad(w), DualProj(w)):
        assert (gram @ run(rule, gram) >= -1e-12 * gram.max()).all()
    named = {f"task{i}": value for i, value in enumerate(w)}
    np.testing.assert_array_equal(run(UPGrad(named), gram), run(UPGrad(w), gram))
    projections = gram @ run(ConFIG([1.0, 2.0, 3.0, 4.0]), gram) / np.sqrt(gram.diagonal())
    np.testing.assert_allclose(projections / projections[0], [1, 2, 3, 4], rtol=1e-9)
    np.testing.assert_allclose(run(AlignedMTL([0.25] * 4), gram), run(AlignedMTL(), gram), rtol=1e-12)


def test_cagrad_rescaling_and_limits():
    gram = gram_of(gradients("opposed", 5))
    np.testing.assert_allclose(run(CAGrad(0.4, rescale=1), gram) * (1 + 0.4**2), run(CAGrad(0.4), gram))
    np.testing.assert_allclose(run(CAGrad(0.4, rescale=2), gram) * (1 + 0.4), run(CAGrad(0.4), gram))
    np.testing.assert_allclose(run(CAGrad(0.0), gram), 0.2)


def test_cagrad_at_a_stationary_point_is_the_nearest_update_that_harms_no_task():
    gram = gram_of(np.array([[1.0, 1], [-1, 1], [0, -2], [3, 0]]))
    for c in (1.0, 3.0):
        np.testing.assert_allclose(run(CAGrad(c), gram), run(DualProj(), gram), rtol=1e-9)


BAD = [
    (lambda: MGDA("l3"), "normalization"),
    (lambda: CAGrad(-0.1), "c"),
    (lambda: CAGrad(0.5, rescale=3), "rescale"),
    (lambda: NashMTL(max_norm=-1), "max_norm"),
    (lambda: FairGrad(0.0), "alpha"),
    (lambda: GradVac(beta=1.5), "beta"),
    (lambda: GradVac(seed=-1), "seed"),
    (lambda: PCGrad(seed=-1), "seed"),
    (lambda: PCD(tau=2.0), "tau"),
    (lambda: PCD(beta=1.0), "beta"),
    (lambda: Krum(num_byzantine=-1), "num_byzantine"),
    (lambda: Krum(num_selected=0), "num_selected"),
    (lambda: AlignedMTL(scale="max"), "scale"),
    (lambda: UPGrad([-1.0, 1.0]), "preference"),
    (lambda: PrimaryAuxiliary([]), "primary"),
    (lambda: PrimaryAuxiliary("task0", ["task0"]), "task0"),
    (lambda: PCD("x").init(["task0"], CPU), "primary"),
    (lambda: PrimaryAuxiliary("x").init(["task0"], CPU), "x"),
    (lambda: PrimaryAuxiliary("task0", []).init(["task0", "task1"], CPU), "task1"),
]


@pytest.mark.parametrize(("make", "word"), BAD)
def test_bad_settings_are_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_log_losses_always_need_positive_losses():
    assert OfLogLosses(MGDA()).positive_losses
    assert not MGDA().positive_losses


def test_gradvac_meets_gradients_that_stay_opposite() -> None:
    """The moving target reaches -1 in float64; nothing is divided by √(1 - ρ²) = 0 there."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    rule = GradVac()
    state = rule.init(["a", "b", "c"], torch.device("cpu"))
    for step in range(80):  # β = 0.5: -1 + 2^-80 rounds to -1
        stats = TaskStats(ones, ones > 0, rows @ rows.T, ones, step)
        weights, state = rule.update(stats, state)
    assert state["target"][0, 1] == -1
    assert weights.isfinite().all()
