"""A device that is no CPU, in Python: what would wait, fail or read too early on an accelerator shows here.

Its tensors are of device type "far", and their values lie in CPU tensors that only this file sees. As on
CUDA, operators run in streams beside the host, and the host must not read what it has not waited for:

* A read of a value (`item`, `nonzero`, a mask as index, `.cpu()`, a blocking copy) is noted in `waits`.
* `Fault`: an operator that mixes devices, float64 where the device has none, a copy that is read before it
  has arrived, a tensor that one stream reads before another has written it, or writes while another reads it.
* Memory that is freed while another stream uses it, without `record_stream`, is noted in `faults`.
* Random numbers come from a generator of the device.

`install` must come before the first backward of a process, whose threads for devices are made then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from streams import HOST, NAME, Event, Fault, Memory, Stream, current
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# operators whose result has a size, or is a number, that only the device knows
READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "argwhere", "allclose",
}  # fmt: skip
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Held(Tensor):
    """A tensor whose values are in `raw`; the host sees none of them."""

    raw: Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, raw: Tensor, memory: Memory) -> Held:
        return Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=cls.place,
        )

    def __init__(self, raw: Tensor, memory: Memory) -> None:
        self.raw, self.memory = raw, memory

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Fault(f"{func} outside of the device")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype})"


class Far(Held):
    """A tensor of the device."""

    place = f"{NAME}:0"

    def record_stream(self, stream: Stream) -> None:
        self.memory.recorded.add(stream)

    def tolist(self) -> Any:
        DEVICE[-1].note("tolist")
        return self.raw.tolist()


class Pinned(Held):
    """Memory of the host that the device writes."""

    place = "cpu"

    def tolist(self) -> Any:
        self.memory.read(HOST)
        return self.raw.tolist()

    def numpy(self) -> Any:
        self.memory.read(HOST)
        return self.raw.numpy()


DEVICE: list[Device] = []


class Device(TorchDispatchMode):
    """Inside, tensors of the device exist.

    Args:
        has_double: whether it has float64.

    Attributes:
        waits: reads for which the host would wait, by name, in order.
        faults: of memory that was freed too early.
    """

    def __init__(self, *, has_double: bool = True) -> None:
        super().__init__()
        self.has_double = has_double
        self.waits: list[str] = []
        self.faults: list[str] = []
        self._allowed = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and saying so to each operator takes time

    def __enter__(self) -> Device:
        DEVICE.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        DEVICE.pop()

    def note(self, what: str) -> None:
        if not self._allowed:
            self.waits.append(what)
        HOST.clock |= current().clock  # it has waited

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Inside, the host may wait."""
        self._allowed += 1
        try:
            yield
        finally:
            self._allowed -= 1

    def far(self, tensor: Tensor) -> Far:
        """The same values on the device."""
        with self.allowed():
            return tensor.detach().to(NAME).requires_grad_(tensor.requires_grad)

    def module(self, net: nn.Module) -> nn.Module:
        """Its parameters on the device, in place."""
        for module in net.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = None if parameter is None else nn.Parameter(self.far(parameter))
        return net

    # ---- one operator ----

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = facts(func).name
        given = [*leaves(args), *leaves(kwargs.values())]
        held = [value for value in given if isinstance(value, Held)]
        place = kwargs.get("device")
        goes_far = place is not None and place.type == NAME
        if not held and not goes_far:
            pinned = kwargs.pop("pin_memory", False)
            out = func(*args, **kwargs)
            return Pinned(out, Memory(HOST, self.faults)) if pinned else out
        far = [value for value in held if isinstance(value, Far)]
        if name in ("_to_copy", "copy_"):
            return self._copied(func, name, args, kwargs)
        if not far and not goes_far:  # what has arrived on the host
            for value in held:
                value.memory.read(HOST)
            return func(*mapped(raw_of, args), **raw_options(kwargs))
        self._check(func, name, given, args)
        return self._ran(func, args, kwargs, far)

    def _check(self, func: Any, name: str, given: list[Any], args: Any) -> None:
        tensors = [value for value in given if isinstance(value, Tensor)]
        far = [value for value in tensors if isinstance(value, Far)]
        for value in tensors:
            if not isinstance(value, Far) and far:
                if name.startswith(("index", "_index")) and value is not args[0]:
                    self.note(f"{name} from the host")
                elif value.dim() > 0 or not facts(func).pointwise:
                    raise Fault(f"{func} of tensors on {sorted({str(t.device) for t in tensors})}")
        if name in READS or (name == "repeat_interleave" and len(args) == 1):
            self.note(name)
        if name in INDEXED:
            indices = [value for value in leaves(args[1]) if isinstance(value, Tensor)]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.note(f"{name} by a mask")

    def _ran(self, func: Any, args: Any, kwargs: Any, far: list[Far]) -> Any:
        stream = current()
        for value in far:
            value.memory.read(stream)
        place = {"device": torch.device("cpu")} if "device" in kwargs else {}
        with self._generator() if facts(func).draws else nullcontext():
            out = func(*mapped(raw_of, args), **{**raw_options(kwargs), **place})
        time = stream.tick()
        written = {id(value.raw) for value in written_by(func, args, kwargs)}
        for value in far:
            value.memory.use(stream, time, writes=id(value.raw) in written)
        known = {id(value.raw): value for value in far}
        memories = {value.raw.untyped_storage()._cdata: value.memory for value in far}

        def wrapped(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in known:
                return known[id(value)]
            return self._new(value, memories.get(value.untyped_storage()._cdata), stream, time)

        return mapped(wrapped, out)

    def _new(self, raw: Tensor, memory: Memory | None, stream: Stream, time: int) -> Far:
        if raw.dtype == torch.float64 and not self.has_double:
            raise Fault("this device has no float64")
        if memory is None:
            memory = Memory(stream, self.faults)
            memory.use(stream, time, writes=True)
        return Far(raw, memory)

    def _copied(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A copy within the device, or between it and the host."""
        waits = not (kwargs.pop("non_blocking", False) or (name == "copy_" and args[2:] and args[2]))
        source = args[1] if name == "copy_" else args[0]
        place = kwargs.pop("device", None) or (args[0].device if name == "copy_" else source.device)
        leaves, arrives = isinstance(source, Far), place.type == NAME
        if leaves and arrives:
            return self._ran(func, args[:2], kwargs, [a for a in args if isinstance(a, Far)])
        if isinstance(source, Pinned):
            source.memory.read(HOST)
        stream = current()
        if leaves:
            source.memory.read(stream)
        if name == "copy_":
            args[0].raw.copy_(source.raw if leaves else raw_of(source))
        raw = args[0].raw if name == "copy_" else func(raw_of(source), **kwargs)
        time = stream.tick()
        if arrives:
            if waits:
                self.note("a blocking copy to the device")
            if name == "copy_":
                args[0].memory.use(stream, time, writes=True)
                return args[0]
            return self._new(raw, None, stream, time)
        if not leaves:
            return args[0] if name == "copy_" else raw
        source.memory.use(stream, time, writes=False)
        target = args[0] if name == "copy_" else Pinned(raw, Memory(HOST, self.faults))
        if waits or not isinstance(target, Pinned):
            self.note("a copy to the host")
            return args[0] if name == "copy_" else raw
        target.memory.writer, target.memory.written = stream, time
        return target

    @contextmanager
    def _generator(self) -> Iterator[None]:
        """Random operators draw from the device's generator."""
        of_host = torch.get_rng_state()
        torch.set_rng_state(MODULE.random)
        yield
        MODULE.random = torch.get_rng_state()
        torch.set_rng_state(of_host)


def leaves(values: Any) -> Iterator[Any]:
    """What is in the arguments of an operator, and in their lists."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The same in the place of each leaf."""
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(function, one) for one in value])
    return function(value)


