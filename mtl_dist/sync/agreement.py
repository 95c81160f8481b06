"""What ranks must have in common, and the words where they do not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Identity:
    """What a balancer is on one rank.

    Attributes:
        settings: everything that decides which collectives run and which weights come out, by name.
        state: where it is: step, and a digest of weights and rule.
    """

    settings: Mapping[str, str]
    state: str

    def settings_text(self) -> str:
        """The settings, in an order of their own."""
        return json.dumps(dict(self.settings), sort_keys=True)

    def text(self) -> str:
        """Settings and state."""
        return json.dumps([dict(self.settings), self.state], sort_keys=True)


def compare_identities(texts: Sequence[str | None]) -> None:
    """Raises `ValueError` unless all ranks have the same settings and the same state."""
    ranks = [json.loads(text) for text in texts if text is not None]
    names = list(dict.fromkeys(name for settings, _ in ranks for name in settings))
    differ = [name for name in names if len({settings.get(name) for settings, _ in ranks}) > 1]
    if differ:
        rows = [", ".join(f"{name} {settings.get(name)}" for name in differ) for settings, _ in ranks]
        raise ValueError(
            "mtl_dist: ranks were given different balancers; make them the same on all ranks (and call "
            f"several of them in the same order). They differ in {', '.join(differ)}:\n{_listing(rows)}"
        )
    _compare_states([state for _, state in ranks])


def compare_calls(texts: Sequence[str | None]) -> Exception | None:
    """The error of ranks that met in different calls or with different states; None where all are the same.

    Args:
        texts: by rank, the call and the state, each on a line; None for ranks that did not say.
    """
    said = [("does not say", "") if text is None else tuple(text.split("\n")) for text in texts]
    if len({call for call, _ in said}) > 1:
        return RuntimeError(
            "mtl_dist: ranks met in different calls of the balancer, and their sums mean nothing. Every rank "
            "must make the same calls in the same order (training calls and observe(); none in eval mode) "
            f"and load the same states:\n{_listing([call for call, _ in said])}"
        )
    try:
        _compare_states([state for _, state in said])
    except ValueError as error:
        return error
    return None


def _compare_states(states: Sequence[str]) -> None:
    if len(set(states)) > 1:
        raise ValueError(
            "mtl_dist: ranks hold different states of the balancer, and would train with different weights. "
            "load_state_dict must be called on every rank, with the same state, and training calls before "
            "init_process_group belong into eval mode or torch.no_grad():\n" + _listing(states)
        )


def _listing(rows: Sequence[str]) -> str:
    return "\n".join(f"  rank {rank}: {row}" for rank, row in enumerate(rows))
