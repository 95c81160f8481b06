"""Laws of the rules of the Gram matrix: what they promise holds, at any rank, scale and condition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtl_dist.solvers.cone import project_on_progress
from mtl_dist.solvers.nonnegative import nonnegative_minimum
from mtl_dist.stats import TaskStats
from mtl_dist.weighting import CAGrad
from tests.weighting.certificates import CERTIFICATES, cagrad, conflict, fair, unit
from tests.weighting.gradients import KINDS, REGULAR, Array, gradients, gram_of
from tests.weighting.subjects import build

SIZES = (2, 3, 8, 32, 128)
GRAM_RULES = (*CERTIFICATES, "gradvac", "krum", "pcd", "pcgrad")
# rules under which no loss rises to first order, and on which gradients
NON_CONFLICTING = {
    "mgda": KINDS,
    "upgrad": KINDS,
    "dual_proj": KINDS,
    "primary_auxiliary": KINDS,
    "primary_auxiliary(several)": KINDS,
    "mgda(l2)": KINDS,
    "nash_mtl": REGULAR,
    "fairgrad": REGULAR,
    "fairgrad(alpha=3)": REGULAR,
    "imtlg": REGULAR,
    "conflict_free": REGULAR,
}
# where the certificate is not small, the cause: a decision about rank, or no solution
NOT_CERTIFIED = {
    "aligned_mtl": ("condition 1e12", "lengths 1e-8 to 1e8"),  # eigenvalues near the cut: s is rounding
    "conflict_free": ("half rank", "stationary"),  # equal projections exist in the least-squares sense only
    "imtlg": ("half rank", "stationary"),
    "fairgrad": ("half rank", "stationary"),  # Pareto-stationary: no solution
    "nash_mtl": ("half rank", "stationary"),
}


def weights_of(name: str, gram: Array, losses: Array | None = None) -> Array:
    tasks = [f"task{i}" for i in range(len(gram))]
    rule = build(name, tasks)
    stats = TaskStats(
        losses=torch.ones(len(gram), dtype=torch.float64) if losses is None else torch.from_numpy(losses),
        present=torch.ones(len(gram), dtype=torch.bool),
        gram=torch.from_numpy(gram.copy()),
        counts=torch.ones(len(gram), dtype=torch.float64),
    )
    return rule.update(stats, rule.init(tasks, torch.device("cpu")))[0].numpy()


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in CERTIFICATES for kind in KINDS if kind not in NOT_CERTIFIED.get(name, ())],
)
def test_certificate_is_rounding(name, kind):
    for n in SIZES:
        gram = gram_of(gradients(kind, n))
        assert CERTIFICATES[name](gram, weights_of(name, gram)) <= 1e-11, n


@pytest.mark.parametrize("name", NON_CONFLICTING)
def test_no_loss_rises(name):
    for kind in NON_CONFLICTING[name]:
        for n in (3, 8, 32):
            for seed in range(3):
                gram = gram_of(gradients(kind, n, seed))
                assert conflict(gram, weights_of(name, gram)) <= 1e-11, (kind, n, seed)


@pytest.mark.parametrize("c", [1.0, 2.0])
def test_no_loss_rises_under_cagrad_from_c_1_on(c):
    for kind in KINDS:
        gram = gram_of(gradients(kind, 8))
        weights = CAGrad(c)._solve(gram)
        # where 0 is in the hull, ‖g_w‖ is the square root of rounding
        assert cagrad(c)(gram, weights) <= 1e-8, kind
        assert conflict(gram, weights) <= 1e-8, kind


def test_the_law_of_conflicts_can_fail():
    gram = gram_of(gradients("opposed", 8))
    assert conflict(gram, weights_of("krum", gram)) > 0.01


@pytest.mark.parametrize("name", GRAM_RULES)
def test_powers_of_two_change_no_bit(name):
    """G -> 4^k G moves no digit, so neither may the weights: nothing is compared with an absolute number."""
    degree = -1 if name in ("nash_mtl", "fairgrad") else 0
    for kind in KINDS:
        gram = gram_of(gradients(kind, 8))
        expected = weights_of(name, gram)
        for k in (-40, 40):
            got = weights_of(name, gram * 4.0**k)
            np.testing.assert_array_equal(got, expected * 2.0 ** (degree * k), err_msg=f"{kind} {k}")


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("name", GRAM_RULES)
def test_weights_are_homogeneous(name, scale):
    degree = -0.5 if name in ("nash_mtl", "fairgrad") else 0
    for kind in ("normal", "opposed", "duplicates"):
        gram = gram_of(gradients(kind, 8))
        got = weights_of(name, gram * scale)
        np.testing.assert_allclose(got, weights_of(name, gram) * scale**degree, rtol=1e-6, err_msg=kind)


ZERO_WEIGHTS = {  # of a task without gradient among others, n = 8
    "aligned_mtl": "mean",
    "cagrad": 1 / 8,
    "conflict_free": "mean",
    "dual_proj": 1 / 8,
    "fairgrad": "mean",
    "gradvac": 1.0,
    "imtlg": "mean",
    "mgda": 1.0,
    "nash_mtl": "mean",
    "pcd": 0.0,
    "pcgrad": 1.0,
    "primary_auxiliary": 0.0,
    "upgrad": 1 / 8,
}


@pytest.mark.parametrize("name", ZERO_WEIGHTS)
def test_task_without_gradient(name):
    vectors = gradients("normal", 8)
    vectors[3] = 0
    weights = weights_of(name, gram_of(vectors))
    expected = ZERO_WEIGHTS[name]
    others = np.delete(weights, 3)
    assert weights[3] == pytest.approx(others.mean() if expected == "mean" else expected, rel=1e-12)
    if name == "mgda":
        assert (others == 0).all()
    elif expected == "mean" and name != "aligned_mtl":  # whose w is 1/n, n counting every task present
        np.testing.assert_allclose(others, weights_of(name, gram_of(np.delete(vectors, 3, 0))), rtol=1e-9)


@pytest.mark.parametrize("name", GRAM_RULES)
def test_no_gradient_at_all_and_stationary_points_give_finite_weights(name):
    cases = [np.zeros((3, 3)), gram_of(np.array([[1.0, 0], [-1, 0], [0, 1]])), np.ones((3, 3))]
    cases += [gram_of(gradients("stationary", n)) for n in (2, 3, 8)]
    for gram in cases:
        weights = weights_of(name, gram)
        assert np.isfinite(weights).all(), (gram, weights)
        bound = 1e9 if name in ("nash_mtl", "fairgrad") else 1e3
        assert np.abs(weights).max() <= bound / max(np.sqrt(gram.diagonal().max()), 1e-3), (gram, weights)


@pytest.mark.parametrize("name", ["mgda", "upgrad", "dual_proj", "cagrad", "nash_mtl", "fairgrad"])
def test_duplicates_share_evenly(name):
    vectors = gradients("normal", 6)
    vectors[1] = vectors[0]
    weights = weights_of(name, gram_of(vectors))
    assert weights[0] == pytest.approx(weights[1], rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_nonnegative_minimum_is_optimal(kind, seed):
    """`Hx >= b`, `x >= 0`, `x ⟂ Hx - b` for many right-hand sides, also where supports cycle."""
    for n in (2, 5, 16):
        gram = gram_of(gradients(kind, n, seed))
        target = -gram @ np.random.default_rng(seed).normal(size=(n, 7))
        x = nonnegative_minimum(gram, target)
        lengths = np.sqrt(gram.diagonal())[:, None]
        slope = (gram @ x - target) / lengths
        size = (lengths * x).sum(0) + np.abs(target / lengths).max(0)
        assert (x >= 0).all()
        assert (slope >= -1e-12 * size).all()
        assert (np.abs(slope * (x > 0)) <= 1e-12 * size).all()


def test_solver_ends_on_matrices_that_are_not_semidefinite():
    """A Gram rounded to float32 may have negative eigenvalues; the answer is then approximate, but finite."""
    for n in (2, 8, 32):
        vectors = gradients("normal", n).astype(np.float32)
        vectors[n // 2 :] = -vectors[: n - n // 2]
        gram = gram_of(vectors).astype(np.float64)
        for name in ("mgda", "upgrad", "dual_proj", "cagrad", "nash_mtl"):
            weights = weights_of(name, gram)
            assert np.isfinite(weights).all(), name
        assert conflict(gram, weights_of("dual_proj", gram)) <= 1e-5


def test_constraints_that_contradict_each_other_are_seen():
    opposite = gram_of(np.array([[1.0, 0], [-1, 0], [0, 1]]))
    assert project_on_progress(opposite, np.array([0.1, 0.1, 0.1])) is None
    x = project_on_progress(opposite, np.array([0.0, 0.0, 0.3]))
    assert x is not None
    np.testing.assert_allclose(opposite @ x, [0, 0, 0.3], atol=1e-12)


def test_certificates_see_what_is_wrong():
    gram = gram_of(gradients("normal", 8))
    for name in ("mgda", "dual_proj", "cagrad", "nash_mtl", "imtlg"):
        weights = weights_of(name, gram)
        worse = weights * (1 + 1e-4 * np.arange(8))
        assert CERTIFICATES[name](gram, worse) > 1e-7, name
    assert fair(1.0)(gram, -np.ones(8)) == np.inf
    assert (unit(np.zeros((2, 2)), np.ones(2)) == 1).all()
