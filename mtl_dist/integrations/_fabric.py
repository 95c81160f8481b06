"""Lightning Fabric: what `lightning.attach` does where the loop is the user's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakSet, ref

from torch.optim.optimizer import register_optimizer_step_post_hook

from mtl_dist.balancer import Balancer
from mtl_dist.engines import Engine
from mtl_dist.integrations._attached import Attached
from mtl_dist.integrations._idle import IdleWatch
from mtl_dist.integrations._log_window import LogWindow

_PATIENCE = 10  # optimizer steps; some loops begin with steps of another model
_LOG_EVERY = 50  # optimizer steps, as Lightning's Trainer does


def is_fabric(given: Any) -> bool:
    """Whether it is a `Fabric`."""
    return any(kind.__name__ == "Fabric" for kind in type(given).__mro__)


class FabricHooks:
    """A callback of Fabric for one balancer, which it holds weakly.

    Args:
        balancer: of the model that is set up.
        fabric: for its loggers and its loss scale.
        name: of the balancer.
        late: whether the training may begin without it.
    """

    def __init__(self, balancer: Balancer, fabric: Any, name: str, late: bool) -> None:
        self.name = name
        self._balancer, self._fabric = ref(balancer), ref(fabric)
        self._log = LogWindow(balancer, "" if name == "balancer" else f"{name}/")
        self._idle = IdleWatch(
            _PATIENCE,
            "Call balancer(features, heads) in the model's forward, and give the scalar that it returns to "
            "fabric.backward",
        )
        if not late:
            self._idle.add(balancer)
        self._steps = 0
        self._stepped: WeakSet[Any] = WeakSet()  # optimizers that stepped since the last call
        self._skipped = False
        scaler = getattr(fabric.strategy.precision, "scaler", None)
        if scaler is not None:
            mine = ref(self)
            register_optimizer_step_post_hook(lambda optimizer, *_: _note(mine(), optimizer))
        balancer.set_engine(
            Engine(
                skipped=None if scaler is None else lambda: self._skipped,
                scaled=None if scaler is None else scaler.scale,
            )
        )

    @property
    def balancer(self) -> Balancer | None:
        """The balancer, while it exists."""
        return self._balancer()

    def stepped(self, optimizer: Any) -> None:
        """An optimizer took a step."""
        self._stepped.add(optimizer)

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        """Fabric calls it after each optimizer step, skipped ones too.

        Raises:
            RuntimeError: the training does not pass the balancer.
        """
        self._idle.after_step()
        self._skipped = optimizer not in self._stepped
        self._stepped.clear()
        self._steps += 1
        fabric = self._fabric()
        if fabric is None or not fabric.loggers:
            return
        self._log.add_micro_batch()
        self._log.close_step()
        if self._steps % _LOG_EVERY == 0:
            fabric.log_dict(self._log.row(), step=self._steps - 1)


def attach_to_fabric(balancer: Balancer, fabric: Any, name: str, late: bool, group: Any) -> None:
    """Adds the hooks of `balancer`.

    Raises:
        ValueError: the balancer is attached already, or another one that still exists has the name.
    """
    attached = Attached()
    for hooks in _hooks(fabric):
        if (other := hooks.balancer) is not None:
            attached.add(other, hooks.name)
    attached.check(balancer, name)
    callbacks = fabric._callbacks  # no public way to add one after construction
    callbacks[:] = [one for one in callbacks if not (isinstance(one, FabricHooks) and one.name == name)]
    callbacks.append(FabricHooks(balancer, fabric, name, late))
    _keep_states(fabric)
    balancer.set_group(group if balancer.group is None else balancer.group)


def _keep_states(fabric: Any) -> None:
    """`fabric.save` and `load` take the states of attached balancers too, for which Fabric has no hook."""
    for method in ("save", "load"):
        if method not in vars(fabric):
            setattr(fabric, method, _with_states(ref(fabric), getattr(type(fabric), method)))


def _with_states(fabric: ref[Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(inner)
    def with_states(path: Any, state: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(state, dict):
            return inner(fabric(), path, state, *args, **kwargs)
        given = [id(value) for value in state.values()]
        found = {f"mtl_dist/{hooks.name}": hooks.balancer for hooks in _hooks(fabric())}
        own = {key: one for key, one in found.items() if one is not None and id(one) not in given}
        state |= own  # a copy would not receive what `load` writes into it
        try:
            return inner(fabric(), path, state, *args, **kwargs)
        finally:
            for key in own:
                del state[key]

    return with_states


def detach_from_fabric(balancer: Balancer | str, fabric: Any) -> None:
    """Removes the hooks of `balancer`, given itself or its name.

    Raises:
        ValueError: it is not attached.
    """
    for hooks in _hooks(fabric):
        found = hooks.balancer
        if balancer == hooks.name or (found is not None and found is balancer):
            fabric._callbacks.remove(hooks)
            if found is not None:
                found.set_engine(Engine())
            return
    names = [hooks.name for hooks in _hooks(fabric)]
    raise ValueError(f"detach: this balancer is not attached here; attached are {names}")


def _hooks(fabric: Any) -> list[FabricHooks]:
    return [one for one in fabric._callbacks if isinstance(one, FabricHooks)]


def _note(hooks: FabricHooks | None, optimizer: Any) -> None:
    if hooks is not None:
        hooks.stepped(optimizer)
