"""The contract of a rule, documented once: pure functions of (statistics, state).

A rule is a frozen dataclass of hyperparameters. It never sees a model, a process group or a parameter. Its
memory is a `State`, a flat dictionary of tensors whose shapes are fixed by `init`; the state is its own
checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl_dist.stats import TaskStats, stats_dtype

State = dict[str, Tensor]
Array = NDArray[np.float64]
EPS = float(
    np.finfo(np.float64).eps
)  # what solvers call zero is a small multiple of it, relative to the problem

RIDGE = 1e-8  # of solvers, relative to the diagonal; rounding moves x by about EPS / RIDGE, and not more


class Needs(IntEnum):
    """What a rule reads of the statistics. A rule that reads only losses costs no gradient probe."""

    LOSSES = 0
    NORMS = 1
    GRAM = 2


class Rule(ABC):
    """A weighting rule.

    Attributes:
        needs: what `update` reads of the statistics.
        positive_losses: whether `update` takes logarithms or powers of losses. The balancer then raises
            `ValueError` on every rank for a loss <= 0, naming task, value and rule.
        observes: whether the rule also learns from losses measured outside the step (`observe`).
    """

    needs: ClassVar[Needs] = Needs.LOSSES
    positive_losses: ClassVar[bool] = False
    observes: ClassVar[bool] = False

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """State before the first step: tensors of fixed shapes on `device`, constants included.

        Args:
            tasks: the n task names, in the order of every vector.
            device: where the statistics will be.

        Raises:
            ValueError: a hyperparameter names an unknown task or leaves one out.
        """
        return {}

    @abstractmethod
    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """Weights for this step, and the state for the next.

        Contract, tested for every rule in `RULES`:

        * Statistics and state are not modified; the same input gives the same output, bit for bit, so all
          ranks agree. Random rules draw from a generator seeded by `stats.step`.
        * Absent tasks (`~stats.present`) take no part: the weights of the others are what the rule gives for
          them alone. Whatever is returned for absent tasks must be finite; the balancer sets it to 0.
        * State of an absent task is kept.
        * Closed forms stay on the device and never wait for the host; iterative solvers may run on the CPU
          in float64 (`on_present`).
        * Tests for zero are relative, never absolute.

        Args:
            stats: global statistics, finite, the same on every rank.
            state: what `init` or the previous `update` returned.

        Returns:
            `[n]` weights in the dtype of the statistics, and a state with the keys and shapes of `state`.
        """

    def observe(self, stats: TaskStats, state: State) -> State:
        """Learns from losses measured outside the step: validation losses, or the batch's after the step.

        Which ones a rule wants is said in its own docstring. The contract is that of `update`.

        Args:
            stats: global statistics of those losses; neither gradients nor `step` are read.
            state: what `init`, `update` or `observe` returned.

        Returns:
            A state with the keys and shapes of `state`.

        Raises:
            ValueError: the rule learns from the losses of the step alone (`observes` is False).
        """
        raise ValueError(f"{self!r} takes no losses from outside the step: do not call observe")

    def needs_at(self, step: int) -> Needs:
        """What `update` will read at `step`; less than `needs` where a measurement is to be left out."""
        return self.needs


@dataclass(frozen=True)
class Combinator(Rule):
    """A rule made of another one. Reads what the inner rule reads.

    Attributes:
        rule: the inner rule.
    """

    rule: Rule

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # an instance's answer, where plain rules have the class's
        """What the inner rule reads."""
        return self.rule.needs

    @property
    def positive_losses(self) -> bool:  # type: ignore[override]  # as above
        """Whether the inner rule takes logarithms or powers of losses."""
        return self.rule.positive_losses

    @property
    def observes(self) -> bool:  # type: ignore[override]  # as above
        """Whether the inner rule learns from losses measured outside the step."""
        return self.rule.observes

    def observe(self, stats: TaskStats, state: State) -> State:
        """Hands the losses to the inner rule."""
        return {**state, **nest("rule", self.rule.observe(stats, unnest("rule", state)))}

    def needs_at(self, step: int) -> Needs:
        """What the inner rule reads at `step`."""
        return self.rule.needs_at(step)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """The inner rule's state."""
        return nest("rule", self.rule.init(tasks, device))


