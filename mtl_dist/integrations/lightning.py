"""Lightning's automatic optimization: one call connects a balancer to a `Trainer`.

    trainer = lightning.Trainer(...)
    attach(model.balancer, trainer)  # training_step returns the balancer's scalar
    trainer.fit(model)

The balancer then knows when an optimizer step follows (also at the end of an epoch, inside an accumulation),
which steps the loss scaler skipped, and the loss scale. Its state is in Lightning's checkpoints, and its rows
in the trainer's loggers. `lightning` and `pytorch_lightning` both work.

With Fabric, call `attach(model.balancer, fabric)` first; `fabric.save` and `fabric.load` then have its state
too. The loop is yours, so windows count calls, and a step inside a window is refused.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from weakref import ReferenceType, WeakSet, ref

import torch
import torch.distributed as dist

from mtl_dist import checkpoint
from mtl_dist.balancer import Balancer
from mtl_dist.engines import Engine
from mtl_dist.integrations._attached import Attached, check_given
from mtl_dist.integrations._fabric import attach_to_fabric, detach_from_fabric, is_fabric
from mtl_dist.integrations._idle import IdleWatch
from mtl_dist.integrations._log_window import LogWindow
from mtl_dist.tracking import check_task_names

_PACKAGES = ("lightning", "pytorch_lightning")
_PATIENCE_OF_LOOPS = 10  # optimizer steps, where the user's own loop steps several optimizers (a GAN)
# All ranks of these hold different samples, except along the axes of a mesh
_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy")


def attach(balancer: Balancer, trainer: Any, *, name: str = "balancer", late: bool = False) -> Balancer:
    """Connects `balancer` to `trainer` before `fit`. The trainer does not keep the balancer alive.

    Args:
        balancer: the balancer in the model that the trainer fits.
        trainer: a Lightning `Trainer`, or a module that has one (in its `setup`); or a `Fabric`.
        name: name of the balancer in checkpoints. A second balancer needs another name, which is then also
            part of its keys (`mtl/<name>/weight/<task>`).
        late: whether the training may begin without the balancer. Otherwise the first optimizer step whose
            loss did not pass through it raises an error.

    Returns:
        The same balancer.

    Raises:
        TypeError: `trainer` is neither.
        ValueError: a combination that does not work; the message says what to change.
    """
    check_given(balancer)
    check_task_names(balancer.tasks)
    if is_fabric(trainer):
        _check_strategy(trainer.strategy)
        attach_to_fabric(balancer, trainer, name, late, _data_parallel_group(trainer))
        return balancer
    trainer = _trainer_of(trainer)
    _check_strategy(trainer.strategy)
    attached = Attached()
    for callback in _callbacks(trainer):
        if (other := callback.balancer) is not None:
            attached.add(other, callback.name)
    attached.check(balancer, name)
    trainer.callbacks[:] = [
        callback for callback in trainer.callbacks if not (_is_ours(callback) and callback.name == name)
    ]
    callback = _make(_package_of(trainer), balancer, name, late)
    trainer.callbacks.insert(0, callback)  # checkpoints are the last, and hold what it has then
    if trainer.training:  # called from the module's `setup`, after those of the callbacks
        callback.setup(trainer, trainer.lightning_module, "fit")
    return balancer


def detach(balancer: Balancer | str, trainer: Any) -> None:
    """Undoes `attach`: checkpoints and loggers no longer have the balancer.

    Args:
        balancer: the balancer, or its name.
        trainer: what it is attached to.

    Raises:
        ValueError: it is not attached.
    """
    if is_fabric(trainer):
        detach_from_fabric(balancer, trainer)
        return
    trainer = _trainer_of(trainer)
    for callback in _callbacks(trainer):
        found = callback.balancer
        if balancer == callback.name or (found is not None and found is balancer):
            trainer.callbacks.remove(callback)
            if found is not None:
                found.set_engine(Engine())
            return
    names = [callback.name for callback in _callbacks(trainer)]
    raise ValueError(f"detach: this balancer is not attached here; attached are {names}")


class BalancerHooks:
    """The hooks of one attached balancer. `attach` makes a `Callback` of them, of the package in use.

    Args:
        balancer: held weakly.
        name: its name in checkpoints.
        late: whether the training may begin without it.
    """

    def __init__(self, balancer: Balancer, name: str, late: bool) -> None:
        self.name = name
        self._balancer = ref(balancer)
        self._tasks = balancer.tasks
        self._late = late
        self._log = LogWindow(balancer, "" if name == "balancer" else f"{name}/")
        self._trainer: ReferenceType[Any] | None = None
        self._hooked: WeakSet[Any] = WeakSet()
        self._batch = 0
        self._stepped = True  # whether the last optimizer step was taken
        self._idle = IdleWatch(1, "")

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels with its model to processes that are spawned; `setup` connects them there."""
        return _make, (_package_of(self), self.balancer, self.name, self._late)

    @property
    def balancer(self) -> Balancer | None:
        """The balancer, while it exists."""
        return self._balancer()

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints."""
        return f"mtl_dist.{self.name}"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Tells the balancer about the trainer, before anything is restored.

        Raises:
            ValueError: the balancer is gone, or its windows could not follow the optimizer steps.
        """
        if stage != "fit":
            return
        balancer = self.balancer
        if balancer is None:
            raise ValueError(
                f"the model of the attached balancer {self.name!r} (tasks {list(self._tasks)}) is gone: call "
                "attach(model.balancer, trainer) with the model that is fitted, or detach it by its name"
            )
        _check_window(balancer, pl_module, trainer.accumulate_grad_batches)
        self.connect(trainer)
        patience = 1 if pl_module.automatic_optimization else _PATIENCE_OF_LOOPS
        self._idle = IdleWatch(
            patience,
            "Return the balancer's scalar from training_step (or give it to manual_backward), and attach the "
            "balancer of the model that is fitted",
        )
        if not self._late:
            self._idle.add(balancer)

    def connect(self, trainer: Any) -> None:
        """Gives the balancer its engine and its group."""
        balancer = self.balancer
        assert balancer is not None  # `setup` has looked
        self._trainer = ref(trainer)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        automatic = trainer.lightning_module.automatic_optimization
        balancer.set_engine(
            Engine(
                accumulation=trainer.accumulate_grad_batches if automatic else None,
                closes_window=self._closes_window if automatic else None,
                skipped=None if scaler is None else lambda: not self._stepped,
                scaled=None if scaler is None else scaler.scale,
            )
        )
        balancer.set_group(_data_parallel_group(trainer) if balancer.group is None else balancer.group)
        self._log.clear()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Notes which batch follows."""
        self._batch = batch_idx

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Called before each optimizer step.

        Raises:
            RuntimeError: the training does not pass the balancer.
        """
        self._idle.after_step()
        self._stepped = False
        if optimizer not in self._hooked:
            self._hooked.add(optimizer)
            optimizer.register_step_post_hook(_Note(self))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds a row to the loggers where Lightning writes its own."""
        every = trainer.log_every_n_steps
        if not every or not trainer.loggers:
            return
        self._log.add_micro_batch()
        if not self._closes_window():
            return
        self._log.close_step()
        if trainer.global_step % every == 0:
            row = self._log.row()
            for logger in trainer.loggers:  # Lightning counts the steps of its rows from 0
                logger.log_metrics(dict(row), step=trainer.global_step - 1)

    def state_dict(self) -> dict[str, Any]:
        """What Lightning writes into its checkpoints."""
        balancer = self.balancer
        return {} if balancer is None else checkpoint.to_json(checkpoint.pack(balancer))

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Mapping[str, Any]) -> None:
        """Looks for the balancer's state before a training goes on.

        Raises:
            ValueError: there is none.
        """
        if trainer.state.fn == "fit" and not checkpoint.get("callbacks", {}).get(self.state_key):
            raise ValueError(
                f"this checkpoint (step {checkpoint.get('global_step')}) has no state of the balancer "
                f"{self.name!r}: it was written before the balancer was attached, or under another name. "
                "Resume from a later one, attach under that name, or start a new run"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from `state_dict`, bit for bit.

        Raises:
            ValueError: it belongs to another balancer, or is damaged. Nothing is changed then.
        """
        balancer = self.balancer
        if balancer is not None:
            source = f"Lightning's checkpoint, balancer {self.name!r}"
            checkpoint.unpack(balancer, checkpoint.from_json(state_dict, source), source)
            self._log.clear()

    def note_step(self) -> None:
        """The optimizer has stepped."""
        self._stepped = True

    def _closes_window(self) -> bool:
        """Whether an optimizer step follows this batch: Lightning also steps at an epoch's last one."""
        trainer = None if self._trainer is None else self._trainer()
        if trainer is None:
            return True
        number = self._batch + 1
        is_last = trainer.is_last_batch or number == trainer.num_training_batches
        return bool(is_last or number % trainer.accumulate_grad_batches == 0)


