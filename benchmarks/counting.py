"""What a step takes but for time: operators, host reads and collectives; memory."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# what item(), bool(), float(), int() and equal() call on every device
_READS = {aten._local_scalar_dense.default, aten.equal.default}
_COPIES = {aten._to_copy.default, aten.copy_.default}
# on the CPU these read memory: the dispatcher does not see them, nor a TorchFunctionMode those in a backward
_METHODS = ("tolist", "numpy")
_COLLECTIVES = {"c10d", "_c10d_functional"}


@dataclass
class Counts:
    """What happened inside `counting`.

    Attributes:
        operators: calls of operators that are no views. In a small model each takes some microseconds of the
            host, whatever the device does.
        reads: times at which a host would wait for an accelerator: item, bool, float, int, tolist and copies
            to the CPU that block. On the CPU `numpy()` stands for such a copy, and reads of what would be on
            the host anyway count too: those of the rule and the weights with `lag=1`.
        collectives: calls of torch.distributed.
    """

    operators: int = 0
    reads: int = 0
    collectives: int = 0


class counting(TorchDispatchMode):  # used as a function, like torch.no_grad
    """Counts the operators of the block inside, those of its backward too.

        with counting() as counts:
            step()

    Operators inside a compiled or C++ kernel are one call. What DDP, FSDP2 and DeepSpeed do in Python or
    through the dispatcher counts as well, in the plain step too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counts = Counts()

    def __enter__(self) -> Counts:  # type: ignore[override]
        if not torch.cuda.is_available():  # there a copy goes before them, and the dispatcher sees it
            for name in _METHODS:
                setattr(Tensor, name, self._counted(getattr(Tensor, name)))
        super().__enter__()
        return self._counts

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name in _METHODS:
            if name in vars(Tensor):
                delattr(Tensor, name)  # the class inherits the original

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._counts.reads += 1
            return original(tensor, *args, **kwargs)

        return method

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in _COLLECTIVES:
            self._counts.collectives += 1
        elif (func in _READS and _from_device(args)) or (
            func in _COPIES and _blocks(func, args, kwargs or {}, result)
        ):
            self._counts.reads += 1
        elif not func.is_view:
            self._counts.operators += 1
        return result


def _from_device(args: tuple[Any, ...]) -> bool:
    """Whether a read waits for an accelerator. On a machine without one, every read stands for such a one."""
    return not torch.cuda.is_available() or any(
        isinstance(value, Tensor) and value.device.type != "cpu" for value in args
    )


def _blocks(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    """Whether a copy goes from an accelerator to the host, which waits for it."""
    into = func is aten.copy_.default
    source, later = args[1 if into else 0], kwargs.get("non_blocking", into and len(args) > 2 and args[2])
    return source.device.type != "cpu" and result.device.type == "cpu" and not later


class PeakMemory:
    """Peak memory of the block inside in MB, beyond what there was before; of the device if there is one.

        with PeakMemory() as memory:
            step()
        memory.megabytes

    On the CPU it is what torch's allocator gave out, from the events of its profiler: the same in every run.

    Attributes:
        megabytes: known after the block.
    """

    megabytes = 0.0

    def __enter__(self) -> Self:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() - self._before
        else:
            self._profile.__exit__(*error)
            results = self._profile.profiler.kineto_results
            sizes = sorted(_allocations(results.experimental_event_tree()))
            peak = max(itertools.accumulate([size for _, size in sizes], initial=0))
        self.megabytes = peak / 1e6


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """When memory was taken or given back (negative), and how many bytes."""
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _allocations(event.children)
