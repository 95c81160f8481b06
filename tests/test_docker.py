"""The Dockerfile: linted, pinned, a small context; its RUN lines run in an empty folder, without Docker."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from dockerfile import Builder, context, read
from program import BIN, ROOT, run

TARGETS = read(ROOT / "Dockerfile")
MEGABYTE = 1 << 20
# a machine with wheels of its own has torch without CUDA there; else it comes from where the Dockerfile says
ARGUMENTS = (
    {"TORCH_INDEX": f"file://{os.environ['PIP_FIND_LINKS']}"} if "PIP_FIND_LINKS" in os.environ else {}
)


def installs(target: str) -> list[str]:
    return [line.text for line in TARGETS[target].instructions if "pip install" in line.text]


def test_hadolint_finds_nothing():
    done = run(BIN / "hadolint", "--failure-threshold", "info", ROOT / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_bases_are_pinned_by_tag_and_digest():
    assert list(TARGETS) == ["cpu", "cuda"]
    for target in TARGETS.values():
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[\w.-]+@sha256:[0-9a-f]{64}", target.image)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_what_runs_is_no_root_and_every_pip_is_constrained(name):
    instructions = TARGETS[name].instructions
    users = [line.text for line in instructions if line.keyword == "USER"]
    assert users == ["1000:1000"]
    assert len(installs(name)) == 2
    assert all("-c constraints.txt" in line for line in installs(name))
    # code comes after everything that takes long
    keywords = [line.keyword for line in instructions]
    assert keywords[-3:] == ["COPY", "RUN", "CMD"]
    assert "pip" not in instructions[-2].text


def test_only_the_cpu_image_takes_the_index_without_cuda():
    assert "--extra-index-url" in installs("cpu")[0]
    assert not any("index" in line for line in installs("cuda"))


def test_the_context_is_small_and_holds_what_the_images_need():
    files = context()
    assert sum((ROOT / name).stat().st_size for name in files) < 5 * MEGABYTE
    assert {"pyproject.toml", "constraints.txt", "launch/test.sh", "mtl_dist/__init__.py"} <= set(files)
    assert not [name for name in files if name.startswith((".venv", ".git/", "runs/", ".ci"))]


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("apt-get"), reason="apt is asked as root, on Debian"
)
def test_debian_has_the_packages_of_the_cpu_image(tmp_path):
    # asked for, not installed: the machine that runs the tests is not an image
    (line,) = [line.text for line in TARGETS["cpu"].instructions if "apt-get install" in line.text]
    packages = re.search(r"--no-install-recommends (.*?) *&&", line)[1].split()
    done = run("apt-get", "install", "--dry-run", "--no-install-recommends", *packages)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def build(tmp_path):
    """Follows the instructions of the target `cpu` below an empty folder."""
    return Builder(tmp_path / "image", ARGUMENTS, timeout=900)


def test_pip_accepts_the_lines_of_the_cpu_image(build):
    # the whole is a long test; here the environment of these tests stands in, and pip installs nothing
    for instruction in TARGETS["cpu"].instructions:
        if instruction.keyword == "WORKDIR":
            build.workdir(instruction.text)
            (build.folder / ".venv" / "bin").mkdir(parents=True)
            (build.folder / ".venv" / "bin" / "pip").symlink_to(BIN / "pip")
        elif instruction.keyword == "RUN" and not build.is_root:
            text = instruction.text.replace("python -m venv .venv &&", "").strip()
            if "pip install" in text:
                build.run(text.replace("pip install", "pip install --dry-run --no-deps -q"))
        else:
            getattr(build, instruction.keyword.lower())(instruction.text)
    assert len(build.ran) == 2


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_run_lines_of_the_cpu_image_make_what_its_command_needs(build):
    build.follow(TARGETS["cpu"])
    # what root does to an image is not done to this machine: apt is asked above, a user is not needed
    assert [line.split()[0] for line in build.as_root] == ["apt-get", "useradd"]
    assert len(build.ran) == 3
    listed = build.shell(".venv/bin/python", "-m", "pip", "list", "--format=freeze").stdout
    assert re.search(r"^torch==[\d.]+\+cpu$", listed, re.MULTILINE)
    assert not re.search(r"^(nvidia|triton|cuda)", listed, re.MULTILINE | re.IGNORECASE)
    assert build.command == ["bash", "launch/test.sh"]
    tests = ["tests/test_stats.py", "tests/test_cli.py", "tests/test_train.py", "-q", "-k", "not resum"]
    done = build.shell(*build.command, *tests)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout
    assert "installing" not in done.stderr, "the image is ready"
    code = "import mtl_dist; print(mtl_dist.__file__)"
    used = build.shell(".venv/bin/python", "-c", code).stdout
    assert Path(used.strip()).is_relative_to(build.folder), f"{sys.prefix} was used"
