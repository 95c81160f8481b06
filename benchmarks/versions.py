"""Which versions of torch and its neighbours the library works with. Behind launch/versions.sh.

    python benchmarks/versions.py [--only VERSION ...] [--parts PART ...] [--remove] [--out FOLDER]

Each version has an environment of its own, made once: torch, and the newest of the others from before the
next torch appeared. The oldest has exactly the lower bounds of pyproject.toml, 2.13 what constraints.txt has.
Each part is a selection of the tests, run by the environment's Python. Results go to `versions.json`, which
keeps what is not run again, and `versions.md`. It needs the standard library; an environment takes 5 to 8 GB
with a torch for CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FREE_GB = 20  # the least that is left for an environment and what pip unpacks on its way
PART_LIMIT = 600.0  # seconds for each part: ends a hang, not a slow machine

LOWER_BOUNDS = "2.9"
PINS = {  # by release date: what a user of this torch had; 2.13: constraints.txt, with which CI runs
    "2.10": ("torch==2.10.0", "accelerate==1.13.0", "deepspeed==0.18.8", "transformers==5.3.0"),
    "2.11": ("torch==2.11.0", "accelerate==1.13.0", "deepspeed==0.19.0", "transformers==5.8.0"),
    "2.12": ("torch==2.12.1", "accelerate==1.14.0", "deepspeed==0.19.2", "transformers==5.13.0"),
    "2.13": ("torch==2.13.0", "accelerate==1.15.0", "deepspeed==0.19.8", "transformers==5.23.0"),
    "2.14": ("torch==2.14.1", "accelerate==1.15.0", "deepspeed==0.19.8", "transformers==5.20.2"),
}
VERSIONS = (LOWER_BOUNDS, *PINS)
# errors of torch or DeepSpeed, seen with a plain sum of the losses too, without the library
ENGINES_OWN = {
    "Output 0 of SplitBackward0 is a view and is being modified inplace": (
        "ZeRO-1 and ZeRO-2 over Gloo (all_gather_into_tensor of this torch and this DeepSpeed)"
    ),
}
EXTRAS = ("deepspeed", "transformers", "recipes")  # whose lower bounds are tested
REST = ("numpy", "pydantic", "pyyaml", "safetensors", "tqdm", "ninja", "datasets", "scikit-learn")  # newest
# DeepSpeed compiles with torch.utils.cpp_extension, which needs setuptools where Python brings none
TOOLS = ("pytest==9.2.0", "pytest-timeout==2.4.0", "hypothesis==6.170.15", "scipy", "setuptools<81")
SHOWN = ("torch", "accelerate", "deepspeed", "transformers", "numpy", "pydantic")


@dataclass(frozen=True)
class Part:
    """A selection of the tests.

    Attributes:
        tests: files and folders.
        keyword: of pytest's -k; "": all tests in them.
        needs: a module without which they cannot run.
    """

    tests: tuple[str, ...]
    keyword: str = ""
    needs: str = "torch"


ENGINES = "tests/engines/test_matrix.py"
PARTS = {
    "core": Part(
        (
            "tests/test_balancer.py",
            "tests/test_engine.py",
            "tests/test_lag.py",
            "tests/test_stats.py",
            "tests/test_check.py",
            "tests/test_checkpoint.py",
            "tests/weighting/test_norm_rules.py",
            "tests/weighting/test_combinators.py",
        )
    ),
    "probes": Part(("tests/probes",)),
    "DDP": Part((ENGINES,), "ddp and not accelerate"),
    "FSDP2": Part((ENGINES, "tests/engines/test_fsdp_units.py"), "fsdp"),
    "ZeRO": Part((ENGINES, "tests/integrations/test_deepspeed.py"), "zero or deepspeed", "deepspeed"),
    "Accelerate": Part(("tests/integrations/test_accelerate.py",), "", "accelerate"),
    "Trainer": Part(("tests/integrations/test_transformers.py",), "", "transformers"),
}


# ---- environments --------------------------------------------------------------------------------


def lower_bounds(project: str) -> list[str]:
    """`name==bound` for each `name>=bound` of a pyproject.toml that a user installs."""
    table = tomllib.loads(project)["project"]
    wanted = [*table["dependencies"], *(r for extra in EXTRAS for r in table["optional-dependencies"][extra])]
    return list(dict.fromkeys(re.sub(r">=([\w.]+).*", r"==\1", requirement) for requirement in wanted))


def requirements(version: str) -> list[str]:
    """What pip installs for one version."""
    if version == LOWER_BOUNDS:
        return [*lower_bounds((ROOT / "pyproject.toml").read_text(encoding="utf-8")), *TOOLS]
    return [*PINS[version], *REST, *TOOLS]


def pinned(version: str) -> list[list[str]]:
    """Names and versions of what is pinned."""
    return [requirement.split("==") for requirement in requirements(version) if "==" in requirement]


def make_environment(folder: Path, wanted: Sequence[str]) -> Path:
    """The Python of an environment with these packages, made where it is missing or has others.

    Raises:
        SystemExit: too little disk, or pip cannot install them together.
    """
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    if stamp.exists() and stamp.read_text(encoding="utf-8").split("\n") == list(wanted):
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free / 1e9
    if free < FREE_GB:
        raise SystemExit(
            f"error: {free:.0f} GB are free in {folder.parent}, and an environment needs {FREE_GB}: "
            "give --remove, or name a folder on another disk in MTL_DIST_VERSIONS"
        )
    print(f"making {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--no-cache-dir", "--disable-pip-version-check", *wanted]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    (folder / "pip.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise SystemExit(f"error: {reasons[0] if reasons else 'pip'} (log: {folder / 'pip.log'})")
    stamp.write_text("\n".join(wanted), encoding="utf-8")
    return python


def installed(python: Path) -> dict[str, str]:
    """Versions of what the table shows."""
    program = (
        "import json, importlib.metadata as m, platform; "
        f"print(json.dumps({{'python': platform.python_version(), **{{p: m.version(p) for p in {SHOWN}}}}}))"
    )
    out = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(out)
    return found


# ---- tests ---------------------------------------------------------------------------------------


def run_parts(python: Path, parts: Mapping[str, Part]) -> dict[str, dict[str, Any]]:
    """For each part, counts of tests and names of those that failed; or why none can run.

    All parts run in one process of pytest, so that they share launches.
    """
    missing = _missing(python, {part.needs for part in parts.values()})
    results: dict[str, dict[str, Any]] = {
        name: {"impossible": missing[part.needs]} for name, part in parts.items() if part.needs in missing
    }
    wanted = {name: part for name, part in parts.items() if name not in results}
    if wanted:
        results |= _tested(python, wanted)
    return results


def _missing(python: Path, modules: set[str]) -> dict[str, str]:
    """The error of each module that cannot be imported."""
    errors = {}
    for module in sorted(modules):
        command = [python, "-c", f"import {module}"]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            errors[module] = done.stderr.strip().splitlines()[-1]
    return errors


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _tested(python: Path, parts: Mapping[str, Part]) -> dict[str, dict[str, Any]]:
    files = list(dict.fromkeys(path for part in parts.values() for path in part.tests))
    keywords = [part.keyword for part in parts.values()]
    chosen = ["-k", " or ".join(f"({keyword})" for keyword in keywords)] if all(keywords) else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # warnings are errors for the pinned versions only: others deprecate other things
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
        command += [f"--junitxml={report}", "-m", "not long", *chosen, *files]
        limit = PART_LIMIT * len(parts)
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=_environment(),
                capture_output=True,
                text=True,
                timeout=limit,
                check=False,
            )
            trouble = {"pytest": done.stdout[-1500:] + done.stderr[-1500:]}
        except subprocess.TimeoutExpired:
            trouble = {"pytest": f"no end within {limit:.0f} s"}
        if not report.exists():
            return {name: {"failed": trouble} for name in parts}
        text = report.read_text(encoding="utf-8")
        return {name: counts(text, part) for name, part in parts.items()}


def selects(part: Part, test: str) -> bool:
    """Whether a test belongs to a part, by the rules of pytest's -k."""
    file = test.split("::")[0].replace(".", "/")
    words = re.compile(r"[\w.]+")
    said = words.sub(lambda m: m[0] if m[0] in _WORDS else str(m[0].lower() in test.lower()), part.keyword)
    inside = any(file.startswith(path.removesuffix(".py")) for path in part.tests)
    return inside and (not said or bool(eval(said)))  # of True, False and their connections only


