"""The system's Chromium over pages on disk, with everything that a reader would not want counted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def chromium() -> str:
    """Its path. Without one the test is skipped, but fails on the CI machine, which must have one."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None and os.environ.get("CI"):
        pytest.fail("no Chromium: .ci/run must install it", pytrace=False)
    if found is None:
        pytest.skip("no Chromium: apt install chromium")
    return found


@contextmanager
def opened(browser: Any, path: Path, *, width: int = 1280, dark: bool = False) -> Iterator[Any]:
    """The page of a file. Console messages, exceptions, dialogs and requests beside the file are failures."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
    )
    page, wrong = context.new_page(), list[str]()
    page.set_default_timeout(20_000)  # a busy machine is slow
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"exception: {error}"))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: wrong.append(request.url) if request.url != path.as_uri() else None)
    try:
        page.goto(path.as_uri())
        yield page
        settle(page)
        assert not wrong, wrong
    finally:
        context.close()


def settle(page: Any) -> None:
    """Waits until what was asked for is drawn: charts draw on the frame after."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))")


def figure(page: Any, title: str) -> Any:
    """The figure with that title."""
    return page.locator("figure", has=page.locator("figcaption b", has_text=title)).first


def colours(node: Any) -> set[str]:
    """The exact colours in a canvas, as `#rrggbb`: a line that is drawn leaves its own."""
    return set(
        node.locator("canvas").first.evaluate(
            """canvas => {
              const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
              const found = new Set();
              for (let i = 0; i < data.length; i += 4)
                if (data[i + 3] === 255)
                  found.add("#" + [0, 1, 2].map(k => data[i + k].toString(16).padStart(2, "0")).join(""));
              return [...found];
            }"""
        )
    )
