"""How many small mistakes in the core would the tests of one process notice?

    python benchmarks/mutants.py                            450 mutants, seed 0: some 20 minutes on one core
    python benchmarks/mutants.py --room probes --number 100
    python benchmarks/mutants.py --again                    those that survived the last run, after new tests

mutmut (https://github.com/boxed/mutmut) makes every mutant of the core rooms: comparisons, operators,
constants, assignments, arguments. The command draws a sample, runs on each mutant the tests that call its
function, the fastest first, up to the first that fails, and prints the score of every room. It works in
`runs/mutants`: a copy of the tree, and a layer over this Python that holds mutmut. The survivors are in
`runs/mutants/survivors.md`.

`benchmarks/results/mutants.md` lists survivors that change no result of one process, with their reasons.
The score is killed / (killed + survivors that are not in this list).

Left out: texts, messages, and what mutmut cannot mutate: decorated functions but static and class methods
(a tenth of the lines), and code outside functions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections import Counter
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK = ROOT / "runs" / "mutants"
OUTCOMES = WORK / "outcomes.json"
LISTED = ROOT / "benchmarks" / "results" / "mutants.md"
MUTMUT = "mutmut==3.8.1"
KILLED = ("killed", "timeout", "segfault", "suspicious")  # in mutmut's words
SURVIVED = ("survived", "no tests")
ROOMS = {
    "stats": "stats.py",
    "losses": "losses/*",
    "engines": "engines/*",
    "sync": "sync/*",
    "probes": "probes/*",
    "checks": "checks/*",
    "balancer": "balancer/*",
    "checkpoint": "checkpoint.py",
    "virtual": "virtual.py",
}
# files that start no process, but for one test
TESTS = (
    "tests/test_balancer.py",
    "tests/test_check.py",
    "tests/test_checkpoint.py",
    "tests/test_engine.py",
    "tests/test_evaluation.py",
    "tests/test_process_group.py",
    "tests/test_stats.py",
    "tests/test_window_guard.py",
    "tests/distributed/test_virtual.py",
    "tests/faults/test_every_kind_of_feature.py",
    "tests/faults/test_module_contract.py",
    "tests/faults/test_one_task_per_batch.py",
    "tests/faults/test_optimizer_steps.py",
    "tests/faults/test_past_the_features.py",
    "tests/faults/test_settings_agree.py",
    "tests/faults/test_small_mutations.py",
    "tests/faults/test_what_does_not_count.py",
    "tests/faults/test_zero_gradients.py",
    "tests/integrations/test_deepspeed.py",
    "tests/probes/test_branches.py",
    "tests/probes/test_gradient_gram.py",
    "tests/probes/test_layer_kinds.py",
    "tests/probes/test_mixture.py",
    "tests/probes/test_parameter_probe.py",
    "tests/probes/test_parameter_trunks.py",
    "tests/probes/test_probes.py",
    "tests/probes/test_shared_layer.py",
    "tests/probes/test_sketch.py",
)
LEFT_OUT = (
    "tests/distributed/test_virtual.py::test_virtual_ranks_take_the_course_of_real_ones",  # starts processes
    "tests/faults/test_settings_agree.py::test_trainer_refuses_names_where_it_would_log_them",  # no core
)
HANGS = 60  # seconds of one test
ENOUGH = 0.5  # of the time of all tests, for one mutant; the slower ones are not run
MESSAGES = (r"^\s*raise\b", r"\braise \w", r"\blogger\.", r"\bwarn\w*\(")


def main() -> None:
    """Prepares `runs/mutants`, and runs this file again inside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--number", type=int, default=450, help="mutants in the sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--room", choices=list(ROOMS), help="this room only")
    parser.add_argument("--again", action="store_true", help="leave out what the last run killed")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        test_mutants(arguments)
        return
    tree = WORK / "tree"
    copy_tree(tree)
    python = prepare_python()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [python, __file__, "--inside", *sys.argv[1:]]
    raise SystemExit(subprocess.run(command, cwd=tree, env=environment).returncode)


def prepare_python() -> Path:
    """A Python that has mutmut, and everything that this one has."""
    python = WORK / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(WORK / "venv", with_pip=True, symlinks=True)
        paths = {"base": str(WORK / "venv"), "platbase": str(WORK / "venv")}
        layer = Path(sysconfig.get_path("purelib", vars=paths)) / "base.pth"
        layer.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    subprocess.run([python, "-m", "pip", "install", "-q", MUTMUT], check=True)
    return python


