"""Four real kinds of text, a model that learns them, and a Gram that only the layer shows."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from program import ROOT, train

from mtl_dist import Balancer, FeatureProbe, SharedLayerProbe
from mtl_dist.recipes import TextMixture
from mtl_dist.recipes._domains import DOMAINS, streams
from mtl_dist.tracking import read_rows
from mtl_dist.training.evaluate import eval_row
from mtl_dist.weighting import MGDA, InverseGradNorm

RECIPE = TextMixture(num_train=1024, num_validation=15, length=32, width=32, layers=1)
CONFIG = ROOT / "configs" / "recipe" / "text_mixture.yaml"


@pytest.fixture(scope="module")
def data():
    return RECIPE.data(seed=0)


def whole(samples):
    return samples.__getitems__(range(len(samples)))


def model(probe=None, rule=None):
    torch.manual_seed(0)
    return RECIPE.model(Balancer(RECIPE.tasks, rule or MGDA(), probe=probe))


def test_domains_are_different_and_large_enough():
    """By their bytes: each domain's distribution is nearer to its own validation text than to any other's."""

    def frequencies(text):
        return torch.bincount(text.long(), minlength=256) / len(text)

    train = {domain: frequencies(streams(domain)[0]) for domain in DOMAINS}
    for domain in DOMAINS:
        texts = streams(domain)
        assert len(texts[0]) > 100_000
        assert len(texts[1]) > 20_000
        distances = {other: (frequencies(texts[1]) - train[other]).abs().sum() for other in DOMAINS}
        assert min(distances, key=distances.get) == domain


def test_code_has_no_docstrings_and_docstrings_no_code():
    code = dict(DOMAINS["code"]())["textwrap"]
    documentation = dict(DOMAINS["docstrings"]())["textwrap"]
    assert "def dedent(text):" in code
    assert "Remove any common leading whitespace" not in code
    assert "Remove any common leading whitespace" in documentation
    assert "def dedent(text):" not in documentation
    assert not any(line.lstrip().startswith("#") for line in code.splitlines())


def test_no_document_is_in_both_parts():
    for domain, documents in DOMAINS.items():
        train, validation = (bytes(part.tolist()) for part in streams(domain))
        names = [name for name, _ in documents()]
        assert len(set(names)) == len(names)
        inside = [(text.encode() in train) + (text.encode() in validation) for _, text in documents() if text]
        # some rows of tables are there twice
        assert Counter(inside)[1] > 0.98 * len(inside), domain


def test_data_are_a_function_of_the_seed_and_validation_of_nothing(data):
    again, other = RECIPE.data(seed=0), RECIPE.data(seed=1)
    assert torch.equal(whole(data[0])["tokens"], whole(again[0])["tokens"])
    assert not torch.equal(whole(data[0])["tokens"], whole(other[0])["tokens"])
    assert torch.equal(whole(data[1])["tokens"], whole(other[1])["tokens"])


@pytest.mark.parametrize("temperature", [1.0, 2.0, math.inf])
def test_domains_are_drawn_by_temperature(temperature):
    train, _ = TextMixture(num_train=20_000, temperature=temperature).data(0)
    sizes = torch.tensor([len(text) for text in train.texts]).double()
    expected = sizes ** (1 / temperature) / (sizes ** (1 / temperature)).sum()
    got = torch.bincount(train.domains, minlength=4) / len(train)
    assert (got - expected).abs().max() < 0.015
    for domain, text in enumerate(train.texts):
        starts = train.starts[train.domains == domain]
        assert starts.min() >= 0
        assert starts.max() + train.length <= len(text)


def test_gram_is_diagonal_at_the_features_and_not_at_the_layer(data):
    """The same batch, the same gradients: what conflict rules see depends on where one looks."""
    batch = data[0].__getitems__(range(64))
    grams = {}
    for probe in (FeatureProbe(), SharedLayerProbe()):
        net = model(probe)
        net(**batch)
        grams[type(probe)] = net.balancer.report.stats.gram
    features, layer = grams[FeatureProbe], grams[SharedLayerProbe]
    assert torch.equal(features, features.diag().diag())
    assert bool((features.diag() > 0).all())
    cosines = layer / torch.outer(layer.diag().sqrt(), layer.diag().sqrt())
    assert cosines.triu(1).abs().max() > 0.1


def test_losses_begin_at_those_of_a_uniform_guess(data):
    net = model()
    net(**data[0].__getitems__(range(64)))
    for loss in net.balancer.report.losses.values():
        assert loss == pytest.approx(math.log(256), rel=0.1)


def test_validation_sums_add_over_uneven_and_empty_parts(data):
    net, validation = model().eval(), data[1]
    with torch.no_grad():
        expected = net(**whole(validation))
        parts = [range(7), range(7, 7), range(7, 33), range(33, 60)]
        added = sum(net(**validation.__getitems__(part)) for part in parts)
    torch.testing.assert_close(added, expected, rtol=1e-6, atol=1e-6)
    assert added[:, 2].tolist() == [15 * 32] * 4


def test_it_learns_every_domain(data):
    net = model(SharedLayerProbe(), InverseGradNorm())
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3)
    for step in range(40):
        net(**data[0].__getitems__(range(step % 32 * 32, step % 32 * 32 + 32))).backward()
        optimizer.step()
        optimizer.zero_grad()
    net.eval()
    with torch.no_grad():
        row = eval_row(net(**whole(data[1])), RECIPE)
    for domain in DOMAINS:
        assert row[f"eval/{domain}/bits_per_byte"] < 5.5  # 8 at the start
        assert row[f"eval/{domain}/bits_per_byte"] == pytest.approx(row[f"eval/loss/{domain}"] / math.log(2))


@pytest.mark.timeout(600)
def test_two_processes_are_one_on_the_same_global_batches(tmp_path):
    small = ("recipe.length=32", "recipe.width=32", "recipe.layers=1", "recipe.num_validation=9")
    settings = (*small, "recipe.num_train=256", "steps=6", "batch_size=16", "checkpoint_every=0")
    rows = {}
    for number in (1, 2):
        out = tmp_path / str(number)
        train(out, number, *settings, config=CONFIG, timeout=250)
        assert json.loads((out / "summary.json").read_text())["num_processes"] == number
        rows[number] = [
            {k: v for k, v in row.items() if "perf/" not in k} for row in read_rows(out / "metrics.jsonl")
        ]
    for one, two in zip(rows[1], rows[2], strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-3)
    assert rows[1][0] == pytest.approx(rows[2][0], rel=1e-5, abs=1e-5)
    assert abs(rows[1][0]["mtl/cosine/code__docstrings"]) > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train": 0}, "num_train must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"width": 20, "attention_heads": 4}, "width must divide by twice attention_heads, got 20 and 4"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TextMixture(**settings)