def per_task(
    values: Mapping[str, float] | Sequence[float] | None,
    tasks: Sequence[str],
    device: torch.device,
    name: str,
    *,
    default: float = 1.0,
) -> Tensor:
    """`[n]` tensor of one hyperparameter per task, given by name or in task order; None: all the default.

    Raises:
        ValueError: names or length do not match the tasks, or a value is not a finite number.
    """
    if values is None:
        return constant(default, len(tasks), device)
    if isinstance(values, Mapping):
        if set(values) != set(tasks):
            raise ValueError(f"{name} must give one value for each task {list(tasks)}, got {dict(values)}")
        values = [values[task] for task in tasks]
    if len(values) != len(tasks):
        raise ValueError(f"{name} must give one value for each task {list(tasks)}, got {list(values)}")
    tensor = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {tensor.tolist()}")
    return tensor.to(device, stats_dtype(device))


def constant(value: float, num_tasks: int, device: torch.device) -> Tensor:
    """`[n]` tensor filled with `value`, in the dtype of statistics on `device`."""
    return torch.full((num_tasks,), value, dtype=stats_dtype(device), device=device)


def mean_present(values: Tensor, stats: TaskStats) -> Tensor:
    """Scalar, mean of `values` (`[n]`) over the tasks present."""
    return torch.where(stats.present, values, torch.zeros_like(values)).sum() / stats.num_present


def on_present(solver: Callable[..., Array], stats: TaskStats, *values: Tensor) -> Tensor:
    """Weights from a solver of the Gram matrix of the tasks present, which runs on the CPU.

    Eigenvalues, active sets and random orders make a GPU wait for the host anyway, and n is small: one
    transfer each way, and float64 in between.

    Args:
        solver: takes `[m, m]` float64 with m >= 1 and an `[m]` for each of `values`, returns `[m]`.
        stats: statistics with a Gram matrix.
        values: `[n]` each, what else the solver reads of every task.

    Returns:
        `[n]` weights on the device of the statistics; 0 for absent tasks.
    """
    gram = stats.require_gram()
    matrix, present, rows = to_host(gram, stats.present, *values)
    index = present.nonzero()[0]
    weights = np.zeros(len(matrix))
    if len(index):
        block = matrix[index[:, None], index]
        if gram.dtype != torch.float64:
            # rounding may have made the Gram indefinite; a ridge of its own size makes it semidefinite again
            block[np.diag_indices_from(block)] *= 1 + len(matrix) * torch.finfo(gram.dtype).eps
        weights[index] = solver(block, *(row[index] for row in rows))
    return torch.from_numpy(weights).to(gram.device, gram.dtype)


def to_host(gram: Tensor, present: Tensor, *values: Tensor) -> tuple[Array, NDArray[np.bool_], list[Array]]:
    """The Gram, who is present, and other tensors with n columns, as float64 arrays; not to be modified."""
    if gram.device.type == "cpu":
        return gram.double().numpy(), present.numpy(), [value.double().numpy() for value in values]
    return transfer(gram, present, *values)


def transfer(gram: Tensor, present: Tensor, *values: Tensor) -> tuple[Array, NDArray[np.bool_], list[Array]]:
    """`to_host`, by copying once, however many tensors there are."""
    parts = [value.to(gram.dtype).reshape(-1, len(gram)) for value in (gram, present, *values)]
    host = torch.cat(parts).double().cpu().numpy()
    matrix, row, *rest = np.split(host, np.cumsum([len(part) for part in parts])[:-1])
    shaped = [piece.reshape(tuple(value.shape)) for piece, value in zip(rest, values, strict=True)]
    return matrix, row[0] > 0, shaped


def nest(prefix: str, state: State) -> State:
    """An inner rule's state as part of an outer one's: every key preceded by `prefix.`."""
    return {f"{prefix}.{key}": value for key, value in state.items()}


def unnest(prefix: str, state: State) -> State:
    """The inner state that `nest` put into `state`."""
    start = f"{prefix}."
    return {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
