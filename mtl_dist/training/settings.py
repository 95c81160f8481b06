"""Turns a YAML file and `key=value` overrides into validated settings, and settings into objects.

A component (rule, probe, recipe, tracker) is given by its name, or by a mapping with `name` and the fields of
its class. The name of a class of one's own is its import path, `my_rules:Largest` (`docs/writing.md`). Rules
nest: `{name: smooth, decay: 0.9, rule: {name: mgda}}`. Every mistake raises a `ValueError` that shows the
path, the value and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)

from mtl_dist.balancer import Balancer
from mtl_dist.canonical import canonical
from mtl_dist.probes import FeatureProbe, FeatureTap, ParameterProbe, Probe, SharedLayerProbe
from mtl_dist.recipes import RECIPES, Recipe
from mtl_dist.tracking import TRACKERS, JsonlTracker, Tracker, check_task_names
from mtl_dist.training.best import Mode, check_metric
from mtl_dist.training.components import Component, Kind, Spec, build, hint, search_beside
from mtl_dist.training.contract import check_metrics
from mtl_dist.training.optimizer import Schedule, check_optimizer
from mtl_dist.training.values import read_values, set_value
from mtl_dist.weighting import COMBINATORS, RULES, Rule

PROBES: dict[str, type[Probe]] = {
    "feature": FeatureProbe,
    "tap": FeatureTap,
    "shared_layer": SharedLayerProbe,
    "parameter": ParameterProbe,
}
_RULE, _PROBE, _RECIPE, _TRACKER = (
    Kind(Rule, {**RULES, **COMBINATORS}),
    Kind(Probe, PROBES),
    Kind(Recipe, RECIPES),
    Kind(Tracker, TRACKERS),
)


def build_rule(spec: Spec, path: str = "weighting") -> Rule:
    """The rule or combinator that `spec` describes.

    Args:
        spec: name, or mapping with `name` and the fields of the class.
        path: path of the specification in the settings, for messages.

    Raises:
        ValueError: a name or field is unknown, a field is missing, or a value is wrong.
    """
    return build(spec, _RULE, path, {Rule: build_rule})


def build_probe(spec: Spec | None, path: str = "probe") -> Probe | None:
    """The probe that `spec` describes. None: the balancer chooses. Raises the errors of `build_rule`."""
    return None if spec is None else build(spec, _PROBE, path, {})


def build_recipe(spec: Spec, path: str = "recipe") -> Recipe:
    """The recipe that `spec` describes. Raises the errors of `build_rule`."""
    return build(spec, _RECIPE, path, {})


_AS_WRITTEN = PlainSerializer(lambda component: component.spec)
RecipeSetting = Annotated[
    Component[Recipe], PlainValidator(lambda spec: Component(spec, build_recipe(spec))), _AS_WRITTEN
]
RuleSetting = Annotated[
    Component[Rule], PlainValidator(lambda spec: Component(spec, build_rule(spec))), _AS_WRITTEN
]
ProbeSetting = Annotated[
    Component[Probe | None], PlainValidator(lambda spec: Component(spec, build_probe(spec))), _AS_WRITTEN
]


def _folder(given: Any) -> Path:
    """The folder of a name; an empty one would be the working folder."""
    if isinstance(given, Path) or (isinstance(given, str) and given.strip() and "\0" not in given):
        return Path(given)
    raise ValueError(f"output_dir: give the name of a folder; got {given!r}")


class Settings(BaseModel):
    """All settings of a run. `configs/recipe/multi_digits.yaml` describes each field.

    Recipe, rule and probe are built once, while the settings are loaded. The run uses these objects.
    """

    # strict: `true` is no number, and "5" and 5.0 are no whole ones
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    recipe: RecipeSetting
    weighting: RuleSetting = Field("equal", validate_default=True)
    probe: ProbeSetting = Field(None, validate_default=True)
    on_nonfinite: Literal["raise", "skip", "hold"] = "raise"
    lag: int = Field(0, ge=0, le=1)
    counts: Literal["given", "equal"] = "given"
    seed: int = Field(0, ge=0, lt=2**32)  # NumPy takes no larger ones
    steps: int = Field(gt=0, lt=2**53)  # exact in rows
    batch_size: int = Field(gt=0)
    accumulation: int = Field(1, gt=0)
    optimizer: Spec = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Schedule = "constant"
    warmup_steps: int = Field(0, ge=0)
    clip_norm: float | None = Field(None, gt=0)
    precision: Literal["no", "bf16", "fp16"] | None = None
    num_workers: int = Field(0, ge=0)
    trackers: list[Spec] = ["jsonl"]
    log_every: int = Field(1, gt=0)
    eval_every: int = Field(0, ge=0)
    checkpoint_every: int = Field(0, ge=0)
    keep_last: int | None = Field(None, gt=0)
    best_metric: str | None = None
    best_mode: Mode = "min"
    num_processes: int | None = Field(None, gt=0)
    timeout_minutes: float | None = Field(None, gt=0, le=525_600)  # a year; Gloo counts milliseconds
    output_dir: Annotated[Path, BeforeValidator(_folder)]
    overwrite: bool = False
    check: bool = False
    virtual_ranks: int = Field(1, gt=0)
    resume_from: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        check_task_names(self.recipe.object.tasks)
        check_metrics(self.recipe.object)
        if self.overwrite and self.resume_from in ("auto", "latest"):
            raise ValueError(
                f"overwrite=true and resume_from={self.resume_from}: one removes the earlier run, the other "
                "continues it; give one of them"
            )
        build_balancer(self)
        build_trackers(self)
        check_optimizer(self.optimizer, self.learning_rate, self.weight_decay)
        if self.batch_size % self.virtual_ranks:
            raise ValueError(
                f"batch_size={self.batch_size} must be divisible by virtual_ranks={self.virtual_ranks}"
            )
        if self.accumulation > 1 and self.virtual_ranks > 1:
            raise ValueError(
                f"accumulation={self.accumulation} and virtual_ranks={self.virtual_ranks}: give one of them; "
                "virtual ranks need no accumulation"
            )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} counts the samples of an optimizer step and must be divisible "
                f"by accumulation={self.accumulation}"
            )
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must not exceed steps={self.steps}")
        if self.best_metric is not None:
            check_metric(self.best_metric, self.recipe.object)
            if not self.checkpoint_every:
                raise ValueError("best_metric chooses among checkpoints: set checkpoint_every")
        return self


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Reads a YAML file, applies overrides such as `weighting.name=mgda`, and validates the result.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value`. Values are YAML, so `.inf`, `null` and `{name: mgda}` have the same
            meaning as in the file.

    Raises:
        ValueError: the file, a key or a value is wrong. The message has one line per problem.
    """
    values = read_values(Path(path))
    search_beside(Path(path))
    for override in overrides:
        set_value(values, override)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ValueError(_explain(error, str(path))) from None


