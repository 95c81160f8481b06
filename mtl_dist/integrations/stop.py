"""Save on signal: one rank hears that the job will end, all ranks save after the same step.

    with SaveOnSignal(balancer) as stop:
        for batch in loader:
            accelerator.backward(model(batch))
            optimizer.step()
            if stop.requested():
                accelerator.save_state(folder)
                break
    sys.exit(stop.exit_status)

SLURM, Kubernetes and torchrun send a signal ahead of the end, often to one machine only. A rank that saved
alone would wait for the others, and hang. The request travels in the all-reduce that each step makes anyway.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any, Self

from mtl_dist.balancer import Balancer

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: not finished, start it again
SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGTERM") if hasattr(signal, name))


class SaveOnSignal:
    """Inside, the signals no longer end the process: `requested` tells all ranks after the same step.

    SIGTERM is sent by `scancel`, Kubernetes, and torchrun where it ends; SIGUSR1 by `launch/slurm.sh`. After
    30 seconds (Kubernetes: `terminationGracePeriodSeconds`) all of these send SIGKILL, except SIGUSR1.

    Args:
        balancer: of the model that is trained. The request travels with its statistics.
        signals: what is taken for a request. None of them: only `balancer.notice.raised = True` asks.

    Attributes:
        signal: the name of the signal that this process received; None if it received none.
    """

    def __init__(self, balancer: Balancer, signals: Iterable[signal.Signals] = SIGNALS) -> None:
        self.signal: str | None = None
        self._notice = balancer.notice
        self._signals = tuple(signals)
        self._before: dict[signal.Signals, Any] = {}
        self._asked = False

    def __enter__(self) -> Self:
        if self._signals and threading.current_thread() is not threading.main_thread():
            raise RuntimeError("SaveOnSignal: Python delivers signals to the main thread; enter it there")
        self._notice.listening = True
        self._before = {number: signal.signal(number, self._receive) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._notice.listening = self._notice.raised = self._notice.heard = False

    def requested(self) -> bool:
        """Whether to save and stop now. Call it on every rank after the same steps.

        The answer is the same on every rank. On an accelerator it comes one step late, so that the host does
        not wait for the device.
        """
        self._asked = self._asked or self._notice.heard
        return self._asked

    @property
    def exit_status(self) -> int:
        """What the process should end with: 75 where the training was stopped, else 0.

        torchrun and `accelerate launch` end with 1 where a process of theirs does not end with 0.
        """
        return EXIT_STATUS if self._asked else 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        self._notice.raised = True
