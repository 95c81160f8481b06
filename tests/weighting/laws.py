"""The laws that every rule keeps.

`LAWS` lists them; `DEGREES` and `SINGLE` say what two of them expect of each rule; `EXEMPT` says which rule
breaks which law by its nature, and why: such a pair is tried too, and must break.

Laws of Gram rules only (no loss rises, optimality conditions) are in files of their own beside this one.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtl_dist.stats import TaskStats
from mtl_dist.weighting import Needs, Rule, State
from tests.weighting.cases import Case, stream
from tests.weighting.subjects import build

CPU = torch.device("cpu")
RTOL = 1e-6

Law = Callable[[str, Case], None]


def run(rule: Rule, case: Case, steps: Sequence[TaskStats], state: State | None = None) -> list[Tensor]:
    """Weights of consecutive steps."""
    return [weights for weights, _ in trace(rule, case, steps, state)]


def trace(
    rule: Rule, case: Case, steps: Sequence[TaskStats], state: State | None = None
) -> list[tuple[Tensor, State]]:
    """Weights and states of consecutive steps. A rule that takes feedback is shown the next step's losses."""
    state = rule.init(case.tasks, CPU) if state is None else state
    result = []
    for stats, following in zip(steps, [*steps[1:], *steps[-1:]], strict=True):
        weights, state = rule.update(stats, state)
        if rule.observes:
            state = rule.observe(replace(following, gram=None), state)
        result.append((weights, state))
    return result


def judges(name: str, case: Case) -> list[TaskStats]:
    """Statistics for `assert_same`: only a rule that reads the Gram may have more than one right answer."""
    if build(name, case.tasks).needs is Needs.GRAM:
        return stream(case)
    return [replace(stats, gram=None) for stats in stream(case)]


def assert_same(got: Tensor, expected: Tensor, stats: TaskStats, message: str, rtol: float = RTOL) -> None:
    """Equal weights, or weights of the same update: where gradients are dependent, weights are not unique."""
    # what is below float32's range is 0 where the rule computed in float32
    if torch.allclose(got, expected, rtol=rtol, atol=torch.finfo(torch.float32).tiny):
        return
    if stats.gram is not None:
        difference = (got - expected).double()
        gap = (difference @ stats.gram.double() @ difference).clamp(min=0).sqrt()
        if gap <= rtol * (expected.double().abs() @ stats.grad_norms.double()):
            # tasks without gradient leave the update as it is: their weights must agree by themselves
            still = stats.grad_norms == 0
            if torch.allclose(got[still], expected[still], rtol=rtol, atol=0):
                return
    raise AssertionError(f"{message}: got {got.tolist()}, expected {expected.tolist()}")


def finite(name: str, case: Case) -> None:
    """Finite weights and state, one weight per task, in the dtype of the statistics; also for zero Grams."""
    for moved in (case, replace(case, gram=torch.zeros_like(case.gram))):
        for weights, state in trace(build(name, case.tasks), moved, stream(moved)):
            assert weights.shape == (case.n,), weights.shape
            assert weights.dtype == torch.float64, weights.dtype
            assert weights.isfinite().all(), weights
            assert all(tensor.isfinite().all() for tensor in state.values()), state


def pure(name: str, case: Case) -> None:
    """Same input, same output, bit for bit; nothing of the input is modified or handed out as weights."""
    rule = build(name, case.tasks)
    state = rule.init(case.tasks, CPU)
    for stats in stream(case):
        kept_stats, kept_state = clone(stats), {key: value.clone() for key, value in state.items()}
        weights, after = rule.update(stats, state)
        weights_again, after_again = rule.update(stats, state)
        assert torch.equal(weights, weights_again), (weights, weights_again)
        assert_equal_states(after, after_again)
        if rule.observes:
            observed = rule.observe(stats, after)
            assert_equal_states(after, after_again)
            assert_equal_states(observed, rule.observe(stats, after))
            after = observed
        assert_equal_states(state, kept_state)
        for field in ("losses", "present", "gram", "counts"):
            assert torch.equal(getattr(stats, field), getattr(kept_stats, field)), field
        given = (*state.values(), *after.values(), stats.losses, stats.gram)
        assert weights.data_ptr() not in {tensor.data_ptr() for tensor in given}, "weights share memory"
        state = after


def permutation(name: str, case: Case) -> None:
    """Weights go with their tasks, in whatever order the tasks are named."""
    order = list(range(case.n))[::-1]
    order = order[1:] + order[:1]
    permuted = case.only(order)
    steps = stream(case)
    expected = run(build(name, case.tasks), case, steps)
    got = run(build(name, permuted.tasks), permuted, stream(permuted))
    for a, b, stats in zip(got, expected, judges(name, permuted), strict=True):
        assert_same(a, b[order], stats, "permuted tasks")


