"""What an attached balancer adds to HF Trainer's logs, checkpoints and evaluations."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from mtl_dist import checkpoint
from mtl_dist.balancer import Balancer, collect_evaluation
from mtl_dist.integrations import accelerate
from mtl_dist.integrations._attached import Attached
from mtl_dist.integrations._checkpoints import attached_to
from mtl_dist.integrations._evaluation_rows import Weights, checked_weights, evaluation_row
from mtl_dist.integrations._idle import IdleWatch
from mtl_dist.integrations._log_window import LogWindow
from mtl_dist.tracking import Row, check_task_names, evaluation_keys

_LOGGER = logging.getLogger("mtl_dist")


@dataclass
class Settings:
    """What `attach` was told of one balancer.

    Attributes:
        place: its name in the trainer's model; None: it is not a part of it.
        eval_weights: fixed weight of each task.
        given: whether the user gave these weights.
        late: whether the training may begin without it.
    """

    place: str | None = None
    eval_weights: Weights = field(default_factory=dict)
    given: bool = False
    late: bool = False


class BalancerCallback(TrainerCallback, ExportableState):
    """Adds balancers to Trainer's logs and checkpoints. `attach` creates it.

    Its row is the mean over the optimizer steps since the last log, like Trainer's own loss. It is copied to
    the host only on logging steps. This callback is the first one, so that the callbacks of trackers see the
    row. It holds balancers weakly.

    Args:
        trainer: whose accelerator knows the balancers; None: no trainer makes its model anew.
    """

    def __init__(self, trainer: Trainer | None = None) -> None:
        self._trainer: ReferenceType[Trainer] | None = None if trainer is None else ref(trainer)
        self._attached = Attached()
        self._settings: dict[str, Settings] = {}
        self._windows: dict[str, LogWindow] = {}
        self._idle = _idle_watch()
        self._warned = False

    def add(self, balancer: Balancer, name: str, settings: Settings | None = None) -> None:
        """Adds another balancer."""
        self._attached.add(balancer, name)
        self._settings[name] = settings or Settings(eval_weights=checked_weights(balancer, None))
        self._windows[name] = LogWindow(balancer, "" if name == "balancer" else f"{name}/")

    def remove(self, balancer: Balancer | str) -> str:
        """Removes a balancer, given itself or its name, and returns its name."""
        names = {id(found): name for name, found in self._attached.live().items()}
        name = balancer if isinstance(balancer, str) else names.get(id(balancer), "")
        removed = self._attached.remove(balancer)
        if removed is not None:
            self._idle.remove(removed)
        del self._settings[name], self._windows[name]
        return name

    def state(self) -> dict[str, Any]:
        """What Trainer writes into `trainer_state.json`."""
        live = self._attached.live()
        packed = {name: checkpoint.to_json(checkpoint.pack(b)) for name, b in live.items()}
        return {"args": {}, "attributes": {"balancers": packed}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Follows the balancers into a new model, and restores them if Trainer resumes from a checkpoint.

        Raises:
            ValueError: the checkpoint has no state of the balancer, or one that does not fit (nothing is
                changed then), or it is not known which balancer of a new model takes over.
        """
        if model is not None:
            self._follow(model)
            self.check_choice(args)
        self._idle = _idle_watch()
        for name, balancer in self._attached.live().items():
            self._windows[name].clear()
            if not self._settings[name].late:
                self._idle.add(balancer)
        if state.global_step > 0:
            self._restore(state)

    def _restore(self, state: TrainerState) -> None:
        exported: Any = state.stateful_callbacks
        saved = exported.get(type(self).__name__, {}).get("attributes", {})
        for name, balancer in self._attached.live().items():
            source = f"trainer_state.json at step {state.global_step}, balancer {name!r}"
            if name not in saved.get("balancers", {}):
                raise ValueError(
                    f"{source}: this checkpoint was written before the balancer was attached; resume from a "
                    "later one, or start a new run"
                )
            packed = checkpoint.from_json(saved["balancers"][name], source)
            checkpoint.unpack(balancer, packed, source)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called before each optimizer step.

        Raises:
            RuntimeError: the loss of the first step did not pass through a balancer.
        """
        self._idle.after_step()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after each micro-batch but the last of an optimizer step."""
        if args.logging_strategy != "no":
            for window in self._windows.values():
                window.add_micro_batch()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after the last micro-batch of an optimizer step."""
        self.on_substep_end(args, state, control)
        for window in self._windows.values():
            window.close_step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the row to Trainer's training log."""
        if logs is None or "loss" not in logs:  # evaluation, or the final summary
            return
        for window in self._windows.values():
            row = window.row()
            logs.update(row)
            state.log_history[-1].update(row)

    @contextmanager
    def evaluating(self, row: Row, prefix: str) -> Iterator[None]:
        """Inside, losses are collected; afterwards `row` has them. All ranks meet once at the end."""
        live = self._attached.live()
        with ExitStack() as stack:
            sums = {name: stack.enter_context(collect_evaluation(b)) for name, b in live.items()}
            yield
        for name, collected in sums.items():
            key = "" if name == "balancer" else name
            row |= evaluation_row(collected.losses(), self._settings[name].eval_weights, prefix, key)

    def check_choice(self, args: TrainingArguments) -> None:
        """Looks at the metric by which Trainer finds its best checkpoint, stops early or lowers its rate.

        Raises:
            ValueError: Trainer would take the largest loss for the best one.
        """
        if args.metric_for_best_model is None:
            return
        metric = "eval_" + args.metric_for_best_model.removeprefix("eval_")
        for name, balancer in self._attached.live().items():
            keys = evaluation_keys(balancer.tasks, "eval", "" if name == "balancer" else name)
            own = tuple(key.removeprefix("eval_") for key in (*keys.loss.values(), keys.total))
            if metric.endswith(own):
                if args.greater_is_better:
                    raise ValueError(
                        f"metric_for_best_model={args.metric_for_best_model!r} is a loss, and "
                        "greater_is_better=True would keep the worst model: set greater_is_better=False"
                    )
            elif metric in self._moving_metrics() and balancer.weighting.compares and not self._warned:
                self._warned = True
                if args.process_index == 0:
                    _LOGGER.warning(_MOVING, metric, keys.total)

    def _moving_metrics(self) -> set[str]:
        """The evaluation losses that Trainer computes itself, from the balancer's scalar."""
        trainer = None if self._trainer is None else self._trainer()
        datasets = None if trainer is None else trainer.eval_dataset
        names = list(datasets) if isinstance(datasets, dict) else []
        return {"eval_loss", *(f"eval_{name}_loss" for name in names)}

    def _follow(self, model: nn.Module) -> None:
        """Finds the balancers in the model that is trained; a new model has new ones.

        Raises:
            ValueError: it is not known which of them takes over.
        """
        present = {id(module) for module in model.modules()}
        live = self._attached.live()
        for name, settings in list(self._settings.items()):
            old = live.get(name)
            if old is not None and (id(old) in present or settings.place is None):
                continue  # outside of the model, it does not depend on it
            new = _balancer_at(model, settings.place, name)
            self.remove(name)
            trainer = None if self._trainer is None else self._trainer()
            if trainer is not None:
                if name in attached_to(trainer.accelerator).live():
                    accelerate.detach(name, trainer.accelerator)
                accelerate.connect(
                    new,
                    trainer.accelerator,
                    name=name,
                    accumulation=trainer.args.gradient_accumulation_steps,
                )
            if not settings.given:
                settings.eval_weights = checked_weights(new, None)
            self.add(new, name, settings)


