"""The checkpoint of a balancer: tensors and JSON, no pickle. It loads completely, or it is refused.

    save(balancer, folder)      balancer.json and balancer.<digest>.safetensors
    load(balancer, folder)      continues bit for bit, or raises and changes nothing

The JSON names the tensor file and is renamed into place last, so a killed writer leaves the previous
checkpoint as it was. One SHA-256 covers both files: it finds damage, it is no signature. The same state gives
the same bytes. Floating-point tensors are stored as float64, whatever the device computes in.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from mtl_dist.balancer import Balancer
from mtl_dist.durable import write_whole
from mtl_dist.stats import StepReport, TaskStats

FORMAT = 1
_STATE, _REPORT = "state.", "report."


@dataclass(frozen=True)
class Packed:
    """A balancer's state outside of torch.

    Attributes:
        header: JSON values: format, tasks, rule, step, digest.
        tensors: a safetensors file.
    """

    header: dict[str, Any]
    tensors: bytes

    @property
    def digest(self) -> str:
        """SHA-256 of header (without its digest) and tensors."""
        rest = {key: value for key, value in self.header.items() if key != "sha256"}
        return hashlib.sha256(_json(rest).encode() + self.tensors).hexdigest()


def save(balancer: Balancer, folder: str | Path, name: str = "balancer") -> None:
    """Writes the state of `balancer` into `folder`. State is the same on all ranks: one of them writes.

    Args:
        balancer: whose step, weights, rule's state and report are written.
        folder: made where it does not exist.
        name: of the files; letters, digits, `_` and `-`.

    Raises:
        ValueError: the name cannot be one of a file.
    """
    write(pack(balancer), folder, name)


def load(balancer: Balancer, folder: str | Path, name: str = "balancer") -> None:
    """Continues from what `save` wrote; every rank calls it.

    Raises:
        FileNotFoundError: there is no checkpoint of that name in `folder`.
        ValueError: it is damaged, of another format, or belongs to other tasks or another rule. Nothing is
            changed then.
    """
    file = Path(folder) / f"{checked_name(name)}.json"
    try:
        header = json.loads(file.read_bytes())
        tensors = (file.parent / Path(header["tensors"]).name).read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no balancer's checkpoint {str(error.filename)!r}: it was written before the balancer was "
            f"attached, under another name (this folder has balancers named {_names_in(file.parent)}), or "
            "only on another machine. Resume from a complete one, or start a new run"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(str(file), repr(error)) from None
    unpack(balancer, Packed({key: header[key] for key in header if key != "tensors"}, tensors), str(file))


def pack(balancer: Balancer) -> Packed:
    """State of `balancer` as JSON values and tensors on the host."""
    state = balancer.state_dict()
    tensors = {_STATE + key: value for key, value in state.items() if isinstance(value, Tensor)}
    fields = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    report = balancer.report
    if report is not None:
        tensors |= {_REPORT + key: value for key, value in _report_tensors(report).items()}
        fields["report_step"] = report.step
    blob = tensor_bytes({key: _canonical(value) for key, value in sorted(tensors.items())})
    packed = Packed({"format": FORMAT, **fields}, blob)
    return Packed({**packed.header, "sha256": packed.digest}, blob)


def unpack(balancer: Balancer, packed: Packed, source: str) -> None:
    """Sets `balancer` to a packed state.

    Args:
        balancer: of the same tasks and rule.
        packed: what `pack` gave.
        source: where it comes from, for messages.

    Raises:
        ValueError: as `load`; nothing is changed then.
    """
    header = packed.header
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{source}: written in format {header.get('format')!r}, this version of mtl_dist reads {FORMAT}; "
            "resume with the version that wrote it"
        )
    if header.get("sha256") != packed.digest:
        raise _damaged(source, "its digest does not fit its content")
    try:
        tensors = read_tensors(packed.tensors)
    except SafetensorError as error:
        raise _damaged(source, repr(error)) from None
    state = {key: value for key, value in header.items() if key not in ("format", "sha256", "report_step")}
    state |= _under(_STATE, tensors)
    _check_dtypes(balancer.state_dict(), state, source)
    report = _report(balancer, _under(_REPORT, tensors), header.get("report_step"))
    try:
        balancer.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    balancer.report = report


def write(packed: Packed, folder: str | Path, name: str = "balancer") -> None:
    """Writes a packed state; see `save`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{checked_name(name)}.{packed.digest[:16]}.safetensors"
    write_whole(file, packed.tensors)
    write_whole(folder / f"{name}.json", (_json({**packed.header, "tensors": file.name}) + "\n").encode())
    for old in folder.glob(f"{name}.*.safetensors"):
        if old != file:
            old.unlink(missing_ok=True)


def to_json(packed: Packed) -> dict[str, Any]:
    """A packed state as one JSON value, for frameworks that keep their own JSON."""
    return {**packed.header, "tensors": base64.b64encode(packed.tensors).decode("ascii")}


def from_json(value: Any, source: str) -> Packed:
    """What `to_json` gave.

    Raises:
        ValueError: it is something else.
    """
    try:
        tensors = base64.b64decode(value["tensors"], validate=True)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(source, repr(error)) from None
    return Packed({key: value[key] for key in value if key != "tensors"}, tensors)


def checked_name(name: str) -> str:
    """A name that is safe in a file's name."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"a balancer's name has letters, digits, _ and -, got {name!r}")
    return name


def _report_tensors(report: StepReport) -> dict[str, Tensor]:
    stats = report.stats
    tensors = {"losses": stats.losses, "present": stats.present, "counts": stats.counts}
    tensors |= {"weights": report.weight_vector, "held": report.held}
    return tensors if stats.gram is None else {**tensors, "gram": stats.gram}


def _report(balancer: Balancer, tensors: Mapping[str, Tensor], step: Any) -> StepReport | None:
    if not tensors:
        return None
    stats = TaskStats(
        tensors["losses"], tensors["present"], tensors.get("gram"), tensors["counts"], int(step)
    )
    return StepReport(balancer.tasks, stats, tensors["weights"], tensors["held"])


def _check_dtypes(expected: Mapping[str, Any], given: Mapping[str, Any], source: str) -> None:
    """Raises unless tensors that both have are of the same kind; all else is for `load_state_dict`."""
    for key in expected.keys() & given.keys():
        wanted, got = expected[key], given[key]
        if isinstance(wanted, Tensor) and isinstance(got, Tensor) and _canonical(wanted).dtype != got.dtype:
            raise ValueError(f"{source}: state {key!r} must be {_canonical(wanted).dtype}, got {got.dtype}")


def _canonical(value: Tensor) -> Tensor:
    """A copy on the host, contiguous, float64 where it is floating-point."""
    host = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return host.to(torch.float64) if host.is_floating_point() else host


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, sort_keys=True)


def _names_in(folder: Path) -> list[str]:
    """Names of the balancers whose files stand in `folder`."""
    tensors = re.compile(r"([A-Za-z0-9_-]+)\.[0-9a-f]{16}\.safetensors")
    found = (tensors.fullmatch(file.name) for file in folder.glob("*.safetensors"))
    return sorted(match[1] for match in found if match)


def _damaged(source: str, reason: str) -> ValueError:
    return ValueError(
        f"{source}: the balancer's checkpoint is damaged or was changed by hand ({reason}); "
        "resume from another one, or copy this one again"
    )
