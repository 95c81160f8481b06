"""Nothing waits for an accelerator, fails on it or reads too early there, as far as a stand-in can show it.

`stand_in.py` is a device in Python. What only real ones show (times, NCCL, numerics of kernels) is for
`launch/gpu.sh`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import stand_in_run
import warm
from program import ROOT
from torch.utils import backend_registration

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="torch before 2.10 takes no device that is written in Python",
)
NAMES = [name for name, _ in stand_in_run.cases()]
SOLVED = ["a copy to the host"]  # of the statistics, for a rule that is solved there
# ranks compare their lists of parameters, or tell how many rows they have: docstrings say that the host waits
COMPARED = ["a blocking copy to the device", "a blocking copy to the device", "tolist", "_local_scalar_dense"]
GATHERED = ["a blocking copy to the device", "tolist"]
PLANTED = {
    "a rule reads": "_local_scalar_dense",
    "a rule mixes devices": "Fault: aten.mul.Tensor of tensors on ['cpu', 'far:0']",
    "a rule needs float64": "Fault: this device has no float64",
    "a copy is read too early": "Fault: the host reads a copy that has not been written yet",
    "the side stream does not wait": "Fault: a stream reads what another one has not written yet",
    "nobody waits for the counts": "Fault: a stream reads what another one has not written yet",
    "constants for one device": "a blocking copy to the device",
    "memory is not recorded": "memory is freed while another stream uses it: record_stream",
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("stand_in") / "seen.json"
    path = os.pathsep.join(str(folder) for folder in (HERE, HERE.parent / "weighting", ROOT))
    done = warm.launch(HERE / "stand_in_run.py", 1, out, env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", [name for name in NAMES if "alarm" not in name and "planted" not in name])
def test_it_is_as_on_a_cpu_and_nothing_waits(seen: dict, name: str) -> None:
    error, waits, *wrong = seen[name]
    assert not wrong, wrong
    assert error <= (2e-6 if "no float64" in name else 1e-12)
    plain = name.removesuffix(", lag")
    if plain.startswith("ParameterProbe") or plain in ("parameters=", "no float64, ParameterProbe"):
        assert waits in (COMPARED, COMPARED + SOLVED)
    elif plain.startswith("SharedLayerProbe(kernel)"):
        assert waits == GATHERED
    elif plain == "skip":
        assert waits == [*SOLVED, "_local_scalar_dense"]
    elif name.endswith(", lag"):
        assert waits == []
    else:
        assert waits in ([], SOLVED)


@pytest.mark.parametrize("name", [name for name in NAMES if "alarm" in name])
def test_an_alarm_comes_with_the_next_call(seen: dict, name: str) -> None:
    _, waits, *said = seen[name]
    assert waits in ([], SOLVED)
    (text,) = said
    assert text.startswith("in call 2: ")
    assert ("task 'task0' on 2 ranks" if "NaN" in name else "task_ids must be in 0 ... 2") in text


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_mistake_shows(seen: dict, mistake: str) -> None:
    _, waits, *wrong = seen[f"planted: {mistake}"]
    assert PLANTED[mistake] in [*waits, *wrong]


def test_every_mistake_is_looked_for(seen: dict) -> None:
    assert {f"planted: {mistake}" for mistake in PLANTED} == {name for name in seen if "planted" in name}
