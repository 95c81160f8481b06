"""The matrix: what is crossed with what, and which cells are refused, with the reason.

A cell is one training of 10 optimizer steps on 2 ranks. Each engine runs every rule with every probe, then
leaves the default along one axis at a time, then along the pairs of axes that touch each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

RULES = ("geometric_mean", "inverse_grad_norm", "mgda", "upgrad")
PROBES = ("losses", "FeatureProbe", "FeatureTap")  # and FeatureProbe(reevaluate=False), for its refusal
CHECKPOINTS = ("none", "reentrant", "non-reentrant")
COMPILED = ("none", "trunk", "model")

# each family is started by itself: DeepSpeed and Accelerate keep global state
FAMILIES: dict[str, tuple[str, ...]] = {
    "ddp": ("ddp", "ddp static_graph", "ddp find_unused_parameters", "ddp gradient_as_bucket_view"),
    "fsdp2": ("fsdp2", "fsdp2 reshard_after_forward=False"),
    "deepspeed": ("zero-0", "zero-1", "zero-2", "zero-3"),
    "accelerate": ("accelerate ddp", "accelerate fsdp2"),
    "accelerate deepspeed": tuple(f"accelerate zero-{stage}" for stage in range(4)),
}
ENGINES = ("plain", *(engine for family in FAMILIES.values() for engine in family))


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        engine: one of `ENGINES`; "plain" is one process without any.
        rule: name of the rule, or "sum": the plain sum of the losses, without a balancer (the control).
        probe: "losses": `balancer(losses)`.
        precision: "fp32" or "bf16"; "fp16" with a loss scale, on GPUs.
        accumulation: micro-batches an optimizer step; each has its own weights.
        held: the weights are held for the window of micro-batches instead.
        checkpoint: activation checkpointing of the trunk.
        compiled: what `torch.compile` sees, with the backend aot_eager unless named.
        lag: "none", "given" or "equal": the weights follow from the step before, and what becomes of counts.
        data: "even": equal shards; "ragged": shards of other sizes, and a task that one rank has no sample
            of (it evaluates the head on no row, and says so by its count).
    """

    engine: str
    rule: str = "mgda"
    probe: str = "FeatureProbe"
    precision: str = "fp32"
    accumulation: int = 1
    held: bool = False
    checkpoint: str = "none"
    compiled: str = "none"
    data: str = "even"
    lag: str = "none"

    @property
    def name(self) -> str:
        """Engine, then what differs from the default."""
        return f"{self.engine}: {self.variant}"

    @property
    def variant(self) -> str:
        """Everything but the engine, in words."""
        parts = [self.rule, self.probe, self.precision]
        if self.accumulation > 1:
            parts.append(f"accumulation {self.accumulation}" + (", held" if self.held else ""))
        if self.checkpoint != "none":
            parts.append(f"{self.checkpoint} checkpoint")
        if self.compiled != "none":
            parts.append(f"compiled {self.compiled}")
        if self.data != "even":
            parts.append(self.data)
        if self.lag != "none":
            parts.append("lag" if self.lag == "given" else "lag with equal counts")
        return ", ".join(parts)

    @property
    def family(self) -> str:
        """What it is launched with."""
        return next((family for family, engines in FAMILIES.items() if self.engine in engines), "plain")

    def reference(self) -> Cell:
        """The one-process training that this one must equal.

        In float32 that is plain torch. In bf16 it is the same engine on one process, because engines differ
        in what they keep in bf16 (autocast, cast parameters, gradients); DDP's is autocast under plain torch.
        Always in eager mode, without checkpoints.
        """
        if self.precision == "fp32":
            return replace(self, engine="plain", checkpoint="none", compiled="none")
        engine = "plain" if self.engine.startswith(("ddp", "accelerate ddp")) else self.engine
        return replace(self, engine=engine, checkpoint="none", compiled="none")

    def control(self) -> Cell:
        """The same without the library: the plain sum of the losses."""
        return replace(self, rule="sum", probe="losses", held=False, lag="none")


def cells_of(engine: str) -> Iterator[Cell]:
    """Every cell of one engine."""
    yield Cell(engine, rule="geometric_mean", probe="losses")
    for rule in RULES[1:]:
        for probe in PROBES[1:]:
            yield Cell(engine, rule=rule, probe=probe)
    for probe in PROBES[1:]:
        base = Cell(engine, probe=probe)
        yield from _axes(base)
        yield from _pairs(base)
        yield from _lagged(base)
    yield from _axes(Cell(engine, rule="geometric_mean", probe="losses"), brief=True)
    yield Cell(engine, rule="geometric_mean", probe="losses", lag="given")
    yield Cell(engine, rule="geometric_mean", probe="losses", lag="equal", accumulation=4)
    yield Cell(engine, rule="inverse_grad_norm", lag="equal")
    yield Cell(engine, rule="upgrad", lag="given")
    if engine.endswith("zero-3"):
        yield Cell(engine, probe="FeatureProbe(reevaluate=False)")
    if engine in ("plain", "ddp", "fsdp2", "zero-2"):
        yield Cell(engine, compiled="model, inductor")


def _axes(base: Cell, *, brief: bool = False) -> Iterator[Cell]:
    """One step off the default along each axis."""
    yield replace(base, precision="bf16")
    yield replace(base, accumulation=4)
    yield replace(base, accumulation=4, held=True)
    if brief:
        return
    yield from (replace(base, checkpoint=kind) for kind in CHECKPOINTS[1:])
    yield from (replace(base, compiled=what) for what in COMPILED[1:])
    yield replace(base, data="ragged")


