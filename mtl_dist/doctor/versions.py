"""Compares the installed packages with the requirements of mtl_dist."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

_ENGINES = ("deepspeed", "transformers")  # optional: shown if they are installed


def versions_text() -> str:
    """The versions of Python and of the important packages, in one line."""
    found = [f"{name} {installed}" for name, installed in versions().items()]
    return ", ".join([f"Python {platform.python_version()}", *found])


def versions() -> dict[str, str]:
    """Versions of the important packages that are installed."""
    names = ["mtl-dist", "torch", "accelerate", "numpy", *_ENGINES]
    return {name: installed for name in names if (installed := _installed(name)) is not None}


def version_problems() -> list[str]:
    """The packages that are missing or have a wrong version. Empty: all is well."""
    try:
        wanted = [Requirement(line) for line in requires("mtl-dist") or []]
    except PackageNotFoundError:
        return ["mtl-dist is imported, but not installed: pip install -c constraints.txt -e ."]
    problems = []
    for requirement in wanted:
        optional = "extra" in str(requirement.marker or "")
        installed = _installed(requirement.name)
        if installed is None and not optional:
            problems.append(
                f"{requirement.name} is missing: pip install '{requirement.name}{requirement.specifier}'"
            )
        elif installed is not None and not requirement.specifier.contains(
            _public(installed), prereleases=True
        ):
            problems.append(f"{requirement.name} is {installed}, but {requirement.specifier} is needed")
    return problems


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _public(installed: str) -> str:
    return re.sub(r"\+.*", "", installed)  # 2.13.0+cpu is 2.13.0
