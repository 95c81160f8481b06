"""Rules of the Gram matrix against torchjd where that is right, and against scipy on the problem where not.

torchjd's known deviations, each avoided by its own settings or named at its test: `normalize` replaces G by 0
when its trace is below `norm_eps` (CAGrad, UPGrad, DualProj), `reg_eps` is added to the diagonal (UPGrad and
DualProj), MGDA stops at a loose tolerance, and Krum sums distances where the paper sums their squares.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, nnls
from torchjd import aggregation as tjd
from torchjd._linalg import QuadprogProjector

from mtl_dist.stats import TaskStats
from mtl_dist.weighting import (
    IMTLG,
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
    Rule,
    UPGrad,
)
from tests.weighting.gradients import Array, gradients, gram_of

EXAMPLE = np.array([[-4.0, 1, 1], [6, 1, 1]])


def run(rule: Rule, gram: Array, losses: Array | None = None, steps: int = 1) -> Array:
    tasks = [f"task{i}" for i in range(len(gram))]
    state = rule.init(tasks, torch.device("cpu"))
    for step in range(steps):
        stats = TaskStats(
            losses=torch.ones(len(gram), dtype=torch.float64) if losses is None else torch.from_numpy(losses),
            present=torch.ones(len(gram), dtype=torch.bool),
            gram=torch.from_numpy(gram.copy()),
            counts=torch.ones(len(gram), dtype=torch.float64),
            step=step,
        )
        weights, state = rule.update(stats, state)
    return weights.numpy()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (UPGrad(), [10 / 9, 15 / 19]),
        (MGDA(), [0.6, 0.4]),
        (IMTLG(), [0.5923, 0.4077]),
        (AlignedMTL(), [0.5591, 0.4083]),
        (PCGrad(), [20 / 9, 30 / 19]),
        (GradVac(), [20 / 9, 30 / 19]),
        (DualProj(), [11 / 18, 0.5]),
        (CAGrad(0.5), [0.7041, 0.5]),
        (FairGrad(1.0), [0.5915, 0.4071]),
        (PrimaryAuxiliary("task0"), [1.0, 11 / 19]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Rule) else "",
)
def test_published_weights(rule, expected):
    np.testing.assert_allclose(run(rule, gram_of(EXAMPLE)), expected, atol=5e-5)


def test_published_direction_of_config():
    update = run(ConFIG(), gram_of(EXAMPLE)) @ EXAMPLE
    np.testing.assert_allclose(update, [0.1588, 2.0706, 2.0706], atol=5e-5)


PROJECTOR = QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)
SAME = {
    "UPGrad": (UPGrad(), lambda: tjd.UPGradWeighting(projector=PROJECTOR)),
    "DualProj": (DualProj(), lambda: tjd.DualProjWeighting(projector=PROJECTOR)),
    "AlignedMTL(min)": (AlignedMTL(), tjd.AlignedMTLWeighting),
    "AlignedMTL(median)": (AlignedMTL(scale="median"), lambda: tjd.AlignedMTLWeighting(scale_mode="median")),
    "AlignedMTL(rmse)": (AlignedMTL(scale="rmse"), lambda: tjd.AlignedMTLWeighting(scale_mode="rmse")),
    "PCD": (PCD(), lambda: tjd.PCDWeighting(eps=0.0)),
    "PCD(tau=0.5)": (PCD(tau=0.5), lambda: tjd.PCDWeighting(tau=0.5, eps=0.0)),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("kind", ["normal", "opposed"])
def test_same_as_torchjd(name, kind):
    rule, weighting = SAME[name]
    for n in (3, 5, 12):
        gram = gram_of(gradients(kind, n))
        expected = weighting()(torch.from_numpy(gram)).numpy()
        np.testing.assert_allclose(run(rule, gram), expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_cagrad_as_torchjd_at_its_good_scale(scale):
    """torchjd's interior-point solver stops near 1e-8 of the objective, so its weights are good to 1e-4; at
    small scale its `norm_eps` returns zeros, and ours what they are at scale 1."""
    gram = gram_of(gradients("normal", 5))
    expected = tjd.CAGradWeighting(c=0.5)(torch.from_numpy(gram)).numpy()
    np.testing.assert_allclose(run(CAGrad(0.5), gram * scale), expected, rtol=1e-4)
    tiny = tjd.CAGradWeighting(c=0.5)(torch.from_numpy(gram * 1e-8)).numpy()
    assert (tiny == 0).all(), (
        "torchjd no longer switches CAGrad off at small gradients; compare at all scales"
    )


def test_small_gradients_where_torchjd_returns_the_mean():
    gram = gram_of(1e-3 * EXAMPLE)
    np.testing.assert_allclose(tjd.UPGradWeighting()(torch.from_numpy(gram)).numpy(), [0.5, 0.5])
    np.testing.assert_allclose(run(UPGrad(), gram), [10 / 9, 15 / 19], rtol=1e-12)


@pytest.mark.parametrize("kind", ["normal", "opposed"])
def test_imtlg_as_torchjd_up_to_its_sign(kind):
    """torchjd divides by Σv like the paper; where that is negative, its update raises every loss."""
    for n in (3, 5, 12):
        for seed in range(4):
            gram = gram_of(gradients(kind, n, seed))
            total = np.linalg.solve(gram, np.sqrt(gram.diagonal())).sum()
            expected = np.sign(total) * tjd.IMTLGWeighting()(torch.from_numpy(gram)).numpy()
            np.testing.assert_allclose(run(IMTLG(), gram), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["normal", "opposed"])
def test_config_as_torchjd_on_the_gradients_themselves(kind):
    for n in (3, 5, 12):
        vectors = gradients(kind, n)
        expected = tjd.ConFIG()(torch.from_numpy(vectors)).numpy()
        got = run(ConFIG(), gram_of(vectors)) @ vectors
        np.testing.assert_allclose(got, expected, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["normal", "opposed", "half rank"])
def test_mgda_beside_torchjd_and_scipy(kind):
    """torchjd's Frank-Wolfe stops at 1e-3, so it is a bound; scipy's nnls solves the same problem exactly."""
    for n in (3, 8, 20):
        vectors = gradients(kind, n)
        gram = gram_of(vectors)
        weights = run(MGDA(), gram)
        loose = tjd.MGDAWeighting()(torch.from_numpy(gram)).numpy()
        assert weights @ gram @ weights <= loose @ gram @ loose * (1 + 1e-12) + 1e-12
        length = np.linalg.norm(vectors)
        y = nnls(np.vstack([vectors.T / length, np.ones(n)]), np.append(np.zeros(vectors.shape[1]), 1.0))[0]
        exact = (y / y.sum()) @ vectors
        np.testing.assert_allclose(weights @ vectors, exact, atol=1e-9 * length)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_fairgrad_as_scipy_on_its_problem(alpha):
    """`½ wᵀGw - Σ ψ(w)` with `ψ' = w^(-1/α)`, minimised over log w; torchjd's least squares from 1/n may stop
    early, which its own residual shows."""
    power = 1 / alpha
    for n in (3, 6):
        gram = gram_of(gradients("normal", n))
        gram /= gram.diagonal().mean()

        def objective(log_w: Array, gram: Array = gram) -> tuple[float, Array]:
            w = np.exp(log_w)
            psi = log_w.sum() if power == 1 else (w ** (1 - power)).sum() / (1 - power)
            return 0.5 * w @ gram @ w - psi, w * (gram @ w - w**-power)

        found = minimize(objective, np.zeros(n), jac=True, method="BFGS", options={"gtol": 1e-10})
        weights = run(FairGrad(alpha), gram)
        np.testing.assert_allclose(weights, np.exp(found.x), rtol=1e-6)
        np.testing.assert_allclose(gram @ weights, weights**-power, rtol=1e-10)


def test_fairgrad_as_torchjd():
    gram = gram_of(gradients("normal", 5))
    expected = tjd.FairGradWeighting(alpha=1.0)(torch.from_numpy(gram)).numpy()
    np.testing.assert_allclose(run(FairGrad(1.0), gram), expected, rtol=1e-6)


def test_nash_for_two_tasks_in_closed_form():
    """Weights `a₁ = (G₁₁ + G₁₂√(G₁₁/G₂₂))^-½`, `a₂ = a₁√(G₁₁/G₂₂)`; with clipping, of norm 1."""
    gram = gram_of(EXAMPLE)
    ratio = np.sqrt(gram[0, 0] / gram[1, 1])
    first = (gram[0, 0] + gram[0, 1] * ratio) ** -0.5
    expected = np.array([first, first * ratio])
    np.testing.assert_allclose(run(NashMTL(max_norm=0), gram), expected, rtol=1e-12)
    clipped = run(NashMTL(), gram)
    assert clipped @ gram @ clipped == pytest.approx(1.0, rel=1e-12)
    np.testing.assert_allclose(clipped, expected / np.sqrt(2), rtol=1e-12)


def test_nash_does_not_lengthen_a_short_update():
    gram = gram_of(gradients("normal", 4))
    np.testing.assert_allclose(run(NashMTL(max_norm=5), gram), run(NashMTL(max_norm=0), gram), rtol=1e-12)


def test_krum_takes_squares_as_the_paper():
    """One far neighbour weighs more in squares: of the points 0, 1, 3.2, 5.2 on a line the choice differs."""
    vectors = np.array([[0.0], [1.0], [2.9], [4.3], [9.0]])
    gram = gram_of(vectors)
    scores = [np.sort((vectors[:, 0] - v) ** 2)[1:4].sum() for v in vectors[:, 0]]
    assert run(Krum(), gram).argmax() == int(np.argmin(scores))
    two = run(Krum(num_byzantine=1, num_selected=2), gram)
    scores = [np.sort((vectors[:, 0] - v) ** 2)[1:3].sum() for v in vectors[:, 0]]
    np.testing.assert_allclose(two[np.argsort(scores)[:2]], 0.5)
    assert two.sum() == pytest.approx(1.0)


def test_krum_as_torchjd_where_the_powers_agree():
    gram = gram_of(gradients("normal", 4))  # n - 2 = 2 neighbours, well separated
    for n_selected in (1, 2):
        expected = tjd.KrumWeighting(0, n_selected)(torch.from_numpy(gram)).numpy()
        np.testing.assert_allclose(run(Krum(num_selected=n_selected), gram), expected)


def test_primary_auxiliary_as_nonnegative_least_squares():
    """One primary: λ minimises `‖g₀ + Σ λᵢgᵢ‖`, which scipy's nnls solves on the gradients themselves."""
    for kind in ("normal", "opposed", "half rank"):
        vectors = gradients(kind, 9)
        expected = nnls(vectors[1:].T, -vectors[0])[0]
        weights = run(PrimaryAuxiliary("task0"), gram_of(vectors))
        assert weights[0] == pytest.approx(1.0, rel=1e-12)
        np.testing.assert_allclose(weights @ vectors, vectors[0] + expected @ vectors[1:], atol=1e-8)