def raw_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: mapped(raw_of, value) for name, value in kwargs.items()}


def raw_of(value: Any) -> Any:
    return value.raw if isinstance(value, Held) else value


def written_by(func: Any, args: Any, kwargs: Any) -> Iterator[Held]:
    """The arguments that an operator changes."""
    for place, name in facts(func).writes:
        value = args[place] if place < len(args) else kwargs.get(name)
        yield from (one for one in leaves([value]) if isinstance(one, Held))


class Facts(NamedTuple):
    """Of an operator: its name, whether it may take a number of the host, or draws, and what it changes."""

    name: str
    pointwise: bool
    draws: bool
    writes: tuple[tuple[int, str], ...]


@cache
def facts(func: Any) -> Facts:
    name = func.overloadpacket._qualified_op_name.split("::")[-1]
    pointwise, draws = torch.Tag.pointwise in func.tags, torch.Tag.nondeterministic_seeded in func.tags
    aliases = [(place, a.name, a.alias_info) for place, a in enumerate(func._schema.arguments)]
    writes = [(place, name) for place, name, alias in aliases if alias is not None and alias.is_write]
    return Facts(name, pointwise, draws, tuple(writes))


class Module:
    """What `torch.far` offers, as `torch.cuda` does."""

    is_available = is_initialized = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])

    def __init__(self) -> None:
        self.random = torch.Generator().get_state()

    def manual_seed_all(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed).get_state()

    def get_rng_state(self, _: Any = None) -> Tensor:
        return self.random.clone()

    def set_rng_state(self, state: Tensor, _: Any = None) -> None:
        self.random = state.clone()


MODULE = Module()


def install() -> None:
    """Makes the device known to torch, for the rest of this process."""
    _setup_privateuseone_for_python_backend(NAME, MODULE)
    torch.Stream, torch.Event = Stream, Event
    torch.accelerator.current_stream = current
    torch.tensor, torch.as_tensor = copying(torch.tensor), copying(torch.as_tensor)


def copying(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor(numbers, device=...)` makes its copy to the device below all modes; here one sees it."""

    def made(*args: Any, device: Any = None, **others: Any) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(*args, device=device, **others)
        return make(*args, **others).to(NAME)

    return made
