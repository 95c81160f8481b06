"""The laws that every rule keeps: `LAWS`.

A law is a function of a subject and a case that raises `AssertionError` if the rule breaks it there. What a
rule promises about itself (`needs`, `degrees`, `positive_losses`) is read from the rule. A rule that does not
keep a law by its nature says so in `Rule.breaks`.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mtl_dist.canonical import canonical, without_words
from mtl_dist.testing.cases import Case, stream
from mtl_dist.testing.compare import (
    CPU,
    RTOL,
    Subject,
    assert_equal_states,
    assert_same,
    clone,
    judges,
    layout_of,
    measure,
    run,
    to_float32,
    trace,
    without,
)
from mtl_dist.weighting import Needs

Law = Callable[[Subject, Case], None]


def value(subject: Subject, case: Case) -> None:
    """A rule is its class and its settings, and stays what it is: ranks and checkpoints compare it."""
    if case.n > 8:
        return  # nothing here depends on size, and solvers take their time
    rule = subject.build(case.tasks)
    before, nameless = canonical(rule), without_words(rule)
    assert not nameless, f"only its address in memory tells {nameless[0]!r} from others: give it a __repr__"
    assert canonical(copy.deepcopy(rule)) == before, "a copy has other settings"
    trace(rule, case, stream(case))
    assert canonical(rule) == before, f"training changed its attributes from {before} to {canonical(rule)}"


def finite(subject: Subject, case: Case) -> None:
    """Finite weights and state, one weight per task, in the dtype of the statistics; also for zero Grams."""
    for moved in (case, replace(case, gram=torch.zeros_like(case.gram))):
        for weights, state in trace(subject.build(case.tasks), moved, stream(moved)):
            assert weights.shape == (case.n,), f"{case.n} tasks, but weights of shape {tuple(weights.shape)}"
            assert weights.dtype == torch.float64, f"weights are {weights.dtype}, the statistics float64"
            assert weights.isfinite().all(), f"weights {weights.tolist()}"
            bad = [key for key, tensor in state.items() if not tensor.isfinite().all()]
            assert not bad, f"state {bad[0]} is {state[bad[0]]}"


def pure(subject: Subject, case: Case) -> None:
    """Same input, same output, bit for bit, also from another object of the same settings.

    Nothing of the input is modified or handed out as weights.
    """
    rule, other = subject.build(case.tasks), subject.build(case.tasks)
    state = rule.init(case.tasks, CPU)
    assert_equal_states(other.init(case.tasks, CPU), state)
    for stats in stream(case):
        kept_stats, kept_state = clone(stats), {key: tensor.clone() for key, tensor in state.items()}
        weights, after = rule.update(stats, state)
        for again in (rule, other):
            weights_again, after_again = again.update(stats, state)
            assert torch.equal(weights, weights_again), f"first {weights}, then {weights_again}"
            assert_equal_states(after, after_again)
        if rule.observes:
            observed = rule.observe(stats, after)
            assert_equal_states(after, after_again)
            assert_equal_states(observed, rule.observe(stats, after))
            after = observed
        assert_equal_states(state, kept_state)
        for field in ("losses", "present", "gram", "counts"):
            assert torch.equal(getattr(stats, field), getattr(kept_stats, field)), f"update changed {field}"
        given = (*state.values(), *after.values(), stats.losses, stats.require_gram())
        assert weights.data_ptr() not in {tensor.data_ptr() for tensor in given}, "weights share memory"
        state = after


def permutation(subject: Subject, case: Case) -> None:
    """Weights go with their tasks, in whatever order the tasks are named."""
    order = list(range(case.n))[::-1]
    order = order[1:] + order[:1]
    permuted = case.only(order)
    expected = run(subject.build(case.tasks), case, stream(case))
    rule = subject.build(permuted.tasks)
    for a, b, stats in zip(
        run(rule, permuted, stream(permuted)), expected, judges(rule, permuted), strict=True
    ):
        assert_same(a, b[order], stats, "permuted tasks")


def homogeneous(subject: Subject, case: Case) -> None:
    """Losses times s: weights times s^a. Gradients times s: weights times s^b. (a, b) is `Rule.degrees`."""
    degrees = subject.build(case.tasks).degrees
    if degrees is not None:
        has_degrees(subject, case, degrees)


def has_degrees(subject: Subject, case: Case, degrees: tuple[float, float]) -> None:
    """The law `homogeneous`, for given degrees."""
    rule = subject.build(case.tasks)
    expected = run(rule, case, stream(case))
    for scale in (1e-12, 1e12):
        for power, moved in zip(
            degrees,
            (replace(case, losses=scale * case.losses), replace(case, gram=scale**2 * case.gram)),
            strict=True,
        ):
            moved_weights = run(subject.build(case.tasks), moved, stream(moved))
            for got, want, stats in zip(moved_weights, expected, judges(rule, case), strict=True):
                assert_same(got / scale**power, want, stats, f"scale {scale:g} should give degree {power:g}")


def absent(subject: Subject, case: Case) -> None:
    """A task that is never present changes nothing for the others.

    One that is absent for a while keeps its state, and what is returned for it is finite. So for all of them
    at once.
    """
    missing = case.n // 2
    others = [i for i in range(case.n) if i != missing]
    if others:
        alone = case.only(others)
        judge = subject.build(alone.tasks)
        expected = run(judge, alone, stream(alone))
        got = run(subject.build(case.tasks), case, [without(stats, missing) for stats in stream(case)])
        for a, b, stats in zip(got, expected, judges(judge, alone), strict=True):
            assert a.isfinite().all(), f"weights {a.tolist()} where {case.tasks[missing]} is absent"
            assert_same(a[others], b, stats, f"{case.tasks[missing]} absent")
    rule = subject.build(case.tasks)
    seen, later, *_ = stream(case)
    ((_, before),) = trace(rule, case, [seen])
    ((weights, after),) = trace(rule, case, [without(later, missing)], before)
    assert weights.isfinite().all(), f"weights {weights.tolist()} where {case.tasks[missing]} is absent"
    for key, tensor in before.items():
        for dim, size in enumerate(tensor.shape):
            if size == case.n:
                a, b = (each.select(dim, missing) for each in (after[key], tensor))
                assert torch.equal(a, b), f"state {key} of an absent task moved from {b} to {a}"
    for state in (rule.init(case.tasks, CPU), before):
        ((weights, after),) = trace(rule, case, [without(later, *range(case.n))], state)
        assert weights.isfinite().all(), f"nobody present: {weights.tolist()}"
        per_task = {key: tensor for key, tensor in state.items() if case.n in tensor.shape}
        assert_equal_states({key: after[key] for key in per_task}, per_task)


def single(subject: Subject, case: Case) -> None:
    """With one task the weight is positive, and what the subject promises, if it promises something."""
    if case.n != 1:
        return
    stats = stream(case)[0]
    got = run(subject.build(case.tasks), case, [stats])[0].item()
    assert got > 0, f"one task: got the weight {got}, which does not train it"
    if subject.single is not None:
        want = subject.single(stats.losses.item(), stats.grad_norms.item())
        assert abs(got - want) <= RTOL * abs(want), f"one task: got {got}, expected {want}"


def fixed_layout(subject: Subject, case: Case) -> None:
    """The state keeps keys, shapes and dtypes that `init` gave it."""
    rule = subject.build(case.tasks)
    layout = layout_of(rule.init(case.tasks, CPU))
    for _, state in trace(rule, case, stream(case)):
        assert layout_of(state) == layout, f"state {layout_of(state)}, init gave {layout}"


def resume(subject: Subject, case: Case) -> None:
    """Saved at step 2, loaded into a fresh object of the same settings, continued: the same bits."""
    steps = stream(case)
    straight = trace(subject.build(case.tasks), case, steps)
    file = io.BytesIO()
    torch.save(straight[1][1], file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    continued = trace(subject.build(case.tasks), case, steps[2:], loaded)
    for (got, state), (want, want_state) in zip(continued, straight[2:], strict=True):
        assert torch.equal(got, want), f"resumed {got}, straight {want}"
        assert_equal_states(state, want_state)


def single_precision(subject: Subject, case: Case) -> None:
    """On a device without float64 everything is float32, and finite.

    Where the problem is well conditioned, the weights are near those of float64.
    """
    rule = subject.build(case.tasks)
    # the balancer moves the state to the device of the statistics
    start = {k: v.float() if v.is_floating_point() else v for k, v in rule.init(case.tasks, CPU).items()}
    results = trace(rule, case, [to_float32(stats) for stats in stream(case)], start)
    for weights, state in results:
        assert weights.dtype == torch.float32, f"weights are {weights.dtype}, the statistics float32"
        assert weights.isfinite().all(), f"float32 weights {weights.tolist()}"
        assert layout_of(state) == layout_of(start), f"state {layout_of(state)}, it was {layout_of(start)}"
    if case.name.startswith("random") and case.n < 64:
        expected = run(subject.build(case.tasks), case, stream(case))
        for (got, _), want, stats in zip(results, expected, judges(rule, case), strict=True):
            assert_same(got.double(), want, stats, "float32", rtol=1e-3)


def needs(subject: Subject, case: Case) -> None:
    """A rule reads no more than it says at that step: no Gram, or only its diagonal."""
    rule = subject.build(case.tasks)
    steps = stream(case)
    assert all(rule.needs_at(step) <= rule.needs for step in range(len(steps))), "needs_at is above needs"
    measured = [measure(stats, rule.needs_at(step)) for step, stats in enumerate(steps)]
    full = trace(rule, case, steps)
    for (got, state), (want, want_state) in zip(trace(rule, case, measured), full, strict=True):
        assert torch.equal(got, want), f"with what it needs {got}, with everything {want}"
        assert_equal_states(state, want_state)


def any_sign(subject: Subject, case: Case) -> None:
    """Losses of zero and below are refused by the balancer (`positive_losses`), or harmless."""
    rule = subject.build(case.tasks)
    if rule.positive_losses:
        return
    signs = torch.tensor([(-1.0, 0.0, 1.0)[i % 3] for i in range(case.n)], dtype=torch.float64)
    signed = [replace(stats, losses=stats.losses * signs) for stats in stream(case)]
    for weights, state in trace(rule, case, signed):
        assert weights.isfinite().all(), f"losses <= 0: weights {weights.tolist()}; set positive_losses"
        assert all(tensor.isfinite().all() for tensor in state.values()), f"losses <= 0: state {state}"


class NoHostWait(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch 2.13 leaves it unannotated
    """Refuses what makes a GPU wait for the host: reading a value, or a size that depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator, unless it waits."""
        by_mask = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)
        assert not by_mask, "waits for the host: an index of booleans; use torch.where"
        assert func.overloadpacket not in waits, f"waits for the host: {func}; use torch.where"
        return func(*args, **(kwargs or {}))


def no_host_wait(subject: Subject, case: Case) -> None:
    """Closed forms stay on the device. Rules that read the Gram may solve on the CPU (`on_present`)."""
    rule = subject.build(case.tasks)
    if rule.needs is Needs.GRAM:
        return
    state, steps = rule.init(case.tasks, CPU), stream(case)
    with NoHostWait():  # type: ignore[no-untyped-call]  # as above
        trace(rule, case, steps, state)


LAWS: dict[str, Law] = {
    "value": value,
    "finite": finite,
    "pure": pure,
    "permutation": permutation,
    "homogeneous": homogeneous,
    "absent": absent,
    "single": single,
    "fixed_layout": fixed_layout,
    "resume": resume,
    "single_precision": single_precision,
    "needs": needs,
    "any_sign": any_sign,
    "no_host_wait": no_host_wait,
}