_WORDS = ("and", "or", "not")


def counts(report: str, part: Part) -> dict[str, Any]:
    """Passed, skipped and failed tests of a part in a JUnit report."""
    passed = skipped = 0
    failed: dict[str, str] = {}
    cannot: dict[str, int] = {}
    for case in ET.fromstring(report).iter("testcase"):
        test = f"{case.get('classname')}::{case.get('name')}"
        if not case.get("classname"):  # a file that cannot be read
            test = f"{case.get('name')}::"
        if not selects(part, test):
            continue
        trouble = case.find("failure") if case.find("failure") is not None else case.find("error")
        if trouble is not None:
            said = f"{trouble.get('message')} {trouble.text}"
            own = next((error for error in ENGINES_OWN if error in said), None)
            if own is not None:
                cannot[own] = cannot.get(own, 0) + 1
            else:
                failed[test] = (trouble.get("message") or "")[:500]
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failed": failed, "cannot": cannot}


# ---- the table -----------------------------------------------------------------------------------


def entry(result: dict[str, Any] | None) -> str:
    """A cell of the table; never empty."""
    if result is None:
        return "not run yet"
    if "impossible" in result:
        return f"impossible: {result['impossible']}"
    if result["failed"]:
        return f"**{len(result['failed'])} failed**"
    skipped = f", {result['skipped']} skipped" if result["skipped"] else ""
    cannot = [
        f", {number} impossible ({list(ENGINES_OWN).index(error) + 1})"
        for error, number in result.get("cannot", {}).items()
    ]
    return f"{result['passed']}{skipped}{''.join(cannot)}" if result["passed"] else "**nothing ran**"