class _Note:
    """A hook of an optimizer, which may outlive the callback."""

    def __init__(self, hooks: BalancerHooks) -> None:
        self._hooks = ref(hooks)

    def __call__(self, *_: Any) -> None:
        hooks = self._hooks()
        if hooks is not None:
            hooks.note_step()


@lru_cache(maxsize=len(_PACKAGES))
def _callback_class(package: str) -> Any:
    base = importlib.import_module("lightning.pytorch" if package == "lightning" else package).Callback
    return type("BalancerCallback", (BalancerHooks, base), {"__doc__": BalancerHooks.__doc__})


def _make(package: str, balancer: Balancer, name: str, late: bool) -> Any:
    return _callback_class(package)(balancer, name, late)


def _trainer_of(given: Any) -> Any:
    """The trainer, or that of a module.

    Raises:
        TypeError: there is none.
    """
    if hasattr(given, "fit_loop"):
        return given
    trainer = getattr(given, "_trainer", None) if isinstance(given, torch.nn.Module) else None
    if trainer is None:
        raise TypeError(
            "attach takes Lightning's Trainer or Fabric, or a module that is fitted, got "
            f"{type(given).__name__}: call attach(model.balancer, trainer) before trainer.fit(model), or "
            "attach(self.balancer, self) in setup"
        )
    return trainer


