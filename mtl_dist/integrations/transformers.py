"""HF Trainer: the model's forward returns the balancer's scalar as its loss, and `Trainer` is unchanged.

    class Net(PreTrainedModel):
        def forward(self, input_ids, topic, tone):
            z = self.bert(input_ids).last_hidden_state
            return {"loss": self.balancer(z, {"topic": ..., "tone": ...})}

    trainer = Trainer(Net(config), args, train_dataset=table)
    attach(trainer.model.balancer, trainer)
    trainer.train()

Trainer's logs then have weights, losses and norms beside its own loss, and `trainer_state.json` in each
checkpoint has the balancer's state. Each micro-batch updates the rule. With
`Balancer(..., window=args.gradient_accumulation_steps)` all micro-batches of an optimizer step have the same
weights.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from mtl_dist import checkpoint
from mtl_dist.balancer import Balancer
from mtl_dist.integrations import accelerate
from mtl_dist.integrations._log_window import LogWindow
from mtl_dist.tracking import check_task_names


def attach(balancer: Balancer, trainer: Trainer, *, name: str = "balancer") -> Balancer:
    """Connects `balancer` to `trainer` (process group, accumulation, logs, checkpoints) before `train`.

    Args:
        balancer: the balancer in the model of the trainer.
        trainer: a `Trainer`, or a subclass in which the model still computes the loss.
        name: name of the balancer in checkpoints. A second balancer needs another name, which is then also
            part of its keys (`mtl/<name>/weight/<task>`).

    Returns:
        The same balancer.

    Raises:
        RuntimeError: the launch fell back silently (`accelerate.check_launch`).
        ValueError: a combination that does not work; the message says what to change. Or a task name that
            no column of Trainer's logs can have.
    """
    _check(trainer)
    if trainer.args.logging_strategy != "no":
        check_task_names(balancer.tasks)
    accelerate.attach(
        balancer, trainer.accelerator, name=name, accumulation=trainer.args.gradient_accumulation_steps
    )
    # The scalar is a mean over its micro-batch. If the model's forward has **kwargs, Trainer assumes that the
    # loss is already divided by the number of labels in the whole step, and multiplies it by the world size.
    trainer.model_accepts_loss_kwargs = False
    _callback_of(trainer).add(balancer, name)
    return balancer


class BalancerCallback(TrainerCallback, ExportableState):
    """Adds balancers to Trainer's logs and checkpoints. `attach` creates it.

    Its row is the mean over the optimizer steps since the last log, like Trainer's own loss. It is copied to
    the host only on logging steps. This callback is the first one, so that the callbacks of trackers see the
    row.
    """

    def __init__(self) -> None:
        self._balancers: dict[str, Balancer] = {}
        self._windows: dict[str, LogWindow] = {}

    def add(self, balancer: Balancer, name: str) -> None:
        """Adds another balancer."""
        self._balancers[name] = balancer
        self._windows[name] = LogWindow(balancer, "" if name == "balancer" else f"{name}/")

    def state(self) -> dict[str, Any]:
        """What Trainer writes into `trainer_state.json`."""
        packed = {name: checkpoint.to_json(checkpoint.pack(b)) for name, b in self._balancers.items()}
        return {"args": {}, "attributes": {"balancers": packed}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restores the balancers if Trainer resumes from a checkpoint.

        Raises:
            ValueError: the checkpoint has no state of the balancer, or one that does not fit. Nothing is
                changed then.
        """
        for window in self._windows.values():
            window.clear()
        if state.global_step == 0:
            return
        exported: Any = state.stateful_callbacks
        saved = exported.get(type(self).__name__, {}).get("attributes", {})
        for name, balancer in self._balancers.items():
            source = f"trainer_state.json at step {state.global_step}, balancer {name!r}"
            if name not in saved.get("balancers", {}):
                raise ValueError(
                    f"{source}: this checkpoint was written before the balancer was attached; resume from a "
                    "later one, or start a new run"
                )
            packed = checkpoint.from_json(saved["balancers"][name], source)
            checkpoint.unpack(balancer, packed, source)

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


def _check(trainer: Trainer) -> None:
    args = trainer.args
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        given = "compute_loss_func" if trainer.compute_loss_func is not None else "label_smoothing_factor"
        raise ValueError(
            f"{given} replaces the loss that the model returns, which is the balancer's scalar: compute "
            "the tasks' losses in the model's forward, and return the balancer's scalar as the loss"
        )
    if trainer.loss_is_scaled_for_ga:
        raise ValueError(
            "loss_is_scaled_for_ga=True, but the balancer's scalar is a mean over one micro-batch, which "
            "Trainer must divide by the accumulation steps: set it to None"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"Trainer runs {args.n_gpu} GPUs in one process (DataParallel), each with its own balancer: "
            f"start it with `torchrun --nproc_per_node {args.n_gpu}`"
        )
    if args.restore_callback_states_from_checkpoint:
        raise ValueError(
            "restore_callback_states_from_checkpoint creates new callbacks without their balancers: set it "
            "to False. The balancer is restored without it"
        )


def _callback_of(trainer: Trainer) -> BalancerCallback:
    callbacks = trainer.callback_handler.callbacks
    for callback in callbacks:
        if isinstance(callback, BalancerCallback):
            return callback
    callback = BalancerCallback()
    callbacks.insert(0, callback)  # before the callbacks of trackers, which read what it adds
    return callback