def _pairs(base: Cell) -> Iterator[Cell]:
    """Axes that meet in the engine's hooks."""
    yield replace(base, precision="bf16", accumulation=4)
    yield replace(base, precision="bf16", checkpoint="non-reentrant")
    yield replace(base, precision="bf16", compiled="trunk")
    yield replace(base, accumulation=4, checkpoint="reentrant")
    yield replace(base, accumulation=4, checkpoint="non-reentrant")
    yield replace(base, accumulation=4, compiled="model")
    yield replace(base, accumulation=4, data="ragged")
    yield replace(base, checkpoint="non-reentrant", compiled="trunk")
    yield replace(base, checkpoint="reentrant", data="ragged")


def _lagged(base: Cell) -> Iterator[Cell]:
    """The weights of the step before, along the axes that its backward meets."""
    for counts in ("given", "equal"):
        yield replace(base, lag=counts)
        yield replace(base, lag=counts, accumulation=4)
        yield replace(base, lag=counts, accumulation=4, held=True)
    yield replace(base, lag="equal", precision="bf16")
    yield from (replace(base, lag="equal", checkpoint=kind) for kind in CHECKPOINTS[1:])
    yield from (replace(base, lag="equal", compiled=what) for what in COMPILED[1:])
    yield replace(base, lag="given", data="ragged")
    yield replace(base, lag="given", data="ragged", accumulation=4)


def whole_matrix() -> list[Cell]:
    """Every cell of every engine, and the control of each that is refused for the engine's sake."""
    cells = [cell for engine in ENGINES for cell in cells_of(engine)]
    refused = ((cell, refusal(cell)) for cell in cells)
    controls = (cell.control() for cell, expected in refused if expected and expected.engines_own)
    return list(dict.fromkeys([*cells, *controls]))


def ci_matrix() -> list[Cell]:
    """All engines in float32 with both probes, and each other option on the engines that treat it apart."""
    basic = [Cell(engine, probe=probe) for engine in ENGINES for probe in PROBES[1:]]
    refused = Cell("zero-3", probe="FeatureProbe(reevaluate=False)")
    return [*basic, refused, *(cell for engine in CI_ENGINES for cell in _options(engine))]


# one of each kind: hooks on parameters, freed parameters, partitioned gradients, partitioned parameters, glue
CI_ENGINES = ("ddp", "fsdp2", "zero-2", "zero-3", "accelerate zero-2")


def gpu_matrix() -> list[Cell]:
    """What a machine with GPUs runs: the same, and float16 with a loss scale."""
    half = [
        Cell(engine, precision="fp16", **more)
        for engine in ("plain", "ddp", "accelerate ddp", "zero-0", "zero-2", "zero-3", "accelerate zero-2")
        for more in ({}, {"probe": "FeatureTap"}, {"lag": "given"}, {"accumulation": 4})
    ]
    return [*ci_matrix(), *half]


def _options(engine: str) -> Iterator[Cell]:
    tap = "FeatureTap" if CI_ENGINES.index(engine) % 2 else "FeatureProbe"
    yield Cell(engine, rule="geometric_mean", probe="losses")
    yield Cell(engine, rule="inverse_grad_norm")
    yield Cell(engine, rule="upgrad", probe="FeatureTap")
    yield from _axes(Cell(engine, probe=tap))
    yield Cell(engine, rule="geometric_mean", probe="losses", lag="given")
    yield Cell(engine, probe=tap, lag="equal")
    yield Cell(engine, probe=tap, lag="given", accumulation=4, held=True)
    yield Cell(engine, probe=tap, lag="given", data="ragged")


@dataclass(frozen=True)
class Refusal:
    """Cells that cannot work: what they raise, on every rank, and why.

    Attributes:
        pattern: of the message.
        reason: for the table.
        engines_own: the engine fails in the same way with a plain sum of the losses.
    """

    pattern: re.Pattern[str]
    reason: str
    engines_own: bool


STATIC_GRAPH = Refusal(
    re.compile("expect_autograd_hooks_ INTERNAL ASSERT FAILED"),
    "DDP's static_graph and no_sync, and so gradient accumulation, do not go together in torch 2.13 (pytorch "
    "PR 187732); a plain sum of the losses fails likewise",
    engines_own=True,
)
READY_TWICE = Refusal(
    re.compile("Expected to mark a variable ready only once"),
    "DDP's find_unused_parameters and reentrant checkpoints do not go together; a plain sum of the losses "
    "fails likewise: checkpoint with use_reentrant=False",
    engines_own=True,
)


PARTITIONED = Refusal(
    re.compile(r"reevaluate=False: DeepSpeed ZeRO-3 partitions the parameters.* Leave reevaluate out"),
    "ZeRO-3 frees parameters after their first use: FeatureProbe() evaluates the heads again by itself, and "
    "refuses when told not to, and says what to do",
    engines_own=False,
)


def refusal(cell: Cell) -> Refusal | None:
    """Why `cell` cannot work; None where it must pass."""
    if cell.engine.endswith("zero-3") and cell.probe == "FeatureProbe(reevaluate=False)":
        return PARTITIONED
    if cell.engine == "ddp static_graph" and cell.accumulation > 1:
        return STATIC_GRAPH
    if cell.engine == "ddp find_unused_parameters" and cell.checkpoint == "reentrant":
        return READY_TWICE
    return None