def homogeneous(name: str, case: Case) -> None:
    """Losses times s: weights times s^a. Gradients times s: weights times s^b. (a, b) from `DEGREES`."""
    loss_degree, gradient_degree = degrees(name)
    expected = run(build(name, case.tasks), case, stream(case))
    for scale in (1e-12, 1e12):
        for power, moved in (
            (loss_degree, replace(case, losses=scale * case.losses)),
            (gradient_degree, replace(case, gram=scale**2 * case.gram)),
        ):
            for got, want, stats in zip(
                run(build(name, case.tasks), moved, stream(moved)), expected, judges(name, case), strict=True
            ):
                assert_same(got / scale**power, want, stats, f"scale {scale:g} should give degree {power}")


def absent(name: str, case: Case) -> None:
    """A task that is never present changes nothing for the others; one that is absent for a while keeps its
    state, and what is returned for it is finite. So for all of them at once."""
    missing = case.n // 2
    others = [i for i in range(case.n) if i != missing]
    if others:
        alone = case.only(others)
        expected = run(build(name, alone.tasks), alone, stream(alone))
        got = run(build(name, case.tasks), case, [without(stats, missing) for stats in stream(case)])
        for a, b, stats in zip(got, expected, judges(name, alone), strict=True):
            assert a.isfinite().all(), a
            assert_same(a[others], b, stats, f"{case.tasks[missing]} absent")
    rule = build(name, case.tasks)
    seen, later, *_ = stream(case)
    ((_, before),) = trace(rule, case, [seen])
    ((weights, after),) = trace(rule, case, [without(later, missing)], before)
    assert weights.isfinite().all(), weights
    for key, value in before.items():
        for dim, size in enumerate(value.shape):
            if size == case.n:
                a, b = (tensor.select(dim, missing) for tensor in (after[key], value))
                assert torch.equal(a, b), f"state {key} of an absent task moved from {b} to {a}"
    for state in (rule.init(case.tasks, CPU), before):
        ((weights, after),) = trace(rule, case, [without(later, *range(case.n))], state)
        assert weights.isfinite().all(), f"nobody present: {weights}"
        per_task = {key: value for key, value in state.items() if case.n in value.shape}
        assert_equal_states({key: after[key] for key in per_task}, per_task)


def single(name: str, case: Case) -> None:
    """With one task the weight is what the rule means there: `SINGLE`, of its loss and gradient norm."""
    if case.n != 1:
        return
    stats = stream(case)[0]
    got = run(build(name, case.tasks), case, [stats])[0].item()
    want = SINGLE[name](stats.losses.item(), stats.grad_norms.item())
    assert abs(got - want) <= RTOL * abs(want), f"one task: got {got}, expected {want}"


def fixed_layout(name: str, case: Case) -> None:
    """The state keeps keys, shapes and dtypes that `init` gave it."""
    rule = build(name, case.tasks)
    layout = describe(rule.init(case.tasks, CPU))
    for _, state in trace(rule, case, stream(case)):
        assert describe(state) == layout, f"{describe(state)} != {layout}"


