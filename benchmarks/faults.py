"""Kills ranks and whole machines at random moments, and looks whether anything was lost.

    nice -n 19 taskset -c 1 python -m benchmarks.faults            # 100 kills, one core: about 20 minutes
    python -m benchmarks.faults --kills 6 --out /tmp/here

Two machines are two network namespaces (root is needed), each with two ranks, which meet over Gloo. A run has
60 steps and a checkpoint every 5. It is killed again and again, with SIGKILL: a rank, or all ranks of a
machine; after a random number of steps, or after a random time, which also falls into the start, a checkpoint
or the validation. After each kill the other ranks must end by themselves, and the same command is given
again, with `resume_from=auto`.

A kill counts as survived if the run goes on from the newest checkpoint that was due, or a later one. A run
counts as equal if each row of its metrics and each file of its last checkpoint equal those of an undisturbed
run, bit for bit. The ranks are forks of a process that has torch imported. Writes `faults.{md,json}`; an
interrupted benchmark continues.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "cluster"), str(ROOT / "tests")]
CONFIG = ROOT / "configs" / "recipe" / "multi_digits.yaml"
MACHINES, RANKS, STEPS, EVERY = 2, 2, 60, 5
LEAVE = 20.0  # seconds in which the ranks that live must end by themselves, as without a launcher
SETTINGS = (
    *(f"steps={STEPS}", f"checkpoint_every={EVERY}", "eval_every=20", "weighting={name: smooth, rule: mgda}"),
    *("recipe.num_train=512", "recipe.num_validation=20", "recipe.features=16", "recipe.channels=4"),
    *("batch_size=32", "keep_last=3", "resume_from=auto"),
)
ENGINES: dict[str, dict[str, str]] = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "zero2": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_GRADIENT_CLIPPING": "1000000.0",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    },
}


def serve() -> None:
    """On a machine: forks the ranks that lines on stdin ask for, and says how they ended."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
    import accelerate.utils.deepspeed  # noqa: F401
    import deepspeed  # noqa: F401
    import sklearn.datasets  # noqa: F401

    import mtl_dist.train  # noqa: F401

    running: set[int] = set()
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked is None:  # who lives?
            for pid in list(running):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    running.discard(pid)
            print(json.dumps(sorted(running)), flush=True)
            continue
        for rank in asked["ranks"]:
            if not (pid := os.fork()):
                become(rank, asked)
            running.add(pid)
        print(json.dumps(sorted(running)), flush=True)


def become(rank: int, asked: dict[str, Any]) -> None:
    """Turns this fork into a rank of the training, which never returns."""
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ |= {
        **asked["env"],
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
    }
    status = 1
    try:
        from mtl_dist.train import main as train

        status = train(asked["arguments"])
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
    finally:
        os._exit(status)


class Job:
    """A training on all machines."""

    def __init__(self, lab: Any, folder: Path) -> None:
        self._servers = []
        self._folder = folder
        self._port = 29600
        self.pids: list[list[int]] = []
        for place in range(MACHINES):
            command = lab.command(place, sys.executable, "-m", "benchmarks.faults", "--serve", cwd=ROOT)
            env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            server = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._servers.append(server)
        for server in self._servers:
            while server.stdout.readline() != "ready\n":
                assert server.poll() is None, "the imports failed"

    def _ask(self, place: int, request: Any) -> list[int]:
        server = self._servers[place]
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    def start(self, engine: str, output: Path) -> None:
        """Starts all ranks."""
        self._port += 1
        common = {"MASTER_ADDR": "node0", "MASTER_PORT": str(self._port), "WORLD_SIZE": str(MACHINES * RANKS)}
        request = {
            "env": {**ENGINES[engine], **common, "GLOO_SOCKET_IFNAME": "eth0"},
            "arguments": [str(CONFIG), f"output_dir={output}", *SETTINGS],
            "log": str(self._folder / f"{output.name}.log"),
        }
        ranks = [[place * RANKS + local for local in range(RANKS)] for place in range(MACHINES)]
        self.pids = [self._ask(place, {**request, "ranks": ranks[place]}) for place in range(MACHINES)]

    def alive(self) -> list[int]:
        """The ranks that have not ended."""
        return [pid for place in range(MACHINES) for pid in self._ask(place, None)]

    def close(self) -> None:
        """Ends the machines' servers."""
        for server in self._servers:
            server.kill()
            server.wait()