_MOVING = (
    "mtl_dist: metric_for_best_model is %r, which is the total in the weights of the moment: it rises and "
    "falls with the weights, also where all losses fall. The best checkpoint, early stopping and schedules "
    "that read it are misled. Use metric_for_best_model=%r, the total in fixed weights"
)


def _idle_watch() -> IdleWatch:
    return IdleWatch(
        1,
        "Return the balancer's scalar as the loss of the model's forward; a trainer that computes its loss "
        "itself (compute_loss of a subclass, as in TRL) must call the balancer there, and return its scalar",
    )


def place_of(balancer: Balancer, model: nn.Module) -> str | None:
    """The name of `balancer` in `model`."""
    return next((name for name, module in model.named_modules() if module is balancer), None)


def _balancer_at(model: nn.Module, place: str | None, name: str) -> Balancer:
    """The balancer of a new model that takes the place of an old one."""
    balancers = {where: module for where, module in model.named_modules() if isinstance(module, Balancer)}
    found = balancers.get(place) if place is not None else None
    if found is None:
        raise ValueError(
            f"the model of the attached balancer {name!r} is gone, and the model that Trainer trains now has "
            f"none at {place or 'a place that is known'!r}; it has balancers at {list(balancers)}. Put the "
            "balancer at the same place in every model that model_init makes, or call attach again for the "
            "new model"
        )
    check_task_names(found.tasks)
    return found
