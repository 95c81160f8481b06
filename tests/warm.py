"""Runs a script on W real processes without waiting for imports: forks of a process that has them already.

torch, Accelerate and DeepSpeed take 2 to 4 seconds of CPU time to import, in the launcher and in every
rank, which was half of what this suite took. The ranks here are processes of their own that meet over Gloo,
as those of torchrun are; tests whose subject is launching use torchrun, `accelerate launch` or launch/*.sh
themselves. `test_warm.py` holds both to the same results.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from program import ROOT, SUPERVISED, environment, prepare_deepspeed
from torch.distributed import TCPStore

TORCH = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "mtl_dist")
TRAINING = (*TORCH, "accelerate", "pydantic", "sklearn.datasets", "safetensors.torch")
DEEPSPEED = (*TORCH, "accelerate.utils.deepspeed", "deepspeed")
TRAINER = (*TORCH, "datasets", "transformers.trainer", "transformers.models.bert.modeling_bert")
LIGHTNING = (*TORCH, "lightning")
# read when a module is imported, so the same in every server and every launch
AT_IMPORT = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
START_LIMIT = 120.0  # seconds for the imports, on a busy machine

_forks: list[Forks] = []  # one, once it is needed


class Forks:
    """A process with `TORCH` imported, and below it one for every group of modules that was asked for."""

    def __init__(self) -> None:
        folder = Path(__file__).parent
        command = [*SUPERVISED, sys.executable, "-u", str(folder / "warm_server.py"), *TORCH]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the server
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment({**AT_IMPORT, "PYTHONPATH": path}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,
        )
        self.servers: dict[tuple[str, ...], str] = {}  # by their modules, what the imports printed
        try:
            self.said = self.answer(START_LIMIT)["said"]
        except BaseException:
            self.close()
            raise

    def start(self, modules: tuple[str, ...]) -> None:
        """The server of these modules, which is a fork."""
        if modules not in self.servers:
            said = self.ask({"modules": modules}, START_LIMIT)["said"]
            self.servers[modules] = self.said + said

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer(timeout)

    def answer(self, timeout: float) -> dict[str, Any]:
        """The next line; raises TimeoutError."""
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        if not ready:
            raise TimeoutError
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise AssertionError(f"the process with the imports has ended: {self.errors.read()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends it with all that it started."""
        self.process.terminate()
        self.process.communicate()
        self.errors.close()


def launch(
    script: str | Path,
    num_processes: int,
    *arguments: object,
    timeout: float = 120,
    env: dict[str, str] | None = None,
    modules: tuple[str, ...] = TORCH,
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Output of a script, or of a module by its name: one process, or several as torchrun starts them."""
    for name, value in AT_IMPORT.items():
        assert (env or {}).get(name, value) == value, f"{name} is read at import"
    prepare_deepspeed()
    if not _forks:
        _forks.append(Forks())
    forks = _forks[0]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        out.touch()
        err.touch()
        store, variables = (None, {}) if num_processes == 1 else as_torchrun(num_processes)
        request = {
            "modules": modules,
            "script": str(script),
            "arguments": [str(argument) for argument in arguments],
            "num_processes": num_processes,
            "env": {**environment(), **AT_IMPORT, **(env or {}), **variables},
            "cwd": str(cwd),
            "out": str(out),
            "err": str(err),
        }
        try:
            forks.start(modules)
            statuses = forks.ask(request, timeout)["statuses"]
        except BaseException as error:  # pytest's own time limit and Ctrl-C among them
            close()
            if not isinstance(error, TimeoutError):
                raise
            texts = f"{out.read_text()}\n{err.read_text()}"
            raise AssertionError(f"{script} {arguments} hung for {timeout} s\n{texts}") from None
        del store
        status = next((status for status in statuses if status), 0)
        said = forks.servers[modules] + err.read_text()
        return subprocess.CompletedProcess((script, *arguments), status, out.read_text(), said)


def as_torchrun(num_processes: int) -> tuple[TCPStore, dict[str, str]]:
    """A store on a free port, at which the ranks meet, and the variables that tell them so."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    size = str(num_processes)
    return store, {
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "ROLE_WORLD_SIZE": size,
        "GROUP_WORLD_SIZE": "1",
        "GROUP_RANK": "0",
        "ROLE_NAME": "default",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def close() -> None:
    """Ends all servers."""
    while _forks:
        _forks.pop().close()