def test_primary_auxiliary_is_dual_projection_of_the_primary_gradient():
    vectors = gradients("opposed", 7)
    one_hot = [1.0] + [0.0] * 6
    expected = run(DualProj(preference=one_hot), gram_of(vectors)) @ vectors
    np.testing.assert_allclose(
        run(PrimaryAuxiliary("task0"), gram_of(vectors)) @ vectors,
        expected,
        atol=1e-10 * np.abs(expected).max(),
    )


def test_hybrid_of_all_primaries_is_mgda():
    gram = gram_of(gradients("opposed", 6))
    everything = PrimaryAuxiliary([f"task{i}" for i in range(6)])
    np.testing.assert_allclose(run(everything, gram), run(MGDA(), gram), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", [MGDA(), CAGrad(), IMTLG(), UPGrad()], ids=lambda rule: type(rule).__name__)
def test_log_losses_are_the_rule_on_gradients_of_logarithms(rule):
    vectors = gradients("normal", 5)
    losses = np.exp(np.random.default_rng(0).normal(size=5))
    expected = run(rule, gram_of(vectors / losses[:, None])) @ (vectors / losses[:, None])
    got = run(OfLogLosses(rule), gram_of(vectors), losses) @ vectors
    np.testing.assert_allclose(got, expected, atol=1e-9 * np.abs(expected).max())
