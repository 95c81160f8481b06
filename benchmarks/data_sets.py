"""The data sets on which rules are compared (`which_rule.py`, `lag.py`), and one training on one of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch

from benchmarks import census, sequence_labelling
from benchmarks.trials import Schedule, Trial
from mtl_dist import RULES, Balancer, SharedLayerProbe
from mtl_dist.priors import Categorical, Priors, Regression
from mtl_dist.probes import Probe
from mtl_dist.recipes import BatchData, MultiDigits, MultiFashion, Recipe, TextMixture
from mtl_dist.training.batches import StepBatches
from mtl_dist.weighting import (
    COSMOS,
    DWA,
    PCD,
    AdaptiveWeight,
    CoBa,
    Fixed,
    GeneralizedMean,
    PrimaryAuxiliary,
    PriorLoss,
    Rule,
)

HIGHER_IS_BETTER = {
    "accuracy": True,
    "auc": True,
    "bits_per_byte": False,
    "f1": True,
    "mae": False,
    "psnr": True,
}
ALONE = "alone: "  # prefix of the name of a task alone
RANDOM = "random weights "  # prefix of a draw of fixed weights
EVERY = tuple(sorted(RULES))
SOME = (
    *("equal", "initial_loss", "prior_loss", "inverse_loss", "geometric_mean", "uncertainty", "dwa", "rlw"),
    *("famo", "inverse_grad_norm", "grad_norm", "db_mtl", "encodec"),
    *("mgda", "imtlg", "nash_mtl", "upgrad", "aligned_mtl"),
)
_WITHOUT_PRIOR = tuple(name for name in SOME if name != "prior_loss")  # equal weights where tasks are alike
_DOZEN = (
    *("equal", "initial_loss", "inverse_loss", "uncertainty", "famo", "inverse_grad_norm", "grad_norm"),
    *("db_mtl", "mgda", "imtlg", "nash_mtl", "aligned_mtl"),
)
OBSERVE_EVERY = 5  # a rule that learns from held-out losses gets them every this many steps
Metrics = dict[str, float]  # by task


@dataclass(frozen=True)
class Choice:
    """Arguments of a rule that has no defaults, or defaults for trainings that are longer than these.

    Attributes:
        make: a function from the seed to the rule.
        reason: why these arguments.
    """

    make: Callable[[int], Rule]
    reason: str


@dataclass(frozen=True)
class DataSet:
    """A recipe and what a training of it needs.

    Attributes:
        recipe: the recipe.
        schedule: the length of a training.
        rules: the names of the rules that are compared.
        draws: how many random fixed weights stand beside them.
        decades: a random weight is log-uniform over so many powers of ten.
        choices: arguments of rules; all others have those of their `example`: the defaults, if there are any.
        together: a task whose metric needs other tasks too, and those: alone it is trained with them.
        probe: the probe of a rule that reads gradients; None is the balancer's own choice.
        held_out: from a seed, data for rules that observe losses. No sample is in any batch.
    """

    recipe: Recipe
    schedule: Schedule
    rules: tuple[str, ...]
    choices: Mapping[str, Choice]
    draws: int = 8
    decades: float = 2.0
    together: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    probe: type[Probe] | None = None
    held_out: Callable[[int], BatchData] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their names, in the order of the recipe."""
        return tuple(self.recipe.tasks)

    @property
    def alone(self) -> list[str]:
        """The entries of tasks alone."""
        return [ALONE + task for task in self.tasks]

    def sign(self, task: str) -> int:
        """1 if a higher metric is better, otherwise -1."""
        return 1 if HIGHER_IS_BETTER[self.recipe.metrics[task].name] else -1

    def make_rule(self, entry: str, seed: int) -> Rule:
        """The rule with this name, the weights of a task alone, or a draw of fixed weights."""
        if entry.startswith(ALONE):
            own = entry.removeprefix(ALONE)
            trained = {own, *self.together.get(own, ())}
            return Fixed({task: float(task in trained) for task in self.tasks})
        if entry.startswith(RANDOM):
            drawn = random.Random(int(entry.removeprefix(RANDOM)))
            return Fixed({task: 10 ** drawn.uniform(-self.decades, 0) for task in self.tasks})
        choice = self.choices.get(entry)
        return choice.make(seed) if choice else RULES[entry].example(self.tasks)

    def balancer(self, entry: str, seed: int, lag: int = 0) -> Balancer:
        """A new balancer with the rule of this entry."""
        rule = self.make_rule(entry, seed)
        probe = self.probe() if self.probe and rule.needs.name != "LOSSES" else None
        return Balancer(self.tasks, rule, probe=probe, lag=lag)

    def train(self, entry: str, learning_rate: float, seed: int, part: slice, lag: int = 0) -> Metrics | str:
        """One training with AdamW, without weight decay.

        Args:
            entry: a rule, a task alone, or a draw of fixed weights.
            learning_rate: the same in all steps.
            seed: of data, order, and initial parameters.
            part: which of the held-out samples give the metrics.
            lag: of the balancer.

        Returns:
            The metric of each task, or the error that ended the training.
        """
        torch.set_num_threads(1)
        samples, validation = data(self.recipe, seed)
        balancer = self.balancer(entry, seed, lag)
        trial = Trial(self.recipe, balancer, learning_rate, seed)
        observed = self.held_out(seed) if self.held_out and balancer.weighting.observes else None
        try:
            for indices in StepBatches(len(samples), self.schedule.batch, seed, 0, self.schedule.steps):
                trial.step(samples.__getitems__(indices))
                if observed and balancer.step % OBSERVE_EVERY == 0:
                    sums = trial.sums(observed, range(self.schedule.batch))
                    balancer.observe(dict(zip(self.tasks, sums[:, 0] / sums[:, 2], strict=True)))
        except ValueError as error:  # losses or gradients are NaN or infinite
            return str(error)
        row = trial.validate(validation, range(len(validation))[part])
        return {task: row[f"eval/{task}/{metric.name}"] for task, metric in self.recipe.metrics.items()}

    def delta(self, metrics: Metrics, alone: Metrics) -> float:
        """`Δm = 100/n Σᵢ sᵢ (Mᵢ - Sᵢ) / Sᵢ` in percent: metrics Mᵢ, of tasks alone Sᵢ, signs sᵢ."""
        gains = (self.sign(task) * (metrics[task] - alone[task]) / alone[task] for task in self.tasks)
        return 100 * sum(gains) / len(self.tasks)


