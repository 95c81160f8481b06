"""What the laws are tried on: every rule of `RULES`, variants of some, and combinators over a few of them.

A new rule takes part by being in `RULES`, with what `Rule.example` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from mtl_dist.testing import Subject
from mtl_dist.weighting import (
    COMBINATORS,
    DWA,
    FAMO,
    MGDA,
    RULES,
    STCH,
    AdaptiveWeight,
    Clamp,
    Combinator,
    Encodec,
    Every,
    FairGrad,
    GeneralizedMean,
    GroupDRO,
    Grouped,
    InitialLoss,
    KeepNorm,
    KLBalance,
    LastSeen,
    Normalize,
    NTKBalance,
    OfLogLosses,
    Preference,
    PrimaryAuxiliary,
    Relative,
    ReLoBRaLo,
    Rule,
    Smooth,
    SoftAdapt,
    Warmup,
)

Factory = Callable[[Sequence[str]], Rule]
Wrapper = Callable[[Rule, Sequence[str]], Combinator]


def values(tasks: Sequence[str]) -> dict[str, float]:
    """One positive number per task, which depends only on the name."""
    return {task: 0.5 + 1.7 * (int(task.removeprefix("task")) % 5) for task in tasks}


def parity(tasks: Sequence[str]) -> dict[str, list[str]]:
    """Two groups of tasks, or one."""
    halves = [[task for task in tasks if int(task.removeprefix("task")) % 2 == rest] for rest in (0, 1)]
    return {f"group{rest}": half for rest, half in enumerate(halves) if half}


# further settings that are another formula; the name begins with the rule's
VARIANTS: dict[str, Factory] = {
    "dwa(interval=1)": lambda tasks: DWA(interval=1),
    "encodec(weights)": lambda tasks: Encodec(values(tasks), decay=0.5),
    "famo(feedback=after)": lambda tasks: FAMO(feedback="after"),
    "famo(min_losses)": lambda tasks: FAMO(min_losses={task: -v for task, v in values(tasks).items()}),
    "adaptive_weight(eps)": lambda tasks: AdaptiveWeight(
        min(tasks), {task: v for task, v in values(tasks).items() if task != "task1"}, eps=1e-4
    ),
    "group_dro(validation)": lambda tasks: GroupDRO(source="validation"),
    "kl_balance(one other loss)": lambda tasks: KLBalance(
        {task: value for task, value in values(tasks).items() if task != "task2"}, warmup=20, start=1
    ),
    "ntk_balance(power=1)": lambda tasks: NTKBalance(1.0),
    "relobralo(beta=0.5)": lambda tasks: ReLoBRaLo(beta=0.5),
    "soft_adapt(rate=difference)": lambda tasks: SoftAdapt(beta=0.1, rate="difference"),
    "stch(weights)": lambda tasks: STCH(0.3, weights=values(tasks), reference=values(tasks)),
    "generalized_mean(power=inf)": lambda tasks: GeneralizedMean(float("inf")),
    "generalized_mean(power=-inf)": lambda tasks: GeneralizedMean(float("-inf")),
    "generalized_mean(power=0)": lambda tasks: GeneralizedMean(0.0),
    "generalized_mean(power=-0.5)": lambda tasks: GeneralizedMean(-0.5),
    "fairgrad(alpha=3)": lambda tasks: FairGrad(3.0),
    "mgda(l2)": lambda tasks: MGDA("l2"),
    "mgda(loss)": lambda tasks: MGDA("loss"),
    "mgda(loss+)": lambda tasks: MGDA("loss+"),
    "primary_auxiliary(several)": lambda tasks: PrimaryAuxiliary(
        [task for task in tasks if task in ("task0", "task2", "task5")]
    ),
    "initial_loss(losses)": lambda tasks: InitialLoss(losses=values(tasks)),
    "initial_loss(steps=3)": lambda tasks: InitialLoss(steps=3),
}

WRAPPERS: dict[str, Wrapper] = {
    "clamp": lambda rule, tasks: Clamp(rule, 0.1, 2.0),
    "every": lambda rule, tasks: Every(rule, 3),
    "grouped": lambda rule, tasks: Grouped(rule, MGDA(), parity(tasks)),
    "keep_norm": lambda rule, tasks: KeepNorm(rule),
    "last_seen": lambda rule, tasks: LastSeen(rule),
    "normalize": lambda rule, tasks: Normalize(rule),
    "of_log_losses": lambda rule, tasks: OfLogLosses(rule),
    "preference": lambda rule, tasks: Preference(rule, values(tasks)),
    "relative": lambda rule, tasks: Relative(rule, "task0"),
    "smooth": lambda rule, tasks: Smooth(rule, 0.9),
    "warmup": lambda rule, tasks: Warmup(rule, 2),
}

# one rule of each need, and one with state
INNER = ("inverse_loss", "inverse_grad_norm", "mgda", "initial_loss")


def build(name: str, tasks: Sequence[str]) -> Rule:
    """The example of a subject for these tasks."""
    if name in VARIANTS:
        return VARIANTS[name](tasks)
    if name in RULES:
        try:
            return RULES[name].example(tasks)
        except TypeError as error:
            raise AssertionError(
                f"{name}: {error}. A rule with required arguments overrides Rule.example"
            ) from error
    outer, _, inner = name.partition("/")
    if outer not in WRAPPERS:
        raise AssertionError(
            f"{name}: combinators need an example: add a line to WRAPPERS in tests/weighting/subjects.py"
        )
    return WRAPPERS[outer](build(inner, tasks), tasks)


SUBJECTS: tuple[str, ...] = (
    *RULES,
    *VARIANTS,
    *(f"{outer}/{inner}" for outer in COMBINATORS for inner in INNER),
)


# weight of a single task with loss L and gradient norm d, at the first step
SINGLE: dict[str, Callable[[float, float], float]] = {
    "coba": lambda loss, norm: 1.0,
    "db_mtl": lambda loss, norm: 1 / loss,
    "dwa": lambda loss, norm: 1.0,
    "dwa(interval=1)": lambda loss, norm: 1.0,
    "encodec": lambda loss, norm: 1 / norm,
    "encodec(weights)": lambda loss, norm: 1 / norm,
    "famo": lambda loss, norm: 1.0,
    "famo(min_losses)": lambda loss, norm: 1.0,
    "famo(feedback=after)": lambda loss, norm: 1.0,
    "grad_norm": lambda loss, norm: 1.0,
    "imtl_l": lambda loss, norm: 1.0,  # e⁰
    "kl_balance": lambda loss, norm: 1e-4,  # β₀, at step 0
    "log_sum_exp": lambda loss, norm: 1.0,
    "adaptive_weight": lambda loss, norm: 1.0,
    "adaptive_weight(eps)": lambda loss, norm: 1.0,
    "cosmos": lambda loss, norm: 1.0,
    "go4align": lambda loss, norm: 1.0,
    "group_dro": lambda loss, norm: 1.0,
    "group_dro(validation)": lambda loss, norm: 1.0,
    "imgrad": lambda loss, norm: 1.8 / 1.64,  # (1 + a) / (1 + a²)
    "ldc_mtl": lambda loss, norm: 1.0,
    "pbi": lambda loss, norm: 1.0,
    "pivrg": lambda loss, norm: norm ** (-4 / 3),
    "ntk_balance": lambda loss, norm: 1.0,
    "ntk_balance(power=1)": lambda loss, norm: 1.0,
    "relobralo": lambda loss, norm: 1.0,
    "relobralo(beta=0.5)": lambda loss, norm: 1.0,
    "rlw": lambda loss, norm: 1.0,
    "soft_adapt": lambda loss, norm: 1.0,
    "soft_adapt(rate=difference)": lambda loss, norm: 1.0,
    "stch": lambda loss, norm: 1.0,
    "stch(weights)": lambda loss, norm: 0.5,  # λ of task0 in the example
    "token_share": lambda loss, norm: 1.0,
    "uncertainty": lambda loss, norm: 0.5,  # ½e⁰
    "equal": lambda loss, norm: 1.0,
    "fixed": lambda loss, norm: given("fixed", "weights"),
    "generalized_mean": lambda loss, norm: 1.0,
    "generalized_mean(power=inf)": lambda loss, norm: 1.0,
    "generalized_mean(power=-inf)": lambda loss, norm: 1.0,
    "generalized_mean(power=0)": lambda loss, norm: 1.0,
    "generalized_mean(power=-0.5)": lambda loss, norm: 1.0,
    "geometric_mean": lambda loss, norm: 1.0,
    "initial_loss": lambda loss, norm: 1 / loss,
    "initial_loss(losses)": lambda loss, norm: 1 / 0.5,
    "initial_loss(steps=3)": lambda loss, norm: 1 / loss,
    "inverse_grad_norm": lambda loss, norm: 1 / norm,
    "inverse_loss": lambda loss, norm: 1 / loss,
    "mgda": lambda loss, norm: 1.0,
    "mgda(l2)": lambda loss, norm: 1 / norm,
    "mgda(loss)": lambda loss, norm: 1 / loss,
    "mgda(loss+)": lambda loss, norm: 1 / (loss * norm),
    "aligned_mtl": lambda loss, norm: 1.0,
    "cagrad": lambda loss, norm: 1.5,  # 1 + c: the worst case is the task itself
    "conflict_free": lambda loss, norm: 1.0,
    "dual_proj": lambda loss, norm: 1.0,
    "fairgrad": lambda loss, norm: 1 / norm,
    "fairgrad(alpha=3)": lambda loss, norm: norm**-1.5,
    "gradvac": lambda loss, norm: 1.0,
    "imtlg": lambda loss, norm: 1.0,
    "krum": lambda loss, norm: 1.0,
    "nash_mtl": lambda loss, norm: 1 / norm,
    "pcd": lambda loss, norm: 1.0,
    "pcgrad": lambda loss, norm: 1.0,
    "primary_auxiliary": lambda loss, norm: 1.0,
    "primary_auxiliary(several)": lambda loss, norm: 1.0,
    "upgrad": lambda loss, norm: 1.0,
    "prior_loss": lambda loss, norm: 1 / given("prior_loss", "losses"),
}
for _inner in ("inverse_loss", "inverse_grad_norm", "mgda", "initial_loss"):
    _of_inner = SINGLE[_inner]
    SINGLE |= {
        f"clamp/{_inner}": lambda loss, norm, f=_of_inner: min(max(f(loss, norm), 0.1), 2.0),
        f"every/{_inner}": _of_inner,
        f"grouped/{_inner}": _of_inner,
        f"keep_norm/{_inner}": lambda loss, norm: 1.0,
        f"normalize/{_inner}": lambda loss, norm: 1.0,
        f"of_log_losses/{_inner}": lambda loss, norm, f=_of_inner: f(loss, norm / loss) / loss,
        f"preference/{_inner}": lambda loss, norm, f=_of_inner: 0.5 * f(loss, norm),
        f"last_seen/{_inner}": _of_inner,
        f"relative/{_inner}": lambda loss, norm: 1.0,
        f"smooth/{_inner}": _of_inner,
        f"warmup/{_inner}": lambda loss, norm: 1.0,
    }

# (law, subject) -> reason, for what depends on the inner rule of a combinator; all else is in Rule.breaks
EXEMPT: dict[tuple[str, str], str] = {
    ("homogeneous", "grouped/inverse_grad_norm"): "a group whose gradients are all zero has no scale",
    ("absent", "last_seen/initial_loss"): "absent tasks take part with their latest statistics",
}


def given(name: str, setting: str) -> float:
    """What the example of a rule gives to a single task."""
    return getattr(RULES[name].example(("task0",)), setting)["task0"]


def subject(name: str) -> Subject:
    """What the laws take."""
    return Subject(partial(build, name), SINGLE.get(name))


def breaks(name: str) -> dict[str, str]:
    """Law -> reason."""
    own = build(name, ("task0", "task1")).breaks
    return {**own, **{law: reason for (law, whose), reason in EXEMPT.items() if whose == name}}
