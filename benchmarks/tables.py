"""What tables say about the machine, about errors, and about what they leave out."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def facts() -> dict[str, Any]:
    """Date, device, processor, cores, versions."""
    processor = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": processor,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def median_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The median, and half of its 95 % interval, `1.57 IQR / √rounds` (McGill, Tukey and Larsen 1978)."""
    if len(values) < 2:
        return values[0], math.nan
    low, _, high = statistics.quantiles(values, n=4)
    return statistics.median(values), 1.57 * (high - low) / math.sqrt(len(values))


def left_out_lines(reasons: Mapping[str, str]) -> list[str]:
    """One line for each reason, with the variants that it keeps out."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"* Left out: {'; '.join(which)}. {reason}." for reason, which in names.items()]
