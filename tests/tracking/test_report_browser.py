"""The report as a reader meets it: in headless Chromium, pointing, clicking and dragging."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtl_dist.tracking.report import write_report
from tests.tracking.browser import ARGUMENTS, chromium, colours, figure, opened, settle
from tests.tracking.made_runs import made_row, write_run

TASKS = ("left", "right", "sum")
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # of the first three tasks, in light
TITLES = [
    *("Weights", "Training losses", "Gradient norms", "Contributions", "Conflict rate", "Weight entropy"),
    *("Weighted total loss", "Step time, ms", "Validation losses", "accuracy"),
]
STEPS = 60
FRAME = "new Promise(shown => requestAnimationFrame(() => requestAnimationFrame(shown)))"
LONG = "a_very_long_name_for_the_segmentation_head_of_cityscapes"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "solo"
    return write_report([write_run(folder, TASKS, STEPS, settings={"weighting": "mgda"})])


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    """Two runs with tasks in common, and one without a row."""
    root = tmp_path_factory.mktemp("several")
    folders = [
        write_run(root / "a", TASKS, STEPS, settings={"seed": 0, "weighting": "mgda"}),
        write_run(root / "b", ("sum", LONG), 40, phase=1.0, settings={"seed": 1, "weighting": "mgda"}),
        root / "empty",
    ]
    folders[2].mkdir()
    (folders[2] / "metrics.jsonl").touch()
    return write_report(folders, root / "several.html")


@pytest.fixture(scope="module")
def fifty(tmp_path_factory) -> Path:
    tasks = [f"task_{i:02d}" for i in range(50)]
    return write_report([write_run(tmp_path_factory.mktemp("fifty") / "run", tasks, 40, settings={})])


def readout(page: Any, title: str) -> str:
    return figure(page, title).locator(".readout").inner_text()


def test_every_chart_has_its_lines(browser, one):
    with opened(browser, one) as page:
        assert page.locator("#charts figcaption b").all_inner_texts() == TITLES
        assert page.locator("#charts .uplot").count() == len(TITLES)
        counts = page.locator("#charts figure").evaluate_all(
            "all => all.map(one => Number(one.dataset.series))"
        )
        assert counts == [3, 3, 3, 3, 1, 1, 1, 1, 3, 3]
        for title in TITLES[:4]:
            assert {BLUE, ORANGE, GREEN} <= colours(figure(page, title)), title
        last = made_row(TASKS, STEPS, STEPS)
        assert f"{last['mtl/weight/sum']:.4g}" in readout(page, "Weights")
        assert page.locator("#runs button").count() == 0, "one run needs no switches"


def test_the_browser_refuses_every_request(browser, one):
    context = browser.new_context()
    page = context.new_page()
    page.goto(one.as_uri())
    refused = page.evaluate(
        """async () => {
          const found = [];
          document.addEventListener("securitypolicyviolation", event => found.push(event.effectiveDirective));
          await fetch("http://127.0.0.1:9/").catch(() => {});
          document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/a.png" }));
          const script = document.createElement("script");
          script.textContent = "document.title = 'broken in'";
          document.body.append(script);
          await new Promise(done => setTimeout(done, 100));
          return found;
        }"""
    )
    assert {"connect-src", "img-src", "script-src-elem"} <= set(refused)
    assert page.title() == "Run solo"
    context.close()


def test_a_task_is_hidden_and_shown_everywhere(browser, one):
    with opened(browser, one) as page:
        chip = page.get_by_role("button", name="left", exact=True)
        chip.click()
        assert chip.get_attribute("aria-pressed") == "false"
        for title in ("Weights", "Training losses", "Contributions"):
            assert figure(page, title).get_attribute("data-series") == "2"
            assert BLUE not in colours(figure(page, title))
            assert "left" not in readout(page, title)
        assert "left" not in page.locator("#matrices .readout").inner_text()
        chip.click()
        assert BLUE in colours(figure(page, "Weights"))
        page.get_by_role("button", name="sum", exact=True).dblclick()
        shown = colours(figure(page, "Weights"))
        assert GREEN in shown
        assert not {BLUE, ORANGE} & shown
        page.locator("#none").click()
        assert "nothing chosen has values" in figure(page, "Weights").inner_text()
        page.locator("#all").click()
        assert figure(page, "Weights").get_attribute("data-series") == "3"


def test_the_logarithmic_axis_is_switched(browser, one):
    with opened(browser, one) as page:
        weights = figure(page, "Weights")
        before = weights.locator("canvas").first.evaluate("canvas => canvas.toDataURL()")
        assert weights.get_attribute("data-log") == "false"
        assert figure(page, "Training losses").get_attribute("data-log") == "true", "two decades start so"
        weights.get_by_role("button").click()
        assert weights.get_attribute("data-log") == "true"
        assert weights.locator("canvas").first.evaluate("canvas => canvas.toDataURL()") != before
        last = made_row(TASKS, STEPS, STEPS)
        assert f"{last['mtl/weight/sum']:.4g}" in readout(page, "Weights"), "values stay what they are"


def test_smoothing_is_an_unbiased_exponential_mean(browser, one):
    with opened(browser, one) as page:
        page.locator("#smoothing").fill("50")
        settle(page)
        half_life = math.sqrt((STEPS - 1) / 4)
        assert page.locator("#smoothing-value").inner_text() == f"half-life {half_life:.2g} steps"
        kept = [0.5 ** ((STEPS - step) / half_life) for step in range(1, STEPS + 1)]
        norms = [made_row(TASKS, step, STEPS)["mtl/grad_norm/left"] for step in range(1, STEPS + 1)]
        expected = sum(k * norm for k, norm in zip(kept, norms, strict=True)) / sum(kept)
        shown = float(re.search(r"left ([\d.]+)", readout(page, "Gradient norms"))[1])
        assert shown == pytest.approx(expected, rel=1e-3)
        assert shown != pytest.approx(norms[-1], rel=1e-2)
        assert figure(page, "Weights").get_attribute("data-smoothed") == "true"
        page.locator("#smoothing").fill("0")
        settle(page)
        assert page.locator("#smoothing-value").inner_text() == "off"


def test_all_charts_read_out_the_step_pointed_at(browser, one):
    with opened(browser, one) as page:
        assert readout(page, "Weights").startswith("last")
        figure(page, "Training losses").locator(".u-over").hover()
        steps = {text.split("\n")[0] for text in page.locator("#charts .readout").all_inner_texts()}
        assert len(steps) <= 2, steps  # sparse charts show the validation step nearest to it
        step = int(re.search(r"step (\d+)", readout(page, "Weights"))[1])
        assert 1 < step < STEPS
        expected = made_row(TASKS, step, STEPS)["mtl/weight/right"]
        assert f"right {float(f'{expected:.4g}'):g}" in readout(page, "Weights").replace("\n", " ")
        page.mouse.move(5, 5)
        assert readout(page, "Gradient norms").startswith("last")


def test_dragging_zooms_all_charts_and_back(browser, one):
    with opened(browser, one) as page:
        over = figure(page, "Weights").locator(".u-over")
        over.scroll_into_view_if_needed()
        box = over.bounding_box()
        page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 40)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 50, steps=4)
        page.mouse.up()
        first, last = (int(page.locator(f"#{end}").input_value()) for end in ("from", "to"))
        assert (first, last) == pytest.approx((1 + 0.25 * 59, 1 + 0.5 * 59), abs=1.5)
        label = figure(page, "accuracy").locator(".plot").get_attribute("aria-label")
        assert label.endswith(f"steps {first} to {last}")
        figure(page, "Weights").locator(".u-over").dblclick()
        assert page.locator("#to").input_value() == str(STEPS)
        page.locator("#to").fill("30")
        page.locator("#to").press("Enter")
        assert "step 30" in readout(page, "Weights")
        page.locator("#reset").click()
        assert readout(page, "Weights").startswith("last")


def test_the_slider_plays_the_cosines(browser, one):
    with opened(browser, one) as page:
        said = page.locator("#matrices .readout")
        for step in (STEPS, STEPS - 1, STEPS - 2):
            row = made_row(TASKS, step, STEPS)
            lowest = min(value for key, value in row.items() if key.startswith("mtl/cosine/"))
            assert page.locator("#frame-value").inner_text() == str(step)
            assert said.inner_text().startswith(f"step {step}: ")
            assert said.inner_text().endswith(f"{lowest:.3f}".replace("-", "−"))
            page.locator("#frame").press("ArrowLeft")
        page.locator("#frame").press("Home")
        assert page.locator("#frame-value").inner_text() == "1"
        figure(page, "Weights").locator(".u-over").click()
        assert 20 < int(page.locator("#frame-value").inner_text()) < 40, "a click on a chart comes here"
        canvas = page.locator("#matrices .matrix canvas").first
        canvas.hover()
        assert re.search(r"(left|right) and (left|right|sum), −?\d\.\d{3}|oppose", said.inner_text())
        page.locator(".timeline").click(position={"x": 630, "y": 5})
        assert int(page.locator("#frame-value").inner_text()) > 50


def test_dark_and_light(browser, one):
    background = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, one, dark=True) as page:
        assert page.evaluate(background) == "rgb(20, 23, 27)", "as the system prefers"
        assert BLUE not in colours(figure(page, "Weights"))
        page.locator("#theme").click()
        assert page.evaluate(background) == "rgb(255, 255, 255)"
        assert BLUE in colours(figure(page, "Weights"))
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.evaluate(FRAME)  # a page hears of it at the next frame; two changes within one are none
        assert page.evaluate(background) == "rgb(20, 23, 27)", "and follows it"


def test_the_final_table_is_sorted_by_its_headings(browser, one):
    with opened(browser, one) as page:
        names = "#final tbody tr td:first-child"
        page.locator("#final").get_by_role("button", name="Weight", exact=True).click()
        assert page.locator("#final th[aria-sort=descending]").inner_text().startswith("Weight")
        last = made_row(TASKS, STEPS, STEPS)
        ranked = sorted(TASKS, key=lambda task: -last[f"mtl/weight/{task}"])
        assert page.locator(names).all_inner_texts() == ranked
        page.locator("#final").get_by_role("button", name="Weight", exact=True).click()
        assert page.locator(names).all_inner_texts() == ranked[::-1]


def test_several_runs_are_compared(browser, several):
    with opened(browser, several) as page:
        assert page.locator("#runs button").all_inner_texts() == ["a", "b", "empty"]
        assert figure(page, "Weights").get_attribute("data-series") == "5"
        assert figure(page, "Relative weights").get_attribute("data-series") == "5"
        assert figure(page, "Conflict rate").get_attribute("data-series") == "2"
        assert page.locator("#matrices figure").count() == 2
        assert "has no complete row" in page.locator(".notes").inner_text()
        page.locator("#runs button").first.click()
        assert figure(page, "Weights").get_attribute("data-series") == "2"
        assert page.locator("#matrices figure:visible").count() == 1
        assert not {BLUE, ORANGE} & colours(figure(page, "Weights"))
        page.locator("#runs button").first.click()
        page.locator("#colour").select_option("run")
        assert {BLUE, ORANGE} <= colours(figure(page, "Conflict rate"))
        page.locator("#only-differences").check()
        assert page.locator("#settings tbody tr:visible td:first-child").all_inner_texts() == [
            "seed",
            "weighting",
        ]


@pytest.mark.parametrize("page_of", ["one", "several", "fifty"])
def test_a_phone_scrolls_in_one_direction_only(browser, request, page_of):
    with opened(browser, request.getfixturevalue(page_of), width=390) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator("#charts .uplot").first.bounding_box()["width"] > 340
        too_wide = page.locator("#charts figure, #controls, #matrices canvas").evaluate_all(
            "all => all.filter(one => one.getBoundingClientRect().right > 391).length"
        )
        assert too_wide == 0


def test_fifty_tasks(browser, fifty):
    with opened(browser, fifty) as page:
        assert figure(page, "Training losses").get_attribute("data-series") == "50"
        assert "and 42 more" in readout(page, "Weights")
        page.locator("#search").fill("task_4")
        assert page.locator("#tasks button:visible").count() == 10
        page.locator("#search").fill("")
        page.locator("#none").click()
        page.locator("#search").fill("task_07")
        page.locator("#all").click()
        assert figure(page, "Weights").get_attribute("data-series") == "1"
        page.locator("#search").fill("")
        page.locator("#all").click()
        page.get_by_role("button", name="task_00", exact=True).hover()
        settle(page)
        assert BLUE in colours(figure(page, "Training losses")), "the others fade, it does not"
        assert "of 1225 pairs oppose" in page.locator("#matrices .readout").inner_text()
        assert page.locator("#matrices canvas").first.bounding_box()["height"] > 300
        assert page.locator("#controls").bounding_box()["height"] < 260


def test_hostile_names_stay_text(browser, tmp_path):
    evil = "<script>alert(1)</script>"
    tasks = (evil, "</script><img src=x onerror=alert(2)>", "__proto__")
    folder = write_run(tmp_path / "<b>run", tasks, 10, settings={evil: "</script>" + evil})
    with opened(browser, write_report([folder])) as page:
        assert page.locator("#tasks button").all_inner_texts() == list(tasks)
        assert page.locator("script").count() == 3
        assert page.locator("img, b:text-is('run')").count() == 0
        assert page.locator("h1").inner_text() == "Run <b>run"
        assert evil in readout(page, "Weights")


def test_an_empty_run_has_a_page_that_says_so(browser, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with opened(browser, write_report([tmp_path])) as page:
        assert "nothing to draw" in page.locator("#charts").inner_text()
        assert page.locator("#cosines").is_hidden()


def test_values_that_no_logarithm_or_axis_likes(browser, tmp_path):
    lines = [
        '{"train/global_step": 1, "mtl/loss/a": -1, "mtl/weight/a": 0, "x": 1e300}',
        '{"train/global_step": 2, "mtl/loss/a": null, "mtl/weight/a": 0, "x": 1e-30}',
        '{"train/global_step": 7, "mtl/loss/a": 0, "mtl/weight/a": 0, "mtl/cosine/a__b": 0.5}',
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    with opened(browser, write_report([tmp_path])) as page:
        assert figure(page, "Training losses").locator("button").is_disabled()
        figure(page, "x").locator("button").click()
        assert "1.00e-30" in readout(page, "x")


def test_it_prints_in_light_without_controls(browser, one):
    with opened(browser, one, dark=True) as page:
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        assert page.evaluate("document.documentElement.dataset.theme") == "light"
        assert page.locator("#smoothing").is_hidden()
        assert BLUE in colours(figure(page, "Weights"))
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert len(page.pdf()) > 20_000