def copy_tree(tree: Path) -> None:
    """The working tree as git sees it, and mutmut's settings."""
    shutil.rmtree(tree, ignore_errors=True)
    list_files = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(list_files, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, tree / name)
    settings = {
        "source_paths": ["mtl_dist"],
        "only_mutate": [f"mtl_dist/{pattern}" for pattern in ROOMS.values()],
        "do_not_mutate_patterns": list(MESSAGES),
        "also_copy": ["tests", "configs", "launch", "benchmarks"],
        "pytest_add_cli_args_test_selection": list(TESTS),
        "pytest_add_cli_args": [
            *("-p", "no:xdist", "-p", "no:cacheprovider", f"--timeout={HANGS}"),
            *(f"--deselect={test}" for test in LEFT_OUT),
        ],
        "timeout_constant": 1.0 * HANGS,
        "timeout_multiplier": 2.0,
        "track_dependencies": False,
    }
    with (tree / "pyproject.toml").open("a", encoding="utf-8") as file:
        # values are strings, numbers, truth values and lists, for which JSON is TOML
        file.write("\n[tool.mutmut]\n")
        file.writelines(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())


def test_mutants(arguments: argparse.Namespace) -> None:
    """Runs mutmut on the sample, in the copy; writes the survivors and prints the score."""
    from mutmut import __main__ as mutmut
    from mutmut.mutation import mutators
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.workers.isolation import ForkRunner

    submit = ForkRunner.submit

    def submit_the_fastest(self: ForkRunner, mutant: str, tests: list[str], limit: int, time: float) -> None:
        times = mutmut.state().duration_by_test
        enough = ENOUGH * sum(times.values())
        ordered = sorted(tests, key=times.__getitem__)
        ends = accumulate(map(times.__getitem__, ordered))
        submit(
            self, mutant, [test for test, end in zip(ordered, ends, strict=True) if end < enough], limit, time
        )

    ForkRunner.submit = submit_the_fastest
    operators = [pair for pair in mutators.mutation_operators if pair[1] is not mutators.operator_string]
    mutators.mutation_operators[:] = operators
    Path("mutants").mkdir(exist_ok=True)
    mutmut.copy_src_dir()
    mutmut.create_mutants(1)
    names = sorted(name for _, name, _ in mutmut.collect_source_file_mutation_data(mutant_names=())[0])
    print(f"{len(names)} mutants")
    if arguments.room:
        names = [name for name in names if room_of(name) == arguments.room]
    names = sorted(names, key=lambda name: sha256(f"{arguments.seed} {name}".encode()).digest())
    names = names[: arguments.number]  # as good as unchanged where a few functions change
    outcomes: dict[str, str] = {}
    if arguments.again and OUTCOMES.exists():
        outcomes = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    mutmut._run([name for name in names if outcomes.get(name) not in KILLED], 1)

    listed = listed_survivors()
    found: dict[str, Counter[str]] = {}
    unlisted: list[str] = []
    for data, name, status in mutmut.collect_source_file_mutation_data(mutant_names=names)[0]:
        if status is not None:
            outcomes[name] = mutmut.status_by_exit_code[status]
        outcome = outcomes[name]
        if outcome in SURVIVED:
            text = describe(name, get_diff_for_mutant(name, path=data.path))
            if text in listed:
                outcome = listed[text]
            else:
                unlisted.append(f"- `{text}`\n")
        found.setdefault(room_of(name), Counter())[outcome] += 1
    OUTCOMES.write_text(json.dumps({name: outcomes[name] for name in names}, indent=1), encoding="utf-8")
    (WORK / "survivors.md").write_text("".join(sorted(unlisted)), encoding="utf-8")
    print_scores(found)


def room_of(mutant: str) -> str:
    """`mtl_dist.probes.tap.xǁTapǁcall__mutmut_3` is of `probes`."""
    return mutant.split(".")[1]


def describe(mutant: str, diff: str) -> str:
    """The mutant in one line that stays the same when other lines of the function change."""
    function = mutant.partition("__mutmut_")[0].replace("xǁ", "").replace("ǁ", ".").replace(".x_", ".")
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++", "@@"))]
    before = " ".join(line[1:].strip() for line in lines if line.startswith("-"))
    after = " ".join(line[1:].strip() for line in lines if line.startswith("+"))
    return f"{function.removeprefix('mtl_dist.')}: {before}  =>  {after}".replace("`", "'")


def listed_survivors() -> dict[str, str]:
    """Class of each survivor in `benchmarks/results/mutants.md`: its heading."""
    found: dict[str, str] = {}
    heading = ""
    if LISTED.exists():
        for line in LISTED.read_text(encoding="utf-8").splitlines():
            if line.startswith("## "):
                heading = line.removeprefix("## ")
            elif match := re.match(r"- `(.+)` ?", line):
                found[match[1]] = heading
    return found


def print_scores(found: dict[str, Counter[str]]) -> None:
    """One line per room, and one for all of them."""
    total: Counter[str] = Counter()
    for counts in found.values():
        total += counts
    for room, counts in [*sorted(found.items()), ("all", total)]:
        missed = sum(counts[outcome] for outcome in SURVIVED)
        killed = sum(counts[outcome] for outcome in KILLED)
        score = killed / (killed + missed) if killed + missed else 1.0
        others = {name: number for name, number in sorted(counts.items()) if number}
        print(f"{room:11}{sum(counts.values()):5} mutants  {score:7.1%}  {others}")


if __name__ == "__main__":
    main()
