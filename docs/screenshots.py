"""Makes docs/img/tensorboard.png and docs/img/trackio.png: three rules on Multi-Digits.

    python docs/screenshots.py            # trains first if there are no runs; takes minutes on two cores

It trains into runs/screenshots, serves both trackers on this machine only, and takes screenshots with
Chromium. It needs Chromium (apt install chromium) and the packages of `pip install -e .[test]`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "runs" / "screenshots"
IMAGES = ROOT / "docs" / "img"
RULES = ("equal", "inverse_grad_norm", "mgda")
PROJECT = "multi-digits"
PATIENCE = 240_000  # milliseconds: a page of many charts on a busy machine without a GPU
CHROMIUM = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TRACKIO_DIR": str(FOLDER / "trackio"),
    "HF_HUB_OFFLINE": "1",
    "BROWSER": "true",  # trackio show opens a browser
}


def train(steps: int) -> None:
    """One run per rule, with both trackers."""
    trackers = f"trackers=[tensorboard, {{name: trackio, project: {PROJECT}}}]"
    for rule in RULES:
        output = FOLDER / "runs" / rule
        if (output / "summary.json").exists():
            continue
        settings = [
            f"output_dir={output}",
            f"steps={steps}",
            "eval_every=25",
            f"weighting.name={rule}",
            trackers,
        ]
        program = ["-m", "mtl_dist.train", "configs/recipe/multi_digits.yaml", *settings, "overwrite=true"]
        environment = (
            ENVIRONMENT if shutil.which("nvidia-smi") else {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
        )
        subprocess.run([sys.executable, *program], cwd=ROOT, env=environment, check=True)


@contextlib.contextmanager
def served(command: list[str], port: int) -> Iterator[str]:
    """Starts a server and yields its address when it answers. Stops the server at the end of the block."""
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, cwd=ROOT, env={**ENVIRONMENT, "GRADIO_SERVER_PORT": str(port)})
    try:
        for _ in range(120):
            time.sleep(0.5)
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
                break
        else:
            raise RuntimeError(f"{command[0]} did not answer at {url}")
        yield url
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """A port that no program uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tensorboard(page: Page, url: str) -> None:
    """A picture of the tab CUSTOM SCALARS: all tasks of all runs in one chart."""
    page.set_viewport_size({"width": 1500, "height": 730})
    page.goto(f"{url}/#custom_scalars")
    page.wait_for_timeout(15000)


def trackio(page: Page, url: str) -> None:
    """A picture of contributions and losses: one chart per column, with all runs."""
    page.set_viewport_size({"width": 1850, "height": 1000})
    page.goto(f"{url}/?project={PROJECT}")
    page.wait_for_timeout(10000)
    page.get_by_placeholder("e.g., loss").fill("mtl/(contribution|loss)/")
    page.wait_for_timeout(15000)


def save(page: Page, name: str) -> None:
    """Saves the picture with few colours, because it needs no more."""
    image = Image.open(io.BytesIO(page.screenshot(timeout=PATIENCE, animations="disabled"))).convert("RGB")
    IMAGES.mkdir(parents=True, exist_ok=True)
    image.quantize(128, dither=Image.Dither.NONE).save(IMAGES / f"{name}.png", optimize=True)


def main() -> int:
    """Trains, starts the servers and takes the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    train(parser.parse_args().steps)
    bin_folder = Path(sys.executable).parent
    port, other = free_port(), free_port()
    board = [str(bin_folder / "tensorboard"), "--logdir", str(FOLDER / "runs"), "--port", str(port)]
    board += ["--host", "127.0.0.1"]
    shown = [str(bin_folder / "trackio"), "show", "--project", PROJECT, "--no-footer"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(PATIENCE)
        with served(board, port) as url:
            tensorboard(page, url)
            save(page, "tensorboard")
        with served(shown, other) as url:
            trackio(page, url)
            save(page, "trackio")
        browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
