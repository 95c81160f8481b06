"""The weighting rules: pure functions of the global statistics and a state. One rule per file.

`RULES` and `COMBINATORS` map names to classes. Tests, configuration, command line and documentation all read
them, and the facts in the classes. The imports below are the one list of rules: type checkers read it without
running it. The interface of a rule is in `base`, and functions for new rules are in `helpers` and `checks`.

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

from mtl_dist.weighting.adaptive_weight import AdaptiveWeight as AdaptiveWeight
from mtl_dist.weighting.aligned_mtl import AlignedMTL as AlignedMTL
from mtl_dist.weighting.base import Combinator as Combinator
from mtl_dist.weighting.base import Needs as Needs
from mtl_dist.weighting.base import Rule as Rule
from mtl_dist.weighting.base import State as State
from mtl_dist.weighting.cagrad import CAGrad as CAGrad
from mtl_dist.weighting.coba import CoBa as CoBa
from mtl_dist.weighting.combinators import Clamp as Clamp
from mtl_dist.weighting.combinators import Every as Every
from mtl_dist.weighting.combinators import Grouped as Grouped
from mtl_dist.weighting.combinators import KeepNorm as KeepNorm
from mtl_dist.weighting.combinators import LastSeen as LastSeen
from mtl_dist.weighting.combinators import Normalize as Normalize
from mtl_dist.weighting.combinators import OfLogLosses as OfLogLosses
from mtl_dist.weighting.combinators import Preference as Preference
from mtl_dist.weighting.combinators import Relative as Relative
from mtl_dist.weighting.combinators import Smooth as Smooth
from mtl_dist.weighting.combinators import Warmup as Warmup
from mtl_dist.weighting.conflict_free import ConFIG as ConFIG
from mtl_dist.weighting.cosmos import COSMOS as COSMOS
from mtl_dist.weighting.db_mtl import DBMTL as DBMTL
from mtl_dist.weighting.dual_proj import DualProj as DualProj
from mtl_dist.weighting.dwa import DWA as DWA
from mtl_dist.weighting.encodec import Encodec as Encodec
from mtl_dist.weighting.equal import Equal as Equal
from mtl_dist.weighting.fairgrad import FairGrad as FairGrad
from mtl_dist.weighting.famo import FAMO as FAMO
from mtl_dist.weighting.fixed import Fixed as Fixed
from mtl_dist.weighting.generalized_mean import GeneralizedMean as GeneralizedMean
from mtl_dist.weighting.geometric_mean import GeometricMean as GeometricMean
from mtl_dist.weighting.go4align import GO4Align as GO4Align
from mtl_dist.weighting.grad_norm import GradNorm as GradNorm
from mtl_dist.weighting.gradvac import GradVac as GradVac
from mtl_dist.weighting.group_dro import GroupDRO as GroupDRO
from mtl_dist.weighting.imgrad import IMGrad as IMGrad
from mtl_dist.weighting.imtl_l import IMTLL as IMTLL
from mtl_dist.weighting.imtlg import IMTLG as IMTLG
from mtl_dist.weighting.initial_loss import InitialLoss as InitialLoss
from mtl_dist.weighting.inverse_grad_norm import InverseGradNorm as InverseGradNorm
from mtl_dist.weighting.inverse_loss import InverseLoss as InverseLoss
from mtl_dist.weighting.kl_balance import KLBalance as KLBalance
from mtl_dist.weighting.krum import Krum as Krum
from mtl_dist.weighting.ldc_mtl import LDCMTL as LDCMTL
from mtl_dist.weighting.log_sum_exp import LogSumExp as LogSumExp
from mtl_dist.weighting.mgda import MGDA as MGDA
from mtl_dist.weighting.nash_mtl import NashMTL as NashMTL
from mtl_dist.weighting.ntk_balance import NTKBalance as NTKBalance
from mtl_dist.weighting.pbi import PBI as PBI
from mtl_dist.weighting.pcd import PCD as PCD
from mtl_dist.weighting.pcgrad import PCGrad as PCGrad
from mtl_dist.weighting.pivrg import PIVRG as PIVRG
from mtl_dist.weighting.primary_auxiliary import PrimaryAuxiliary as PrimaryAuxiliary
from mtl_dist.weighting.prior_loss import PriorLoss as PriorLoss
from mtl_dist.weighting.relobralo import ReLoBRaLo as ReLoBRaLo
from mtl_dist.weighting.rlw import RLW as RLW
from mtl_dist.weighting.soft_adapt import SoftAdapt as SoftAdapt
from mtl_dist.weighting.stch import STCH as STCH
from mtl_dist.weighting.token_share import TokenShare as TokenShare
from mtl_dist.weighting.uncertainty import Uncertainty as Uncertainty
from mtl_dist.weighting.upgrad import UPGrad as UPGrad

_RULES = [cls for cls in vars().values() if isinstance(cls, type) and issubclass(cls, Rule) and cls.name]
RULES: dict[str, type[Rule]] = {
    cls.name: cls for cls in sorted(_RULES, key=lambda cls: cls.name) if not issubclass(cls, Combinator)
}
COMBINATORS: dict[str, type[Combinator]] = {
    cls.name: cls for cls in sorted(_RULES, key=lambda cls: cls.name) if issubclass(cls, Combinator)
}
