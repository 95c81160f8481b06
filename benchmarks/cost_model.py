"""What the weights cost on 8, 64 and 1024 ranks: a model on paper, from parts that were measured.

    python benchmarks/cost_model.py > benchmarks/results/cost_model.md
    python benchmarks/cost_model.py --step 500 --spread 0.05 --tasks 32

No run of that size was made. The page says which parts were measured and which are assumed.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

RANKS = (8, 64, 1024)
HEADS = 0.2  # part of a step that its heads take, forward and backward
FORWARD = 1 / 3  # part of a step before the losses are there
ALIKE = 4.0  # delays of a Gloo all-reduce per rank but one


@dataclass(frozen=True)
class Network:
    """How long a small all-reduce takes.

    Attributes:
        name: for the table.
        start: ms that it takes without any delay.
        delay: one way from rank to rank, ms.
        delays: how many of them one after the other, by number of ranks.
        bandwidth: bytes per ms of one rank.
    """

    name: str
    start: float
    delay: float
    delays: Callable[[int], float]
    bandwidth: float

    def meeting(self, ranks: int, size: float) -> float:
        """Milliseconds of one all-reduce of `size` bytes; each byte passes a rank twice."""
        return self.start + self.delays(ranks) * self.delay + 2 * size / self.bandwidth


def ring(ranks: int) -> float:
    """Gloo: 2 (W - 1) messages after another, each announced by its receiver before it is sent."""
    return ALIKE * (ranks - 1)


def tree(ranks: int) -> float:
    """NCCL, small messages: up a binary tree and down again."""
    return 2 * math.ceil(math.log2(ranks))


NETWORKS = (
    Network("Gloo, Ethernet", 0.5, 0.05, ring, 1.25e6),
    Network("NCCL, Ethernet", 0.05, 0.05, tree, 1.25e6),
    Network("NCCL, InfiniBand", 0.05, 0.005, tree, 2.5e7),
)


@dataclass(frozen=True)
class Way:
    """A way to get weights.

    Attributes:
        name: for the table.
        awaited: the parts of a step after which ranks wait for each other, beside the end of the backward.
        hidden: whether one more all-reduce runs beside the backward, and is awaited at the next call.
    """

    name: str
    awaited: tuple[float, ...]
    hidden: bool = False


TAP = FORWARD + HEADS * (1 - FORWARD)  # when the gradients of the heads have arrived at the features
WAYS = (
    Way("losses only; FeatureProbe", (FORWARD,)),
    Way("FeatureTap", (FORWARD, TAP)),
    Way("lag=1, counts given", (FORWARD,), hidden=True),
    Way("lag=1, counts equal", (), hidden=True),
)


def message(tasks: int) -> int:
    """Bytes of the statistics (sync/layout.py): the triangle of the Gram, four vectors, eight codes."""
    return 8 * (tasks * (tasks + 1) // 2 + 4 * tasks + 8)


def expected_maximum(ranks: int) -> float:
    """Of as many independent standard normal numbers: `∫ x d Φ(x)^W`."""
    edge, pieces = 8.0, 16_000
    total, before = 0.0, 0.0
    for k in range(1, pieces + 1):
        x = -edge + 2 * edge * k / pieces
        now = (0.5 * math.erfc(-x / math.sqrt(2))) ** ranks
        total += (x - edge / pieces) * (now - before)
        before = now
    return total


def straggling(way: Way, ranks: int, spread: float) -> float:
    """The wait for slower ranks beyond that of the plain step, as a part of the step.

    A step is cut where ranks wait for each other. The times of a piece of length p are independent between
    ranks and pieces, with deviation `spread √p`, and each piece takes as long as its slowest rank. The plain
    step is one piece.
    """
    edges = (0.0, *way.awaited, 1.0)
    pieces = sum(math.sqrt(after - before) for before, after in itertools.pairwise(edges))
    return spread * expected_maximum(ranks) * (pieces - 1)


def cost(way: Way, network: Network, ranks: int, step: float, spread: float, tasks: int) -> float:
    """Milliseconds per step beyond the plain step, without the operators of the library itself."""
    meeting = network.meeting(ranks, message(tasks))
    late = max(0.0, meeting - (1 - HEADS) * step) if way.hidden else 0.0
    return len(way.awaited) * meeting + late + step * straggling(way, ranks, spread)


# ---- the page ------------------------------------------------------------------------------------


def lines(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown, with an empty line before it."""
    cells = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["", *("| " + " | ".join(row) + " |" for row in cells)]