def table(results: dict[str, Any]) -> str:
    """One row a version: its packages, and tests that passed in each part."""
    lines = [f"| {' | '.join((*SHOWN, *PARTS))} |", "|---" * (len(SHOWN) + len(PARTS)) + "|"]
    for version in VERSIONS:
        found = results.get(version, {"about": dict(pinned(version)), "parts": {}})
        about = [found["about"].get(package, "newest") for package in SHOWN]
        cells = [*about, *(entry(found["parts"].get(part)) for part in PARTS)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def notes(results: dict[str, Any]) -> str:
    """What engines themselves cannot run, by the number in the table; "" where there is nothing."""
    seen = {e for r in results.values() for part in r["parts"].values() for e in part.get("cannot", {})}
    return "\n\n".join(
        f"({number}) {what}: `{error}`. A plain sum of the losses fails likewise."
        for number, (error, what) in enumerate(ENGINES_OWN.items(), 1)
        if error in seen
    )


def page(results: dict[str, Any]) -> str:
    """The table, what it is made of, and what failed."""
    selections = "\n".join(
        f"* {name}: {', '.join(f'`{path}`' for path in part.tests)}"
        + (f", `-k '{part.keyword}'`" if part.keyword else "")
        for name, part in PARTS.items()
    )
    failures = [
        f"* torch {version}, {part}: `{test}` {' '.join(message.split())[:300]}"
        for version, result in results.items()
        for part, found in result["parts"].items()
        for test, message in found.get("failed", {}).items()
    ]
    parts = [
        "# Versions",
        "Tests that passed with each torch, and the newest of the others before the next torch appeared. "
        "The first row has exactly the lower bounds of pyproject.toml, 2.13 the versions of constraints.txt. "
        "On a CPU, 2 processes where there are ranks. Made by `bash launch/versions.sh`.",
        table(results),
        notes(results),
        "## What each column runs",
        selections,
        *(["## Failed", "\n".join(failures)] if failures else []),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(VERSIONS), choices=VERSIONS, metavar="VERSION")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART")
    parser.add_argument("--remove", action="store_true", help="each environment after its tests")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    environments = Path(os.environ.get("MTL_DIST_VERSIONS", ROOT / "runs" / "versions"))
    path = arguments.out / "versions.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for version in arguments.only:
        python = make_environment(environments / version, requirements(version))
        known = results.setdefault(version, {"parts": {}})
        known["about"] = installed(python)
        known["parts"] |= run_parts(python, {name: PARTS[name] for name in arguments.parts})
        path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        if arguments.remove:
            shutil.rmtree(environments / version)
    (arguments.out / "versions.md").write_text(page(results), encoding="utf-8")
    print(table(results))
    bad = [part for version in arguments.only for part in results[version]["parts"].values()]
    return int(any(part.get("failed") for part in bad))


if __name__ == "__main__":
    raise SystemExit(main())