def last_step(output: Path) -> int:
    """Of the last whole row."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (output / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["train/global_step"])
    return 0


def newest(output: Path) -> int:
    return max((int(path.name[5:]) for path in output.glob("checkpoints/step_????????")), default=0)


def content(output: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows without times, and the digests of the last checkpoint's files."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]
    manifest = json.loads((output / "checkpoints" / f"step_{STEPS:08d}" / "mtl_dist.json").read_text())
    return rows, manifest["files"]


def undisturbed(job: Job, engine: str, output: Path) -> None:
    if not (output / "summary.json").exists():
        shutil.rmtree(output, ignore_errors=True)
        job.start(engine, output)
        while job.alive():
            time.sleep(0.2)
    assert (output / "summary.json").exists(), f"the undisturbed run of {engine} failed; see its log"


def disturbed(
    job: Job, engine: str, output: Path, choose: random.Random, budget: int
) -> list[dict[str, Any]]:
    """Kills one run up to `budget` times, until it ends. What happened at each kill."""
    shutil.rmtree(output, ignore_errors=True)
    kills: list[dict[str, Any]] = []
    for _ in range(2 * budget + 2):
        before = newest(output)
        job.start(engine, output)
        killed = kill(job, output, choose) if len(kills) < budget else None
        ends = ended(job, LEAVE if killed is not None else 900.0)
        if killed is not None:
            due = (max(last_step(output) - 1, 0) // EVERY) * EVERY
            lost = max(0, due - newest(output), before - newest(output))
            kills.append({**killed, **ends, "newest": newest(output), "lost": lost})
        if (output / "summary.json").exists():
            return kills
    raise AssertionError(f"{output} does not come to its end; see its log")


def ended(job: Job, limit: float) -> dict[str, Any]:
    """Waits until all ranks have ended; ends them if they do not within `limit` seconds."""
    started, stuck = time.monotonic(), False
    while alive := job.alive():
        if time.monotonic() > started + limit and not stuck:
            stuck = True
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return {"seconds": time.monotonic() - started, "stuck": stuck}


def kill(job: Job, output: Path, choose: random.Random) -> dict[str, Any] | None:
    """Waits for the moment, and kills. None: the run had ended before."""
    started, kind = time.monotonic(), choose.choice(["rank", "machine"])
    if choose.random() < 0.3:
        when = "time"
        time.sleep(choose.uniform(0, 4))
    else:
        when = "step"
        wanted = newest(output) + choose.randint(1, 2 * EVERY)
        while last_step(output) < min(wanted, STEPS) and time.monotonic() < started + 120 and job.alive():
            time.sleep(0.01)
        time.sleep(choose.uniform(0, 0.3))
    place = choose.randrange(MACHINES)
    victims = job.pids[place] if kind == "machine" else [choose.choice(job.pids[place])]
    if not set(victims) <= set(job.alive()):
        return None
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    return {"kind": kind, "when": when, "after": time.monotonic() - started, "step": last_step(output)}


def table(results: dict[str, Any]) -> str:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in results["runs"]:
        for one in run["kills"]:
            groups[run["engine"], one["kind"]].append(one)
    lines = ["| engine | killed | kills | survived | steps lost | others ended after (median, longest) |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for (engine, kind), kills in sorted(groups.items()):
        ends = [one["seconds"] for one in kills]
        good = sum(not one["lost"] for one in kills)
        lost = sum(one["lost"] for one in kills)
        times = f"{statistics.median(ends):.1f} s, {max(ends):.1f} s"
        lines.append(f"| {engine} | {kind} | {len(kills)} | {good} | {lost} | {times} |")
    runs = results["runs"]
    same, total = sum(run["equal"] for run in runs), sum(len(run["kills"]) for run in runs)
    stuck = [one["after"] for run in runs for one in run["kills"] if one["stuck"]]
    system = f"Python {platform.python_version()}, {platform.machine()}, {results['date']}"
    intro = (
        f"{total} kills at random moments in {len(runs)} runs of {STEPS} steps, a checkpoint every {EVERY}, "
        f"on {MACHINES} machines with {RANKS} ranks each (`benchmarks/faults.py`). {same} of {len(runs)} "
        "runs ended bitwise equal to an undisturbed one: every row, every file of the last checkpoint. "
        f"{len(stuck)} times the other ranks had to be ended after {LEAVE:.0f} s, as a launcher does; these "
        f"kills came within {max(stuck, default=0):.1f} s of a start, where torch's rendezvous waits for all "
        f"ranks. Steps lost are those beyond the last checkpoint that was due. {system}."
    )
    return "\n".join([intro, "", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--work", type=Path, default=Path("/tmp/mtl_dist_faults"))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    from namespaces import Lab, why_not

    if (reason := why_not()) is not None:
        raise SystemExit(f"no machines here: {reason}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "faults.json"
    results = json.loads(file.read_text()) if file.exists() else {"runs": []}
    with Lab(MACHINES) as lab:
        job = Job(lab, arguments.work)
        while (done := sum(len(run["kills"]) for run in results["runs"])) < arguments.kills:
            number = len(results["runs"])
            engine = list(ENGINES)[number % len(ENGINES)]
            reference = arguments.work / f"{engine}-undisturbed"
            output = arguments.work / f"{engine}-{number}"
            undisturbed(job, engine, reference)
            kills = disturbed(job, engine, output, random.Random(number), min(12, arguments.kills - done))
            equal = content(output) == content(reference)
            results["runs"].append({"engine": engine, "equal": equal, "kills": kills})
            results["date"] = datetime.date.today().isoformat()
            verdict = "equal" if equal else "NOT EQUAL"
            print(f"run {number}, {engine}: {len(kills)} kills, {verdict}", flush=True)
            file.write_text(json.dumps(results, indent=1) + "\n")
            (arguments.out / "faults.md").write_text(table(results))
            if equal:
                shutil.rmtree(output)
        job.close()
    print(table(results))


if __name__ == "__main__":
    main()
