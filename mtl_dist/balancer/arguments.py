"""Checks what a balancer is given, before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor

from mtl_dist.canonical import canonical, without_words
from mtl_dist.probes import FeatureTap, ParameterProbe, Probe
from mtl_dist.stats import TaskStats, stats_dtype
from mtl_dist.weighting import Needs, Rule, State

PARAMETERS_OF_HEADS = (
    "parameters= goes with losses, balancer(losses, parameters=...); with features and heads, give "
    "Balancer(..., probe=ParameterProbe(parameters=lambda: ...))"
)
OnNonfinite = Literal["raise", "skip", "hold"]
CountsOf = Literal["given", "equal"]


def checked_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """The task names as a tuple: unique and not empty."""
    if isinstance(tasks, (set, frozenset)):
        raise ValueError(
            "tasks is a set, which has another order in every process, so ranks and checkpoints would "
            f"disagree: give a list, got {tasks!r}"
        )
    names = tuple(tasks) if isinstance(tasks, Iterable) else ()
    if isinstance(tasks, str) or not names or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"tasks must be a sequence of names, got {tasks!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"task names must be unique, got {list(names)}")
    return names


def checked_rule(rule: Rule, tasks: tuple[str, ...]) -> Rule:
    """A rule that is the same on all ranks and in all its checkpoints: an object that does not change."""
    checked_component(rule, Rule, "weighting", "MGDA()")
    before, cpu = canonical(rule), torch.device("cpu")
    with cpu:
        weights_for_made_up_batches(rule, rule.init(tasks, cpu), len(tasks))
    if canonical(rule) != before:
        raise ValueError(
            f"weighting: init or update changed the attributes of the rule, from {before} to {rule!r}; what "
            "it learns belongs into its state, because attributes are in no checkpoint"
        )
    return rule


def weights_for_made_up_batches(rule: Rule, state: State, n: int) -> list[Tensor]:
    """`[n]` weights of the rule's first step for each of two unlike batches; fewer if it refuses them."""
    generator = torch.Generator().manual_seed(0)
    dtype = stats_dtype(torch.device("cpu"))
    found = []
    with suppress(Exception):  # what it refuses here it also refuses at the first step, with the task
        for _ in range(2):
            losses, counts = torch.rand(2, n, generator=generator, dtype=dtype) + 0.5
            gradients = torch.randn(n, n + 1, generator=generator, dtype=dtype)
            gram = gradients @ gradients.T if rule.needs > Needs.LOSSES else None
            stats = TaskStats(losses, torch.ones(n, dtype=torch.bool), gram, counts)
            found.append(rule.update(stats, state)[0])
    return found


def checked_component(component: Any, kind: type, name: str, example: str) -> None:
    """Raises unless a rule or probe is an object whose settings have the same words in every process."""
    if isinstance(component, type):
        raise ValueError(
            f"{name} is the class {component.__name__}: give an object, such as {component.__name__}()"
        )
    if not isinstance(component, kind):
        raise ValueError(
            f"{name} must be a {kind.__name__.lower()} of mtl_dist, such as {example}, or of a class derived "
            f"from {kind.__module__}.{kind.__qualname__}; got {component!r}"
        )
    for part in without_words(component):
        raise ValueError(
            f"{name}: {type(component).__name__} has the setting {part!r}, which only its address in memory "
            "tells from others, so ranks and checkpoints cannot compare it: give its class a __repr__ of its "
            "values, or make it a frozen dataclass"
        )


def checked_policy(on_nonfinite: OnNonfinite, probe: Probe) -> OnNonfinite:
    """A policy that exists and that the probe can follow."""
    if on_nonfinite not in ("raise", "skip", "hold"):
        raise ValueError(f'on_nonfinite must be "raise", "skip" or "hold", got {on_nonfinite!r}')
    if on_nonfinite == "skip" and isinstance(probe, FeatureTap):
        raise ValueError(
            'FeatureTap sees a bad gradient only when the heads already have theirs, so on_nonfinite="skip" '
            'cannot undo the step; use "hold" or "raise", or FeatureProbe()'
        )
    return on_nonfinite


def checked_window(window: int | None, probe: Probe) -> int | None:
    """A number of micro-batches over which the probe's statistics can be added, or None."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be a number of micro-batches >= 1, or None, got {window!r}")
    if window is not None and not probe.grams_add:
        raise ValueError(
            f"window={window} adds the Grams of micro-batches, and those of {type(probe).__name__} do not "
            "add, because all samples share its coordinates: use window=None, or FeatureProbe()"
        )
    return window


def checked_lag(lag: int, counts: CountsOf, on_nonfinite: OnNonfinite) -> tuple[int, CountsOf]:
    """A lag of 0 or 1 step, and how counts reach the other ranks."""
    if isinstance(lag, bool) or not isinstance(lag, int) or lag not in (0, 1):
        raise ValueError(f"lag must be 0 or 1, the steps between statistics and their use, got {lag!r}")
    if counts not in ("given", "equal"):
        raise ValueError(f'counts must be "given" or "equal", got {counts!r}')
    if counts == "equal" and not lag:
        raise ValueError(
            'counts="equal" saves the sum of counts in the forward, which lag=0 needs: give lag=1'
        )
    if lag and on_nonfinite == "skip":
        raise ValueError(
            'with lag=1 the statistics of a step are known after it, so on_nonfinite="skip" cannot undo it; '
            'use "hold" or "raise", or lag=0'
        )
    return lag, counts


def check_own_batch(rule: Rule, lag: int, window: int | None) -> None:
    """Raises `ValueError` where weights of one batch would be used for another, and must not be."""
    if rule.own_batch and (lag or window is not None):
        given = "lag=1" if lag else f"window={window}"
        raise ValueError(
            f"{rule!r} weighs by the counts of its own batch, and with {given} those of an earlier one would "
            f"be used: leave {given} out"
        )


def probe_at_parameters(probe: Probe, given: bool, window: int | None) -> ParameterProbe:
    """The probe of a call with `parameters=`: the one that was given, or the default settings.

    Raises:
        ValueError: another probe was given, or the weights hold for windows.
    """
    if isinstance(probe, ParameterProbe):
        return probe
    if given:
        raise ValueError(
            f"parameters= is measured by ParameterProbe, and the balancer has {probe!r}: leave probe= out, "
            "or give ParameterProbe(every=...)"
        )
    checked_window(window, ParameterProbe())
    return ParameterProbe()
