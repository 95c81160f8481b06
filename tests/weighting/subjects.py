"""What the laws are tried on: every rule of `RULES`, variants of some, and combinators over a few of them.

A new rule takes part by being in `RULES`. One with required constructor arguments needs a line in `EXAMPLES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mtl_dist.weighting import (
    COMBINATORS,
    DWA,
    FAMO,
    MGDA,
    PCD,
    RULES,
    STCH,
    Clamp,
    CoBa,
    Combinator,
    Encodec,
    Every,
    FairGrad,
    Fixed,
    GeneralizedMean,
    InitialLoss,
    KeepNorm,
    LastSeen,
    Normalize,
    NTKBalance,
    OfLogLosses,
    Preference,
    PrimaryAuxiliary,
    PriorLoss,
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


# an example of each rule that cannot be made without arguments, or whose defaults need more steps than a test
EXAMPLES: dict[str, Factory] = {
    "coba": lambda tasks: CoBa(warmup=2, window=4),
    "fixed": lambda tasks: Fixed(values(tasks)),
    "generalized_mean": lambda tasks: GeneralizedMean(2.0),
    "pcd": lambda tasks: PCD("task0"),
    "primary_auxiliary": lambda tasks: PrimaryAuxiliary("task0"),
    "prior_loss": lambda tasks: PriorLoss(values(tasks)),
}

# further settings that are another formula; the name begins with the rule's
VARIANTS: dict[str, Factory] = {
    "dwa(interval=1)": lambda tasks: DWA(interval=1),
    "encodec(weights)": lambda tasks: Encodec(values(tasks), decay=0.5),
    "famo(feedback=after)": lambda tasks: FAMO(feedback="after"),
    "famo(min_losses)": lambda tasks: FAMO(min_losses={task: -v for task, v in values(tasks).items()}),
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
    if name in EXAMPLES:
        return EXAMPLES[name](tasks)
    if name in RULES:
        try:
            return RULES[name]()
        except TypeError as error:
            raise AssertionError(
                f"{name}: {error}. A rule with required arguments needs an example: "
                "add a line to EXAMPLES in tests/weighting/subjects.py"
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
