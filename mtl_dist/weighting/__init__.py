"""The weighting rules: pure functions of the global statistics and a state. One rule per file.

`RULES` and `COMBINATORS` map names to classes. Tests, configuration, command line and documentation all read
them. The interface of a rule is in `base`, and helper functions for new rules are in `helpers` and `checks`.

A method belongs here if its update is `Σ αᵢ ∇Lᵢ`, with weights α that are computed from the global losses,
the Gram matrix of the task gradients and a state of O(n²) numbers. One all-reduce carries these statistics,
and every engine can apply such weights by scaling losses. Methods that are not included:

| method | reason |
|---|---|
| MoDo, SDMGrad | need inner products between two batches (see below) |
| GradDrop, TrimmedMean | mask or sort gradient coordinates: the update is not a weighted sum of losses |
| MoCo, DB-MTL (β > 0), ExcessMTL | store an average gradient per task: n times the size of the model |
| GradVac per layer or matrix | different weights in every layer; the whole-model form is included |
| learning-rate annealing (2021) | the mean absolute gradient does not add over ranks |
| MOML, Auto-Lambda, FORUM | bilevel: they evaluate held-out batches inside the step |

MoDo and SDMGrad need `⟨gᵢ(batch 1), gⱼ(batch 2)⟩`. At the features the two batches are different points, so
this product has no meaning. At the parameters it costs n more backward passes per step. The matrix is neither
symmetric nor semidefinite, so it cannot replace the Gram matrix. It would need a value of `Needs` that no
other method uses.
"""

from __future__ import annotations

from mtl_dist.weighting.aligned_mtl import AlignedMTL
from mtl_dist.weighting.base import Combinator, Needs, Rule, State
from mtl_dist.weighting.cagrad import CAGrad
from mtl_dist.weighting.coba import CoBa
from mtl_dist.weighting.combinators import (
    Clamp,
    Every,
    KeepNorm,
    LastSeen,
    Normalize,
    OfLogLosses,
    Preference,
    Relative,
    Smooth,
    Warmup,
)
from mtl_dist.weighting.conflict_free import ConFIG
from mtl_dist.weighting.db_mtl import DBMTL
from mtl_dist.weighting.dual_proj import DualProj
from mtl_dist.weighting.dwa import DWA
from mtl_dist.weighting.encodec import Encodec
from mtl_dist.weighting.equal import Equal
from mtl_dist.weighting.fairgrad import FairGrad
from mtl_dist.weighting.famo import FAMO
from mtl_dist.weighting.fixed import Fixed
from mtl_dist.weighting.generalized_mean import GeneralizedMean
from mtl_dist.weighting.geometric_mean import GeometricMean
from mtl_dist.weighting.grad_norm import GradNorm
from mtl_dist.weighting.gradvac import GradVac
from mtl_dist.weighting.imtl_l import IMTLL
from mtl_dist.weighting.imtlg import IMTLG
from mtl_dist.weighting.initial_loss import InitialLoss
from mtl_dist.weighting.inverse_grad_norm import InverseGradNorm
from mtl_dist.weighting.inverse_loss import InverseLoss
from mtl_dist.weighting.krum import Krum
from mtl_dist.weighting.log_sum_exp import LogSumExp
from mtl_dist.weighting.mgda import MGDA
from mtl_dist.weighting.nash_mtl import NashMTL
from mtl_dist.weighting.ntk_balance import NTKBalance
from mtl_dist.weighting.pcd import PCD
from mtl_dist.weighting.pcgrad import PCGrad
from mtl_dist.weighting.primary_auxiliary import PrimaryAuxiliary
from mtl_dist.weighting.prior_loss import PriorLoss
from mtl_dist.weighting.relobralo import ReLoBRaLo
from mtl_dist.weighting.rlw import RLW
from mtl_dist.weighting.soft_adapt import SoftAdapt
from mtl_dist.weighting.stch import STCH
from mtl_dist.weighting.token_share import TokenShare
from mtl_dist.weighting.uncertainty import Uncertainty
from mtl_dist.weighting.upgrad import UPGrad

RULES: dict[str, type[Rule]] = {
    "aligned_mtl": AlignedMTL,
    "cagrad": CAGrad,
    "coba": CoBa,
    "conflict_free": ConFIG,
    "db_mtl": DBMTL,
    "dual_proj": DualProj,
    "dwa": DWA,
    "encodec": Encodec,
    "equal": Equal,
    "fairgrad": FairGrad,
    "famo": FAMO,
    "fixed": Fixed,
    "generalized_mean": GeneralizedMean,
    "geometric_mean": GeometricMean,
    "grad_norm": GradNorm,
    "gradvac": GradVac,
    "imtl_l": IMTLL,
    "imtlg": IMTLG,
    "initial_loss": InitialLoss,
    "inverse_grad_norm": InverseGradNorm,
    "inverse_loss": InverseLoss,
    "krum": Krum,
    "log_sum_exp": LogSumExp,
    "mgda": MGDA,
    "nash_mtl": NashMTL,
    "ntk_balance": NTKBalance,
    "pcd": PCD,
    "pcgrad": PCGrad,
    "primary_auxiliary": PrimaryAuxiliary,
    "prior_loss": PriorLoss,
    "relobralo": ReLoBRaLo,
    "rlw": RLW,
    "soft_adapt": SoftAdapt,
    "stch": STCH,
    "token_share": TokenShare,
    "uncertainty": Uncertainty,
    "upgrad": UPGrad,
}

COMBINATORS: dict[str, type[Combinator]] = {
    "clamp": Clamp,
    "every": Every,
    "keep_norm": KeepNorm,
    "last_seen": LastSeen,
    "normalize": Normalize,
    "of_log_losses": OfLogLosses,
    "preference": Preference,
    "relative": Relative,
    "smooth": Smooth,
    "warmup": Warmup,
}

__all__ = [
    "COMBINATORS",
    "DBMTL",
    "DWA",
    "FAMO",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "PCD",
    "RLW",
    "RULES",
    "STCH",
    "AlignedMTL",
    "CAGrad",
    "Clamp",
    "CoBa",
    "Combinator",
    "ConFIG",
    "DualProj",
    "Encodec",
    "Equal",
    "Every",
    "FairGrad",
    "Fixed",
    "GeneralizedMean",
    "GeometricMean",
    "GradNorm",
    "GradVac",
    "InitialLoss",
    "InverseGradNorm",
    "InverseLoss",
    "KeepNorm",
    "Krum",
    "LastSeen",
    "LogSumExp",
    "NTKBalance",
    "NashMTL",
    "Needs",
    "Normalize",
    "OfLogLosses",
    "PCGrad",
    "Preference",
    "PrimaryAuxiliary",
    "PriorLoss",
    "ReLoBRaLo",
    "Relative",
    "Rule",
    "Smooth",
    "SoftAdapt",
    "State",
    "TokenShare",
    "UPGrad",
    "Uncertainty",
    "Warmup",
]
