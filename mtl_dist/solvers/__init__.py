"""Small convex problems in the Gram matrix of n gradients, solved to their optimality conditions.

With the gradients `gᵢ` as rows of J, every function takes `G = JJᵀ`, `[n, n]` float64, and never J itself.

| function | problem | certificate |
|---|---|---|
| `nonnegative_minimum` | `min ½ xᵀHx - bᵀx` over `x >= 0` | `Hx - b >= 0`, `x ⟂ Hx - b` up to rounding |
| `min_norm_weights` | `min yᵀGy` over the simplex, or a simplex plus a cone | as above |
| `project_on_dual_cone` | `min vᵀGv` over `v >= u` | as above |
| `project_on_progress` | nearest d with `⟨gⱼ, d⟩ >= pⱼ`, or that none exists | as above |
| `conflict_averse` | `max_d minᵢ ⟨gᵢ, d⟩` over a ball around `mean(g)` | optimality up to rounding |
| `fair_weights` | `(Ga)ᵢ = aᵢ⁻ᵖ`, `a > 0` | relative Newton step <= 1e-12, or no longer smaller |
| `equal_projections` | least-squares, minimum-norm `Cx = p` | eigenvalues, with a relative cut-off |

`cosines` and `among_nonzero` prepare a Gram matrix for them. `EPS` and `RIDGE` are the constants of all
solvers, `Array` and `Bools` the types of their arrays.

The solvers know nothing of tasks, rules or ranks: this package imports NumPy and torch only.
"""

from __future__ import annotations

from mtl_dist.solvers.cone import project_on_dual_cone, project_on_progress
from mtl_dist.solvers.fair import fair_weights
from mtl_dist.solvers.nonnegative import nonnegative_minimum
from mtl_dist.solvers.precision import EPS, RIDGE, Array, Bools
from mtl_dist.solvers.simplex import min_norm_weights
from mtl_dist.solvers.unit_gradients import among_nonzero, cosines, equal_projections
from mtl_dist.solvers.worst_case import conflict_averse

__all__ = [
    "EPS",
    "RIDGE",
    "Array",
    "Bools",
    "among_nonzero",
    "conflict_averse",
    "cosines",
    "equal_projections",
    "fair_weights",
    "min_norm_weights",
    "nonnegative_minimum",
    "project_on_dual_cone",
    "project_on_progress",
]
