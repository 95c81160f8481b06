"""Reads a Dockerfile, and does what one of its targets says in an ordinary folder instead of an image."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from program import ROOT, run


@dataclass(frozen=True)
class Instruction:
    """One instruction: its keyword and what follows."""

    keyword: str
    text: str


@dataclass
class Target:
    """A stage: base image and instructions; `arguments` are the ARGs before the first stage."""

    image: str
    instructions: list[Instruction] = field(default_factory=list)


def read(path: Path) -> dict[str, Target]:
    """The targets of a Dockerfile by name."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", "\n", "\n".join(lines)).replace("\n    ", " ")
    arguments: dict[str, str] = {}
    targets: dict[str, Target] = {}
    for line in filter(None, map(str.strip, joined.splitlines())):
        keyword, _, text = line.partition(" ")
        if keyword == "FROM":
            image, name = re.fullmatch(r"\$\{(\w+)\} AS (\w+)", text).groups()
            targets[name] = Target(arguments[image])
        elif not targets:
            assert keyword == "ARG", line
            name, _, value = text.partition("=")
            arguments[name] = value
        else:
            list(targets.values())[-1].instructions.append(Instruction(keyword, text))
    return targets


def context() -> list[str]:
    """The files of the repository that .dockerignore lets into the build."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    return [name for name in _files() if _included(name, patterns)]


def _files() -> list[str]:
    """The files of the working tree but those that git ignores; inside an image there is no git."""
    if not (ROOT / ".git").exists():
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        return [str(path) for path in found if path.parts[0] not in (".venv", "runs")]
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def _included(name: str, patterns: list[str]) -> bool:
    """The last pattern that matches the path or a folder above it decides."""
    parts = Path(name).parts
    above = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    included = True
    for pattern in patterns:
        body = pattern.removeprefix("!").removeprefix("**/")
        candidates = parts if "**/" in pattern else above
        if any(fnmatch(candidate, body) for candidate in candidates):
            included = pattern.startswith("!")
    return included


class Builder:
    """Follows a target's instructions below `root`, which stands for the image's `/`.

    Commands of the image's root user (before the first USER) are handed to `as_root` instead of being run.
    """

    def __init__(self, root: Path, arguments: dict[str, str], timeout: float) -> None:
        self.root = root
        self.folder = root
        self.given = arguments
        self.variables: dict[str, str] = {}
        self.timeout = timeout
        self.is_root = True
        self.as_root: list[str] = []
        self.ran: list[str] = []
        self.command: list[str] = []
        (root / "bin").mkdir(parents=True)
        (root / "bin" / "python").symlink_to(Path(sys.executable).resolve())

    def follow(self, target: Target) -> None:
        for instruction in target.instructions:
            getattr(self, instruction.keyword.lower())(instruction.text)

    def arg(self, text: str) -> None:
        name, _, default = text.partition("=")
        self.variables[name] = self.given.get(name, default)

    def env(self, text: str) -> None:
        self.variables.update(pair.split("=", 1) for pair in shlex.split(text))

    def user(self, text: str) -> None:
        self.is_root = text.split(":")[0] in ("0", "root")

    def workdir(self, text: str) -> None:
        self.folder = self.root / text.lstrip("/")
        self.folder.mkdir(parents=True, exist_ok=True)

    def cmd(self, text: str) -> None:
        self.command = [part.strip(' "') for part in text.strip("[]").split(",")]

    def copy(self, text: str) -> None:
        *sources, target = [part for part in text.split() if not part.startswith("--")]
        for source in sources:
            whole = source == "."
            names = [name for name in context() if whole or name == source or name.startswith(f"{source}/")]
            assert names, f"COPY {text}: nothing of it is in the context"
            for name in names:
                place = self.folder / name if whole or target.endswith("/") else self.folder / target
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, place)

    def run(self, text: str) -> None:
        if self.is_root:
            self.as_root.append(text)
            return
        done = self.shell("/bin/sh", "-c", text)
        assert done.returncode == 0, f"RUN {text}\n{done.stdout}\n{done.stderr}"
        self.ran.append(text)

    def shell(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command as the image's user would run it."""
        path = f"{self.root / 'bin'}:/usr/bin:/bin"
        clean = {name: os.environ[name] for name in os.environ if name.startswith("PIP_")}
        variables = {**clean, **self.variables, "HOME": str(self.root), "PATH": path}
        pairs = [f"{name}={value}" for name, value in variables.items()]
        return run("env", "-i", *pairs, *command, cwd=self.folder, timeout=self.timeout)
