"""The state of a balancer as one flat dictionary: tensors, strings and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mtl_dist.balancer.progress import RuleProgress
from mtl_dist.canonical import canonical
from mtl_dist.probes import ProbeMemory

_STATE, _WINDOW, _PROBE = "rule.", "window.", "probe."


def read_state(progress: RuleProgress, memory: Any) -> dict[str, Any]:
    """Everything that the next step depends on, of the rule and of the probe's memory."""
    state = {_STATE + key: value.detach().clone() for key, value in progress.state.items()}
    window = {_WINDOW + key: value.clone() for key, value in progress.window_state().items()}
    header = {"tasks": list(progress.tasks), "rule": canonical(progress.rule), "step": progress.step}
    kept = memory.state() if isinstance(memory, ProbeMemory) else {}
    return {
        **header,
        "weights": progress.weights.clone(),
        **state,
        **window,
        **{_PROBE + key: value for key, value in kept.items()},
    }


def write_state(progress: RuleProgress, memory: Any, given: Mapping[str, Any]) -> None:
    """Continues from what `read_state` gave. What another probe had kept is left out.

    Raises:
        ValueError: it belongs to other tasks or another rule; nothing is changed then.
    """
    _check_same(read_state(progress, None), given)
    if isinstance(memory, ProbeMemory):
        memory.restore(_under(_PROBE, given))
    window = None if progress.window is None else _under(_WINDOW, given)
    weights = given["weights"].detach().clone()
    progress.restart(_under(_STATE, given), weights, int(given["step"]), window)


def _under(prefix: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v.detach().clone() for k, v in state.items() if k.startswith(prefix)}


def _check_same(expected: Mapping[str, Any], given: Any) -> None:
    """Raises `ValueError` unless `given` has the tasks, rule, keys and shapes of `expected`, undamaged."""
    if not isinstance(given, Mapping):
        raise ValueError(f"a state is a mapping, as state_dict() gives it, got {type(given).__name__}")
    for key in ("tasks", "rule"):
        if given.get(key) != expected[key]:
            raise ValueError(
                f"this state belongs to {key} {given.get(key)!r}, the balancer has {expected[key]!r}"
            )
    keys = {key for key in given if not str(key).startswith(_PROBE)}
    missing, unknown = sorted(expected.keys() - keys), sorted(keys - expected.keys())
    if missing or unknown:
        raise ValueError(f"state with missing keys {missing} and unknown keys {unknown}")
    for key, value in expected.items():
        if isinstance(value, Tensor) and getattr(given[key], "shape", None) != value.shape:
            shape = getattr(given[key], "shape", type(given[key]).__name__)
            raise ValueError(f"state {key!r} must have shape {tuple(value.shape)}, got {shape}")
    step = given["step"]
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"state 'step' must be a number of steps >= 0, got {step!r}: the state is damaged")
    if not given["weights"].isfinite().all():
        raise ValueError(
            f"state 'weights' must be finite, got {given['weights'].tolist()}: the state is damaged"
        )
