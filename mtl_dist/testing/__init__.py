"""Checks for rules of one's own: the laws that every rule of the library keeps.

    from mtl_dist.testing import check_rule

    def test_largest():
        check_rule(Largest())

It works under any test runner. `LAWS` and `zoo()` are there for tests that report law by law.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mtl_dist.testing.cases import Case as Case
from mtl_dist.testing.cases import stream as stream
from mtl_dist.testing.cases import zoo as zoo
from mtl_dist.testing.compare import Factory as Factory
from mtl_dist.testing.compare import OfOneTask as OfOneTask
from mtl_dist.testing.compare import Subject as Subject
from mtl_dist.testing.laws import LAWS as LAWS
from mtl_dist.weighting import Rule


def check_rule(
    rule: Rule | Factory,
    *,
    laws: Collection[str] = tuple(LAWS),
    single: OfOneTask | None = None,
    breaks: Mapping[str, str] | None = None,
) -> None:
    """Tries every law of `LAWS` on a rule, on about thirty cases of losses and gradients.

    The cases have 1 to 64 tasks named `task0`, `task1` and so on, in several orders. They have dependent,
    conflicting, duplicate and zero gradients, and scales from 1e-12 to 1e12.

    Args:
        rule: the rule. If its settings name tasks, give a function that makes a rule for given task names,
            such as `lambda tasks: Fixed({task: 1.0 for task in tasks})`.
        laws: names of the laws to try.
        single: the weight that a single task gets at the first step, from its loss and the norm of its
            gradient. None: any positive number.
        breaks: law that the rule does not keep by its nature -> the reason. None: those of `Rule.breaks`. The
            rule must break them, so that the list stays true.

    Raises:
        AssertionError: the rule breaks laws, or keeps one that it should break. The message names laws and
            cases.
        RuntimeError: the rule raised an error, or Python runs without assertions (`python -O`), so that
            nothing could be checked.
        ValueError: a law has no such name.
    """
    if not __debug__:
        raise RuntimeError(
            "check_rule checks nothing under python -O, which removes assertions: leave out -O"
        )
    subject = Subject.of(rule, single)
    known = subject.build(("task0", "task1")).breaks if breaks is None else breaks
    unknown = sorted({*laws, *known} - set(LAWS))
    if unknown:
        raise ValueError(f"no law {unknown[0]!r}; the laws are {', '.join(LAWS)}")
    problems = []
    for law in laws:
        broken = broken_on(law, subject, zoo())
        if law in known and not broken:
            problems.append(f"{law}: it keeps this law after all; remove it from breaks ({known[law]})")
        if law not in known:
            problems += [f"{law}, on the case {case!r}: {text}" for case, text in broken.items()]
    if problems:
        name = repr(subject.build(("task0",)))
        shown = "\n".join(problems[:20])
        more = f"\nand {len(problems) - 20} more" if len(problems) > 20 else ""
        raise AssertionError(f"{name} breaks {len(problems)} of its laws:\n{shown}{more}")


def broken_on(law: str, subject: Subject, cases: Collection[Case]) -> dict[str, str]:
    """The cases on which a subject breaks a law, with the reason.

    Raises:
        RuntimeError: the rule raised an error on a case.
    """
    broken = {}
    for case in cases:
        try:
            LAWS[law](subject, case)
        except AssertionError as error:
            broken[case.name] = str(error)
        except Exception as error:
            raise RuntimeError(
                f"the rule raised {type(error).__name__} in the law {law}, on the case {case.name!r} with "
                f"the tasks {list(case.tasks[:3])}...: {error}. If its settings name tasks, give "
                "check_rule a function from task names to the rule"
            ) from error
    return broken