def build_balancer(settings: Settings) -> Balancer:
    """A new balancer of the recipe's tasks.

    Raises:
        ValueError: rule, tasks, probe and `on_nonfinite` do not fit together.
    """
    return Balancer(
        settings.recipe.object.tasks,
        settings.weighting.object,
        probe=settings.probe.object,
        on_nonfinite=settings.on_nonfinite,
        lag=settings.lag,
        counts=settings.counts,
        check=settings.check,
    )


def run_identity(settings: Settings) -> dict[str, Any]:
    """The settings that a resumed run must not change: they determine data, order, model and state."""
    return {
        "recipe": canonical(settings.recipe.object),
        "weighting": canonical(settings.weighting.object),
        "probe": canonical(settings.probe.object),
        "optimizer": canonical(settings.optimizer),
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "accumulation": settings.accumulation,
    }


def build_trackers(settings: Settings) -> list[Tracker]:
    """New trackers, `jsonl` first. Raises the errors of `build_rule`, and if one is given twice."""
    built = [build(spec, _TRACKER, f"trackers[{i}]", {}) for i, spec in enumerate(settings.trackers)]
    names = [getattr(tracker, "name", type(tracker).__qualname__) for tracker in built]
    if len(set(names)) < len(names):
        raise ValueError(f"trackers: give each tracker once, got {names}")
    jsonl = [tracker for tracker in built if tracker.name == "jsonl"] or [JsonlTracker()]
    return [*jsonl, *(tracker for tracker in built if tracker.name != "jsonl")]


def _explain(error: ValidationError, source: str) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            instead = hint(where, Settings.model_fields)
            lines.append(f"{source}: {where!r} (= {problem['input']!r}) is not a setting{instead}")
        elif problem["type"] == "missing":
            lines.append(f"{source}: {where!r} is missing; set it in the file or with {where}=...")
        elif problem["type"] == "value_error":
            lines.append(f"{source}: {problem['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"{source}: {where}: {problem['msg']}; got {problem['input']!r}")
    return "\n".join(lines)
