"""Settings: what is right becomes objects, what is wrong becomes one line that says what to do."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from mtl_dist import Balancer
from mtl_dist.probes import FeatureProbe, FeatureTap, SharedLayerProbe
from mtl_dist.recipes import MultiDigits
from mtl_dist.tracking import JsonlTracker
from mtl_dist.training.settings import (
    PROBES,
    Settings,
    build_balancer,
    build_probe,
    build_rule,
    build_trackers,
    load_settings,
)
from mtl_dist.weighting import MGDA, Clamp, Equal, Fixed, GeneralizedMean, GroupDRO, Grouped, Smooth

SHIPPED = Path(__file__).parent.parent / "configs" / "recipe" / "multi_digits.yaml"


def test_the_shipped_file_names_every_setting_and_builds():
    assert set(yaml.safe_load(SHIPPED.read_text())) == set(Settings.model_fields)
    settings = load_settings(SHIPPED)
    assert settings.recipe.object == MultiDigits()  # the file shows the defaults


def test_overrides_reach_nested_values_with_yaml_types():
    overrides = [
        "weighting.name=clamp",
        "weighting.rule.name=mgda",
        "weighting.high=.inf",
        "learning_rate=1e-4",
    ]
    settings = load_settings(SHIPPED, [*overrides, "resume_from=null", "recipe.features=32"])
    assert settings.weighting.object == Clamp(MGDA(), low=0, high=math.inf)
    assert settings.learning_rate == 1e-4
    assert settings.resume_from is None
    assert settings.recipe.object == MultiDigits(features=32)


def test_a_component_given_by_name_takes_fields_by_override():
    settings = load_settings(SHIPPED, ["probe=feature", "probe.reevaluate=true"])
    assert settings.probe.object == FeatureProbe(reevaluate=True)


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("equal", Equal()),
        ({"name": "mgda"}, MGDA()),
        ({"name": "generalized_mean", "power": math.inf}, GeneralizedMean(power=math.inf)),
        ({"name": "generalized_mean", "power": 1e3}, GeneralizedMean(power=1000.0)),
        ({"name": "fixed", "weights": {"left": 1, "right": 2}}, Fixed({"left": 1.0, "right": 2.0})),
        ({"name": "fixed", "weights": [1, 2]}, Fixed([1.0, 2.0])),
        ({"name": "smooth", "decay": 0.9, "rule": {"name": "mgda"}}, Smooth(MGDA(), decay=0.9)),
        ({"name": "smooth", "rule": {"name": "clamp", "rule": "mgda"}}, Smooth(Clamp(MGDA()))),
        (
            {"name": "grouped", "rule": "mgda", "between": {"name": "equal"}, "groups": {"a": ["x", "y"]}},
            Grouped(MGDA(), Equal(), {"a": ["x", "y"]}),
        ),
        ({"name": "group_dro", "references": {"x": 1, "y": 2}}, GroupDRO({"x": 1.0, "y": 2.0})),
    ],
)
def test_rules_by_name(spec, rule):
    assert build_rule(spec) == rule


def test_each_component_is_built_once_per_load(monkeypatch):
    """And each run takes what the load has built: only balancer and trackers, which hold state, are new."""
    built = Counter()

    def count(cls, method):
        original = getattr(cls, method)

        @functools.wraps(original)
        def counted(self, *args, **kwargs):
            built[cls.__name__] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, method, counted)

    for cls, method in [
        (MultiDigits, "__post_init__"),
        (Smooth, "__init__"),
        (MGDA, "__init__"),
        (SharedLayerProbe, "__init__"),
        (JsonlTracker, "__init__"),
        (Balancer, "__init__"),
    ]:
        count(cls, method)
    once = {
        "MultiDigits": 1,
        "Smooth": 1,
        "MGDA": 1,
        "SharedLayerProbe": 1,
        "JsonlTracker": 1,
        "Balancer": 1,
    }
    overrides = ["weighting={name: smooth, rule: mgda}", "probe=shared_layer"]
    settings = load_settings(SHIPPED, overrides)
    assert built == once
    balancer, _ = build_balancer(settings), build_trackers(settings)
    assert built == {**once, "Balancer": 2, "JsonlTracker": 2}
    assert balancer.weighting is settings.weighting.object


def test_a_component_is_saved_as_it_was_written():
    settings = load_settings(SHIPPED, ["weighting={name: smooth, rule: mgda}", "probe=null"])
    dumped = settings.model_dump(mode="json")
    assert dumped["weighting"] == {"name": "smooth", "rule": "mgda"}
    assert dumped["probe"] is None
    assert Settings.model_validate(dumped) == settings


def test_probes_by_name():
    assert build_probe(None) is None
    assert build_probe("tap") == FeatureTap()
    assert build_probe({"name": "shared_layer", "sketch": 4096}) == SharedLayerProbe(sketch=4096)
    assert set(PROBES) == {"feature", "tap", "shared_layer", "parameter"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lerning_rate=3", "'lerning_rate' (= 3) is not a setting; did you mean 'learning_rate'?"),
        ("zzzz=3", "'zzzz' (= 3) is not a setting; choose one of accumulation, batch_size"),
        ("steps=-1", "steps: Input should be greater than 0; got -1"),
        ("steps=many", "steps: Input should be a valid integer"),
        ("on_nonfinite=ignore", "on_nonfinite: Input should be 'raise', 'skip' or 'hold'; got 'ignore'"),
        ("weighting=mdga", "weighting.name: got 'mdga'; did you mean 'mgda'?"),
        ("weighting={rule: mgda}", "weighting.name: got no name; choose one of "),
        ("weighting=3", "weighting: give a name, or a mapping with name and fields; got 3"),
        (
            "weighting={name: fixed, wights: 1}",
            "weighting.wights: 'fixed' has no such field; did you mean 'weights'?",
        ),
        ("weighting={name: equal, x: 1}", "weighting.x: 'equal' has no such field; it takes none"),
        ("weighting=fixed", "weighting: 'fixed' needs weights; got 'fixed'"),
        ("weighting={name: smooth, decay: x, rule: mgda}", "weighting.decay: Input should be a valid number"),
        ("weighting={name: smooth, decay: 2, rule: mgda}", "decay must be in [0, 1), got 2.0"),
        (
            "weighting={name: smooth, rule: {name: smoth}}",
            "weighting.rule.name: got 'smoth'; did you mean 'smooth'?",
        ),
        (
            "weighting={name: fixed, weights: {left: 1}}",
            "one value for each task ['left', 'right', 'sum', 'image']",
        ),
        ("probe=taps", "probe.name: got 'taps'; did you mean 'tap'?"),
        ("recipe.featurs=3", "recipe.featurs: 'multi_digits' has no such field; did you mean 'features'?"),
        ("recipe.features=0", "features must be at least 1, got 0"),
        ("steps", "override 'steps': write key=value"),
        ("a..b=1", "override 'a..b=1': write key=value"),
        ("steps=[", "override 'steps=[': the value is not valid YAML"),
        ("steps.x=1", "override 'steps.x=1': steps is 300, which has no fields"),
    ],
)
def test_what_is_wrong_is_told_with_path_value_and_remedy(override, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_settings(SHIPPED, [override])
    assert "\n" not in str(caught.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError, match="not a setting") as caught:
        load_settings(SHIPPED, ["steps=0", "batch_sise=1"])
    assert str(caught.value).splitlines() == [
        f"{SHIPPED}: steps: Input should be greater than 0; got 0",
        f"{SHIPPED}: 'batch_sise' (= 1) is not a setting; did you mean 'batch_size'?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "must be a mapping of settings"),
        ("a: [", "not valid YAML"),
        ("steps: 3", "'recipe' is missing"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_settings(path)


def test_a_file_that_does_not_exist():
    with pytest.raises(ValueError, match=r"no configuration file 'nowhere\.yaml'"):
        load_settings("nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nseed: 0\nsteps: 2\n", "'steps' stands in line 1 and again in line 3: keep one of them"),
        ("weighting:\n  name: mgda\n  name: equal\n", "'name' stands in line 2 and again in line 3"),
    ],
)
def test_a_key_stands_once(tmp_path, text, message):
    file = tmp_path / "twice.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_settings(file)


def test_merged_keys_may_be_overridden(tmp_path):
    file = tmp_path / "merged.yaml"
    file.write_text("a: &a {name: mgda, normalization: none}\nb: {<<: *a, name: equal}\n")
    with pytest.raises(ValueError, match=r"'a' .* is not a setting"):  # so it was read
        load_settings(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe\x00", "not UTF-8 text: .* at byte 0"), (None, "cannot be read as a config")],
)
def test_what_cannot_be_read_is_told_by_its_name(tmp_path, content, message):
    file = tmp_path / "odd.yaml"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"odd\.yaml.*{message}"):
        load_settings(file)


@pytest.mark.parametrize(
    "override", ["learning_rate=.inf", "weight_decay=.inf", "timeout_minutes=.inf", "seed=10000000000"]
)
def test_numbers_that_no_run_can_have(override):
    with pytest.raises(ValueError, match=override.partition("=")[0]):
        load_settings(SHIPPED, [override])
