"""The pages that launch/docs.py writes. CI builds the site from them: `bash launch/docs.sh`."""

from __future__ import annotations

import re

import pytest
import yaml
from program import ROOT

from launch import docs
from launch.docs_plot import shares, weights_plot
from mtl_dist.weighting import MGDA, RLW, RULES, STCH, Clamp, Equal, LogSumExp

PAGE = ROOT / "docs" / "usage.md"


def test_links_to_the_repository_become_pages():
    needed = set()
    text = "[a](../README.md#use-it) [b](../mtl_dist/stats.py) [c](probes.md#x) [d](https://x.y) `[e](f)`\n"
    code = "```python\nx[0](gone.md)\n```\n"
    got = docs.on_site(text.replace(" `[e](f)`", "") + code, PAGE, "usage.md", needed)
    assert got == (
        "[a](index.md#use-it) [b](source/mtl_dist/stats.py.md) [c](probes.md#x) [d](https://x.y)\n" + code
    )
    assert {file.name for file in needed} == {"README.md", "stats.py", "probes.md"}
    with pytest.raises(FileNotFoundError, match=r"docs/usage\.md: the link gone\.md leads nowhere"):
        docs.on_site("[a](gone.md)", PAGE, "usage.md", needed)


def test_pages_below_link_upwards():
    got = docs.on_site("[a](../probes.md)", ROOT / "docs" / "zh" / "README.md", "zh/README.md", set())
    assert got == "[a](../probes.md)"


def test_every_page_is_in_the_navigation():
    shown = {path for _, path in docs.NAV}
    files = [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in docs.TOP)]
    missing = {docs.page_of(file) for file in files} - shown
    assert missing == {"pages.md"}, "the index for GitHub: the navigation stands for it"


def test_a_page_says_what_the_class_says():
    page = docs.rule_page("mgda", MGDA)
    assert page.startswith("# MGDA\n\nMultiple-gradient descent: `α = argmin αᵀGα`")
    for part in (
        "| from | Sener and Koltun, NeurIPS 2018 |",
        "| cost of the weights | QP, host |",
        "| reads | gram |",
    ):
        assert part in page
    assert "::: mtl_dist.weighting.mgda.MGDA" in page
    assert page.count("<svg") == 1
    assert "<svg" not in docs.rule_page("clamp", Clamp)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Equal, "It compares nothing"),
        (STCH, "depend on the units of the losses"),
        (LogSumExp, "neither how long the gradients"),
        (RLW, "does not keep the [law](../writing.md#does-it-keep-the-laws) `permutation`"),
        (RULES["db_mtl"], "losses are multiplied by s, its weights are multiplied by s^(-1)"),
        (RULES["inverse_loss"], "It takes no losses <= 0."),
    ],
)
def test_what_a_rule_is_blind_to(cls, words):
    assert words in " ".join(docs.blind_to(cls))


def test_the_picture_shows_the_weights():
    assert shares(Equal()).unique().tolist() == [0.5]
    values = shares(MGDA())
    assert values.sum(1).allclose(values.new_ones(()))
    lines = re.findall(r'points="([^"]*)"', weights_plot(MGDA(), "MGDA"))
    assert len(lines) == 2
    heights = [float(pair.split(",")[1]) for line in lines for pair in line.split()]
    assert min(heights) >= 28
    assert max(heights) <= 122.1


def test_the_settings_name_every_page_once():
    rules, api = [("MGDA", "rules/mgda.md")], [("Rules", "api/rules.md")]
    nav = yaml.safe_dump(docs.configuration(rules, api)["nav"])
    for path in (*dict(docs.NAV).values(), "rules/mgda.md", "api/rules.md"):
        assert nav.count(path) == (2 if path == "rules.md" else 1), path