@cache
def data(recipe: Recipe, seed: int) -> tuple[BatchData, BatchData]:
    return recipe.data(seed)


@cache
def digit_priors(seed: int) -> Priors:
    """Initial and prior losses of Multi-Digits from its training labels."""
    samples = data(_DIGITS, seed)[0]
    batch = samples.__getitems__(range(len(samples)))
    pixels = batch["image"].flatten(1)
    labels = {"left": batch["left"], "right": batch["right"], "sum": batch["left"] + batch["right"]}
    kinds = {
        "left": Categorical(10),
        "right": Categorical(10),
        "sum": Regression(),
        "image": Regression(pixels.shape[1], reduction="sum"),
    }
    for task, kind in kinds.items():
        kind.update(labels.get(task, pixels))
    return Priors.of(kinds)


def _inverse(losses: Mapping[str, float]) -> dict[str, float]:
    return {task: 1 / loss for task, loss in losses.items()}


_INTERVAL = Choice(lambda seed: DWA(interval=20), "an epoch has too few steps here")

_DIGITS = MultiDigits()
_WORDS = sequence_labelling.recipe_of("mixed")
_FASHION = MultiFashion(kind="fashion_and_mnist", folder="data", num_validation=4000)

DATA_SETS = {
    "multi_digits": DataSet(
        _DIGITS,
        Schedule(steps=200, batch=128),
        tuple(name for name in EVERY if name not in ("kl_balance", "token_share")),
        {
            "adaptive_weight": Choice(lambda seed: AdaptiveWeight("left"), "the first task is the reference"),
            "coba": Choice(
                lambda seed: CoBa(warmup=8, window=16),
                "its defaults are for hundreds of validations; here there is one every 5 steps, on other "
                "compositions of training digits",
            ),
            "cosmos": Choice(lambda seed: COSMOS(0.5), "inside the paper's range of 0.01 to 8"),
            "dwa": Choice(lambda seed: DWA(interval=64), "an epoch, as in the paper"),
            "fixed": Choice(
                lambda seed: Fixed(_inverse(digit_priors(seed).initial)),
                "the inverse of the loss at zero outputs, which is what one would work out by hand",
            ),
            "generalized_mean": Choice(
                lambda seed: GeneralizedMean(0.5), "halfway between `equal` (1) and `geometric_mean` (0)"
            ),
            "pcd": Choice(lambda seed: PCD(), "the first task, `left`, is the primary one"),
            "primary_auxiliary": Choice(
                lambda seed: PrimaryAuxiliary(["left", "right"]), "the sum and the image help the digits"
            ),
            "prior_loss": Choice(
                lambda seed: PriorLoss(digit_priors(seed).prior), "the label statistics of the training set"
            ),
        },
        decades=3.0,
        held_out=lambda seed: data(_DIGITS, 10_000 + seed)[0],
    ),
    "fashion_and_mnist": DataSet(_FASHION, Schedule(steps=200, batch=64), _WITHOUT_PRIOR, {"dwa": _INTERVAL}),
    "census": DataSet(
        census.recipe_of("shared_bottom"),
        Schedule(steps=400, batch=512),
        SOME,
        {
            "dwa": _INTERVAL,
            "prior_loss": Choice(
                lambda seed: PriorLoss(census.prior_losses()), "the entropies of the base rates"
            ),
        },
    ),
    "sequence_labelling": DataSet(
        _WORDS,
        Schedule(steps=120, batch=32),
        SOME,
        {
            "dwa": _INTERVAL,
            "prior_loss": Choice(
                lambda seed: PriorLoss(sequence_labelling.prior_losses("mixed")),
                "the losses of the heads with constant emissions",
            ),
        },
        together={"tags": ("words",)},  # a tagged word is right only if its boundaries are
        decades=3.0,
    ),
    "text_mixture": DataSet(
        TextMixture(),
        Schedule(steps=150, batch=32),
        (*_DOZEN, "token_share"),
        {},
        probe=SharedLayerProbe,
    ),
}