def _package_of(client: Any) -> str:
    packages = [kind.__module__.split(".")[0] for kind in type(client).__mro__]
    return next(package for package in packages if package in _PACKAGES)


def _is_ours(callback: Any) -> bool:
    return isinstance(callback, BalancerHooks)


def _callbacks(trainer: Any) -> list[Any]:
    return [callback for callback in trainer.callbacks if _is_ours(callback)]


def _check_window(balancer: Balancer, module: Any, accumulation: int) -> None:
    """Raises `ValueError` where the ends of windows cannot be known."""
    if balancer.window is None:
        return
    if not module.automatic_optimization:
        raise ValueError(
            f"the balancer holds its weights for window={balancer.window} micro-batches, but with "
            "automatic_optimization=False only your training_step knows when the optimizer steps: use "
            "window=None, or automatic optimization"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters and accumulation > 1:
        raise ValueError(
            f"the balancer holds its weights for window={balancer.window} micro-batches, but with a "
            "dataloader_iter Lightning does not know which batch is the last: take `batch` in training_step, "
            "or use window=None"
        )


def _check_strategy(strategy: Any) -> None:
    """Raises `ValueError` for a strategy whose data-parallel ranks or steps are not known."""
    names = {kind.__name__ for kind in type(strategy).__mro__}
    if names & set(_STRATEGIES):
        return
    remedy = (
        "use mtl_dist.integrations.deepspeed.attach(balancer, trainer.strategy.deepspeed_engine) in "
        "on_train_start, and keep balancer.state_dict() in on_save_checkpoint"
        if "DeepSpeedStrategy" in names
        else "tell the balancer yourself, with balancer.set_engine and balancer.set_group"
    )
    raise ValueError(
        f"attach works with {', '.join(_STRATEGIES)}, got {type(strategy).__name__}: use one of them, or "
        f"{remedy}"
    )


def _data_parallel_group(trainer: Any) -> dist.ProcessGroup | None:
    """The ranks that hold different samples; None for all ranks."""
    mesh = getattr(trainer.strategy, "device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    if "data_parallel" not in names:
        return None  # FSDP: replicas and shards hold different samples
    assert mesh is not None  # it has names
    group: dist.ProcessGroup = mesh["data_parallel"].get_group()
    return group
