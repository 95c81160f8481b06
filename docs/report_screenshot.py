"""Makes docs/img/report.png, the report of three rules on Multi-Digits, in two minutes on two cores.

    for rule in equal inverse_grad_norm mgda; do
      python -m mtl_dist.train configs/recipe/multi_digits.yaml \
        steps=300 eval_every=30 weighting.name=$rule output_dir=runs/report/$rule
    done
    mtl-dist report runs/report/{equal,inverse_grad_norm,mgda} -o runs/report/report.html
    python docs/report_screenshot.py runs/report/report.html

It needs Chromium (apt install chromium), playwright and pillow (`pip install -e .[test]`).
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

TARGET = Path(__file__).parent / "img" / "report.png"
WIDTH, HEIGHT = 1280, 1130  # size of a view, in pixels


def main() -> int:
    """One picture: above the light page, below the dark page with the cosines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("report", type=Path, help="HTML file that mtl-dist report wrote")
    report: Path = parser.parse_args().report
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(report.resolve().as_uri())
        page.locator("#smoothing").fill("40")
        page.locator("#smoothing").blur()
        page.wait_for_timeout(300)
        overview = picture(page)
        page.locator("#theme").click()
        page.locator("#cosines").evaluate("node => scrollTo(0, node.offsetTop - 130)")
        page.locator("#frame").fill("40")
        page.wait_for_timeout(300)
        cosines = picture(page)
        browser.close()
    both = Image.new("RGB", (WIDTH, 2 * HEIGHT))
    both.paste(overview, (0, 0))
    both.paste(cosines, (0, HEIGHT))
    TARGET.parent.mkdir(exist_ok=True)
    # the page has few colours: a palette makes the file much smaller
    both.quantize(255, dither=Image.Dither.NONE).save(TARGET, optimize=True)
    return 0


def picture(page: Page) -> Image.Image:
    """The visible part of the page."""
    return Image.open(io.BytesIO(page.screenshot()))


if __name__ == "__main__":
    raise SystemExit(main())