def page(step: float, spread: float, tasks: int) -> str:
    """The model, its assumptions and its tables."""
    ranks = [f"{count} ranks" for count in RANKS]
    size = message(tasks)
    meetings = [
        [network.name, *(f"{network.meeting(count, size):.2f}" for count in RANKS)] for network in NETWORKS
    ]
    waits = [
        [f"{share:.0%}", *(f"{straggling(WAYS[0], count, share):.1%}" for count in RANKS)]
        for share in (0.01, 0.02, 0.05)
    ]
    totals = []
    for network in NETWORKS:
        for way in WAYS:
            found = [cost(way, network, count, step, spread, tasks) for count in RANKS]
            totals.append([network.name, way.name, *(f"{ms:.2f} ({ms / step:.1%})" for ms in found)])
    maxima = ", ".join(f"{expected_maximum(count):.2f}" for count in RANKS)
    return "\n".join(
        [
            TEXT.format(tasks=tasks, size=size, maxima=maxima).strip(),
            "",
            f"## One meeting of {tasks} tasks, ms",
            *lines(["network", *ranks], meetings),
            "",
            "## One more wait for the slowest rank, as a part of the step",
            *lines(["spread of a rank's step", *ranks], waits),
            "",
            f"## All of it: ms beyond a plain step of {step:g} ms that spreads over ranks by {spread:.0%}",
            *lines(["network", "weights", *ranks], totals),
            "",
        ]
    )


# table rows have no line breaks
TEXT = """
# What the weights cost on many ranks: a model

`python benchmarks/cost_model.py > benchmarks/results/cost_model.md` prints this page. It is paper: no run of this
size was made. The library's own operators are not in it. They do not depend on the number of ranks
([overhead](overhead.md)).

    cost = meetings x (start + delays(W) x delay + 2 bytes / bandwidth) + straggling(W)

| part | value | from |
|---|---|---|
| meetings that are waited for | losses only and `FeatureProbe`: 1. `FeatureTap`: 2. `lag=1`: 1, and none with `counts="equal"` | counted: `benchmarks/overhead.py`, column "collectives" |
| bytes | {size} for {tasks} tasks | `mtl_dist/sync/layout.py` |
| Gloo, delays(W) | 4 (W - 1): a ring of 2 (W - 1) messages, and before each one a word from its receiver | measured on 2, 3 and 4 ranks with delays of 0 to 5 ms: 4.0, 8.0, 12.2 (`benchmarks/latency.py`, 2026-11-26). Assumed beyond |
| Gloo, start | 0.5 ms | measured on 2 ranks, 2026-11-25. Assumed not to grow |
| NCCL, delays(W) | 2 log2 W: up a binary tree and down | assumed. A level inside a machine counts like one between machines |
| NCCL, start | 0.05 ms: a kernel, and the host that waits for it | assumed |
| delay | 0.05 ms on Ethernet, 0.005 ms on InfiniBand | assumed |
| bandwidth | 10 Gbit/s on Ethernet, 200 Gbit/s on InfiniBand | assumed |

Straggling is the wait for the slowest rank beyond the one that the plain step has at the end of its backward. A piece
p of a step spreads over ranks with deviation s √p, where s is the spread of a whole step. Ranks and pieces are
independent. The expected maximum of W normal numbers is m(W): {maxima}. So a step that is cut into pieces waits for
s m(W) (Σ √p - 1) more. It is assumed that the losses are there after a third of the step, and that heads are a fifth
of it.

* A rank that is always the slowest one costs nothing more: the others wait for it once in any case.
* Engines that gather parameters layer by layer (FSDP2, ZeRO-3) make ranks wait for each other at every unit, with or
  without weights. For them the straggling here is an upper bound.
* With `lag=1` the all-reduce of a step runs beside its backward and the next forward. What is longer than these is
  waited for. No straggling comes with it, because ranks have just met for their gradients.
* On Gloo a bucket of gradients takes as many delays as a meeting, so the plain step on 1024
  ranks is as slow. That row only shows what a ring costs.
"""  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", type=float, default=200, help="ms of the plain step")
    parser.add_argument("--spread", type=float, default=0.02, help="deviation of a rank's step, as a part")
    parser.add_argument("--tasks", type=int, default=8)
    arguments = parser.parse_args()
    print(page(arguments.step, arguments.spread, arguments.tasks), end="")


if __name__ == "__main__":
    main()