def resume(name: str, case: Case) -> None:
    """Saved at step 2, loaded into a fresh object of the same settings, continued: the same bits."""
    steps = stream(case)
    straight = trace(build(name, case.tasks), case, steps)
    file = io.BytesIO()
    torch.save(straight[1][1], file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    continued = trace(build(name, case.tasks), case, steps[2:], loaded)
    for (got, state), (want, want_state) in zip(continued, straight[2:], strict=True):
        assert torch.equal(got, want), (got, want)
        assert_equal_states(state, want_state)


def single_precision(name: str, case: Case) -> None:
    """On a device without float64 everything is float32: finite, and near the float64 weights where the
    problem is well conditioned."""
    with mock.patch("mtl_dist.weighting.helpers.stats_dtype", return_value=torch.float32):
        rule = build(name, case.tasks)
        layout = describe(rule.init(case.tasks, CPU))
        results = trace(rule, case, [to_float32(stats) for stats in stream(case)])
    for weights, state in results:
        assert weights.dtype == torch.float32, weights.dtype
        assert weights.isfinite().all(), weights
        assert describe(state) == layout, f"{describe(state)} != {layout}"
    if case.name.startswith("random") and case.n < 64:
        for (got, _), want, stats in zip(
            results, run(build(name, case.tasks), case, stream(case)), judges(name, case), strict=True
        ):
            assert_same(got.double(), want, stats, "float32", rtol=1e-3)


def needs(name: str, case: Case) -> None:
    """A rule reads no more than it says at that step: no Gram, or only its diagonal."""
    rule = build(name, case.tasks)
    steps = stream(case)
    measured = [measure(stats, rule.needs_at(step)) for step, stats in enumerate(steps)]
    assert all(rule.needs_at(step) <= rule.needs for step in range(len(steps)))
    full = trace(rule, case, steps)
    for (got, state), (want, want_state) in zip(trace(rule, case, measured), full, strict=True):
        assert torch.equal(got, want), (got, want)
        assert_equal_states(state, want_state)


def any_sign(name: str, case: Case) -> None:
    """Losses of zero and below are refused by the balancer (`positive_losses`), or harmless."""
    rule = build(name, case.tasks)
    if rule.positive_losses:
        return
    signs = torch.tensor([(-1.0, 0.0, 1.0)[i % 3] for i in range(case.n)], dtype=torch.float64)
    for weights, state in trace(
        rule, case, [replace(stats, losses=stats.losses * signs) for stats in stream(case)]
    ):
        assert weights.isfinite().all(), weights
        assert all(tensor.isfinite().all() for tensor in state.values()), state


class NoHostWait(TorchDispatchMode):
    """Refuses what makes a GPU wait for the host: reading a value, or a size that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)
        assert not by_mask, "waits for the host: an index of booleans"
        assert func.overloadpacket not in waits, f"waits for the host: {func}"
        return func(*args, **(kwargs or {}))


def no_host_wait(name: str, case: Case) -> None:
    """Closed forms stay on the device. Rules that read the Gram may solve on the CPU (`on_present`)."""
    rule = build(name, case.tasks)
    if rule.needs is Needs.GRAM:
        return
    state, steps = rule.init(case.tasks, CPU), stream(case)
    with NoHostWait():
        trace(rule, case, steps, state)


LAWS: dict[str, Law] = {
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

# (a, b): weights go with the a-th power of a factor on all losses, and the b-th of one on all gradients
DEGREES: dict[str, tuple[float, float]] = {
    "coba": (0, 0),
    "db_mtl": (-1, 0),
    "dwa": (0, 0),
    "encodec": (0, -1),
    "famo": (0, 0),
    "grad_norm": (0, 0),
    "imtl_l": (0, 0),
    "log_sum_exp": (0, 0),
    "ntk_balance": (0, 0),
    "relobralo": (0, 0),
    "rlw": (0, 0),
    "soft_adapt": (0, 0),
    "stch": (0, 0),
    "token_share": (0, 0),
    "uncertainty": (0, 0),
    "equal": (0, 0),
    "fixed": (0, 0),
    "generalized_mean": (0, 0),
    "geometric_mean": (0, 0),
    "initial_loss": (-1, 0),
    "initial_loss(losses)": (0, 0),
    "inverse_grad_norm": (0, -1),
    "inverse_loss": (-1, 0),
    "mgda": (0, 0),
    "prior_loss": (0, 0),
    # rules of the Gram
    "aligned_mtl": (0, 0),
    "cagrad": (0, 0),
    "conflict_free": (0, 0),
    "dual_proj": (0, 0),
    "fairgrad": (0, -1),
    "fairgrad(alpha=3)": (0, -1.5),
    "gradvac": (0, 0),
    "imtlg": (0, 0),
    "krum": (0, 0),
    "mgda(l2)": (0, -1),
    "mgda(loss)": (-1, 0),
    "mgda(loss+)": (-1, -1),
    "nash_mtl": (0, -1),
    "pcd": (0, 0),
    "pcgrad": (0, 0),
    "primary_auxiliary": (0, 0),
    "upgrad": (0, 0),
}

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
    "log_sum_exp": lambda loss, norm: 1.0,
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
    "fixed": lambda loss, norm: 0.5,  # what the example gives to task0
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
    "prior_loss": lambda loss, norm: 1 / 0.5,
}
for _inner in ("inverse_loss", "inverse_grad_norm", "mgda", "initial_loss"):
    _of_inner = SINGLE[_inner]
    SINGLE |= {
        f"clamp/{_inner}": lambda loss, norm, f=_of_inner: min(max(f(loss, norm), 0.1), 2.0),
        f"every/{_inner}": _of_inner,
        f"keep_norm/{_inner}": lambda loss, norm: 1.0,
        f"normalize/{_inner}": lambda loss, norm: 1.0,
        f"of_log_losses/{_inner}": lambda loss, norm, f=_of_inner: f(loss, norm / loss) / loss,
        f"preference/{_inner}": lambda loss, norm, f=_of_inner: 0.5 * f(loss, norm),
        f"last_seen/{_inner}": _of_inner,
        f"relative/{_inner}": lambda loss, norm: 1.0,
        f"smooth/{_inner}": _of_inner,
        f"warmup/{_inner}": lambda loss, norm: 1.0,
    }


@dataclass(frozen=True)
class Exempt:
    """Why a law does not hold for a rule, and on which cases it breaks (None: on some)."""

    reason: str
    cases: tuple[str, ...] | None = None


_ORDERS = "random orders are drawn by position, not by name"
_BOUNDS = "the bounds are in units of the weights"
_UNITS = "a setting is in units of the losses"
_LEARNS = "it starts from weight 1 and learns the losses' scale"
_COIN = "its coin is tossed, and looked at, on the host: no device takes part"
_DRAWS = "draws go by position, not by task"
_STARTS = "equal weights have degree 0, those that follow have not"

EXEMPT: dict[tuple[str, str], Exempt] = {
    ("absent", "last_seen/initial_loss"): Exempt("absent tasks take part with their latest statistics"),
    ("permutation", "gradvac"): Exempt(_ORDERS),
    ("permutation", "pcgrad"): Exempt(_ORDERS),
    ("permutation", "krum"): Exempt("of three tasks the nearest two have equal scores; the first is taken"),
    ("homogeneous", "clamp/inverse_loss"): Exempt(_BOUNDS),
    ("homogeneous", "clamp/inverse_grad_norm"): Exempt(_BOUNDS),
    ("homogeneous", "clamp/initial_loss"): Exempt(_BOUNDS),
    ("homogeneous", "warmup/inverse_loss"): Exempt(_STARTS),
    ("homogeneous", "warmup/inverse_grad_norm"): Exempt(_STARTS),
    ("homogeneous", "warmup/initial_loss"): Exempt(_STARTS),
    ("homogeneous", "famo(min_losses)"): Exempt(_UNITS),
    ("homogeneous", "log_sum_exp"): Exempt(_UNITS),
    ("homogeneous", "soft_adapt(rate=difference)"): Exempt(_UNITS),
    ("homogeneous", "stch"): Exempt(_UNITS),
    ("homogeneous", "stch(weights)"): Exempt(_UNITS),
    ("homogeneous", "imtl_l"): Exempt(_LEARNS),
    ("homogeneous", "uncertainty"): Exempt(_LEARNS),
    ("permutation", "rlw"): Exempt(_DRAWS),
    ("absent", "rlw"): Exempt(_DRAWS),
    ("no_host_wait", "relobralo"): Exempt(_COIN),
    ("no_host_wait", "relobralo(beta=0.5)"): Exempt(_COIN),
}


def degrees(name: str) -> tuple[float, float]:
    """Expected degrees; a combinator has its inner rule's, but for those that fix the scale."""
    if name in DEGREES:
        return DEGREES[name]
    outer, _, inner = name.partition("/")
    if inner:
        if outer == "of_log_losses":  # G/L² has degree -2 in the losses, and the weights are divided by L
            loss_degree, gradient_degree = degrees(inner)
            return loss_degree - gradient_degree - 1, gradient_degree
        return (0, 0) if outer in ("keep_norm", "normalize", "relative") else degrees(inner)
    base = name.partition("(")[0]
    if base in DEGREES:
        return DEGREES[base]
    raise AssertionError(f"{name}: state its degrees in DEGREES in tests/weighting/laws.py, or an exemption")


def clone(stats: TaskStats) -> TaskStats:
    gram = None if stats.gram is None else stats.gram.clone()
    return replace(stats, losses=stats.losses.clone(), gram=gram)


def to_float32(stats: TaskStats) -> TaskStats:
    gram = None if stats.gram is None else stats.gram.float()
    return replace(stats, losses=stats.losses.float(), gram=gram, counts=stats.counts.float())


def without(stats: TaskStats, *tasks: int) -> TaskStats:
    """The statistics of a step where no rank had a sample of these tasks."""
    present = stats.present.clone()
    present[list(tasks)] = False
    return replace(
        stats,
        losses=stats.losses.masked_fill(~present, 1.0),
        present=present,
        gram=stats.require_gram() * torch.outer(present, present),
        counts=stats.counts * present,
    )


def measure(stats: TaskStats, need: Needs) -> TaskStats:
    """What the balancer would have measured for this need. Off the diagonal, a decoy replaces what is not."""
    if need is Needs.LOSSES:
        return replace(stats, gram=None)
    if need is Needs.NORMS:
        return replace(stats, gram=torch.diag(stats.require_gram().diagonal()))
    return stats


def describe(state: State) -> dict[str, tuple[tuple[int, ...], torch.dtype, str]]:
    return {key: (tuple(value.shape), value.dtype, value.device.type) for key, value in state.items()}


def assert_equal_states(got: State, expected: State) -> None:
    assert got.keys() == expected.keys(), f"{got.keys()} != {expected.keys()}"
    for key, value in expected.items():
        assert torch.equal(got[key], value), f"state {key}: {got[key]} != {value}"
