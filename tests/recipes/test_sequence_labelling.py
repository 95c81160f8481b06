"""CRF and MEMM hold their definitions, decoding finds the best path, spans and counts are exact."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from standins import provide

from mtl_dist import Balancer
from mtl_dist.recipes import SequenceLabelling
from mtl_dist.recipes.sequence_labelling import ChainHead, bimemm_nll, crf_nll, memm_nll, viterbi
from mtl_dist.recipes.sequence_labelling.chains import bimemm_scores, memm_scores
from mtl_dist.recipes.sequence_labelling.corpus import read_sentences, vocabulary
from mtl_dist.recipes.sequence_labelling.spans import f1, name_spans, span_counts, word_starts
from mtl_dist.training.evaluate import eval_row
from mtl_dist.weighting import Equal, InverseGradNorm

E = torch.tensor([[1, 0], [0, 0.5], [0.2, -0.3]], dtype=torch.float64)
A = torch.tensor([[0.1, -0.2], [0.3, 0.4]], dtype=torch.float64)
Y = torch.tensor([0, 1, 0])
RECIPE = SequenceLabelling(num_train=128, num_validation=23, length=24, width=16, characters=300)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    provide(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield RECIPE.data(seed=0)


def ragged(seed=0, size=5, steps=7, labels=4):
    """Emissions, transitions, labels and mask of sentences of 1 to `steps` tokens."""
    rng = torch.Generator().manual_seed(seed)
    e = torch.randn(size, steps, labels, generator=rng, dtype=torch.float64)
    a = torch.randn(labels, labels, generator=rng, dtype=torch.float64)
    y = torch.randint(labels, (size, steps), generator=rng)
    lengths = torch.tensor([1, steps, 3, 2, 5])[:size]
    return e, a, y, torch.arange(steps) < lengths[:, None]


@pytest.mark.parametrize(("nll", "value"), [(crf_nll, 1.4346112727), (memm_nll, 1.4244158093)])
def test_known_values(nll, value):
    assert nll(E, A, Y).item() == pytest.approx(value, abs=1e-9)
    assert nll(E, A, Y).dtype == torch.float64


def test_the_probabilities_of_all_label_sequences_sum_to_one():
    paths = torch.tensor(list(itertools.product(range(2), repeat=3)))
    for nll in (crf_nll, memm_nll):
        each = nll(E.expand(len(paths), 3, 2), A, paths)
        assert each.neg().exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_both_directions_are_the_mean_of_one_and_of_the_reversed_sentence():
    def halved(e, a, y):
        logits = torch.cat([e[:1], (e[1:] + a[y[:-1]]) / 2])
        return torch.nn.functional.cross_entropy(logits, y, reduction="sum")

    expected = (halved(E, A, Y) + halved(E.flip(0), A.T, Y.flip(0))) / 2
    assert bimemm_nll(E, A, Y).item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("nll", [crf_nll, memm_nll, bimemm_nll])
def test_padding_has_no_effect(nll):
    e, a, y, mask = ragged()
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = nll(e[row, :length], a, y[row, :length])
        assert nll(e, a, y, mask)[row].item() == pytest.approx(alone.item(), abs=1e-12)


def test_the_crf_agrees_with_pytorch_crf():
    import torchcrf  # the oracle, of the test extra

    e, a, y, mask = ragged()
    model = torchcrf.CRF(4, batch_first=True).double()
    with torch.no_grad():
        model.transitions.copy_(a)
        model.start_transitions.zero_()
        model.end_transitions.zero_()
        expected = -model(e, y, mask=mask, reduction="none")
        assert (crf_nll(e, a, y, mask) - expected).abs().max() < 1e-10
        best = viterbi(e, a, mask)
    assert [row[here].tolist() for row, here in zip(best, mask, strict=True)] == model.decode(e, mask)


@pytest.mark.parametrize("kind", ["crf", "memm", "bimemm"])
def test_decoding_finds_the_most_probable_labels(kind):
    e, a, _, mask = ragged(steps=5, labels=3)
    mask[2:] = torch.arange(5) < torch.tensor([[3], [2], [5]])
    scores = {"crf": (e, a), "memm": memm_scores(e, a), "bimemm": bimemm_scores(e, a, mask)}[kind]
    nll = {"crf": crf_nll, "memm": memm_nll, "bimemm": bimemm_nll}[kind]
    got = viterbi(*scores, mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        paths = torch.tensor(list(itertools.product(range(3), repeat=length)))
        every = nll(e[row, :length].expand(len(paths), length, 3), a, paths)
        assert got[row, :length].tolist() == paths[every.argmin()].tolist()


def test_a_crf_of_nothing_has_the_loss_of_a_uniform_guess_a_sentence():
    head, mask = ChainHead("crf", 2, 4), torch.tensor([[True, True, True], [True, False, False]])
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    z, labels = torch.zeros(2, 3, 2), torch.zeros(2, 3, dtype=torch.int64)
    assert head.loss(z, labels, mask).item() == pytest.approx(2 * math.log(4))  # 4 tokens, 2 sentences
    assert head.count(mask) == 2


def test_words_tagged_words_and_names_are_right_as_a_whole():
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    truth = torch.tensor([[0, 2, 3, 0, 1, 2], [3, 3, 0, 2, 0, 0]])  # BE S BME | S S BE
    guess = torch.tensor([[0, 2, 3, 0, 2, 3], [3, 0, 1, 2, 0, 0]])  # BE S BE S | S BME
    starts = word_starts(guess), word_starts(truth)
    assert span_counts(starts, None, mask).tolist() == [[2, 4, 3], [1, 2, 3]]
    tags = torch.ones_like(guess), torch.ones_like(truth)
    tags[0][0, 2] = 2  # the second word has another tag
    assert span_counts(starts, tags, mask).tolist() == [[1, 4, 3], [1, 2, 3]]
    # O B-1 I-1 B-1 O O | O B-2 I-2 O, against a name that ends early and one of another kind
    true, found = torch.tensor([[0, 1, 2, 1, 0, 0], [0, 3, 4, 0, 0, 0]]), None
    found = torch.tensor([[0, 1, 0, 1, 0, 0], [0, 5, 6, 0, 0, 0]])
    (a, kinds_a), (b, kinds_b) = name_spans(found), name_spans(true)
    assert span_counts((a, b), (kinds_a, kinds_b), mask).tolist() == [[1, 2, 2], [0, 1, 1]]
    assert f1([1, 3, 3]) == pytest.approx(100 / 3)
    assert f1([0, 0, 0]) == 0


def test_the_corpus_becomes_labels_of_characters():
    lines = ["中国/ns  人民/n  。/w  江/nr  泽民/nr  说/v", "好/a"]
    ids = vocabulary(lines, 3)
    got = read_sentences(lines, 3, 64, ids)
    assert got.offsets.tolist() == [0, 5, 9, 10]
    batch = got.__getitems__([1, 2])
    assert batch["words"].tolist() == [[3, 0, 2, 3], [3, 0, 0, 0]]
    assert batch["names"].tolist() == [[1, 2, 2, 0], [0, 0, 0, 0]]  # surname and given name are one person
    assert batch["characters"][1].tolist()[1:] == [0, 0, 0]
    assert got.__getitems__([0])["names"].tolist() == [[3, 4, 0, 0, 0]]
    assert len(set(batch["tags"][0].tolist())) == 2
    with pytest.raises(ValueError, match="unknown tag 'xx'"):
        read_sentences(["字/xx"], 1, 64, ids)
    with pytest.raises(ValueError, match="has 3 such sentences, got 4"):
        read_sentences(lines, 4, 64, ids)


def test_data_are_a_function_of_the_seed_and_whole_words(data):
    train, _ = data
    lengths = train.offsets.diff()
    assert lengths.min() >= 1
    assert lengths.max() <= 24
    assert len(set(lengths.tolist())) > 5  # ragged
    last = train.fields["words"][train.offsets[1:] - 1]
    assert bool((last >= 2).all()), "a sentence ends with a whole word"


def test_counts_are_sentences_for_a_crf_and_tokens_for_the_others(data):
    taken = {}

    class Recorder(torch.nn.Module):
        def forward(self, z, heads, counts):
            taken.update(counts)
            return z().sum()

    batch = data[0].__getitems__(range(10))
    RECIPE.model(Recorder())(**batch)
    tokens = int((batch["characters"] != 0).sum())
    assert {task: int(count) for task, count in taken.items()} == {
        "words": 10,
        "tags": tokens,
        "names": tokens,
    }


@pytest.mark.parametrize("kind", ["crf", "memm", "bimemm", "softmax"])
def test_validation_sums_add_over_uneven_and_empty_parts(data, kind):
    torch.manual_seed(0)
    recipe = SequenceLabelling(kind, kind, kind, length=24, width=16, characters=300)
    balancer = Balancer(recipe.tasks, Equal())
    net, validation = recipe.model(balancer), data[1]
    batch = validation.__getitems__(range(len(validation)))
    net(**batch)
    net.eval()
    with torch.no_grad():
        expected = net(**batch)
        parts = [range(7), range(7, 7), range(7, 8), range(8, 23)]
        added = sum(net(**validation.__getitems__(part)) for part in parts)
    torch.testing.assert_close(added, expected, rtol=1e-5, atol=1e-5)
    row = eval_row(expected, recipe)
    for task, loss in balancer.report.losses.items():
        assert row[f"eval/loss/{task}"] == pytest.approx(loss, rel=1e-5)


def test_it_learns_words(data):
    torch.manual_seed(0)
    train, _ = data
    net = RECIPE.model(Balancer(RECIPE.tasks, InverseGradNorm()))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    score = partial(eval_row, recipe=RECIPE)
    batch = train.__getitems__(range(64))
    for _ in range(80):
        net(**batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        row = score(net.eval()(**batch))
    assert row["eval/words/f1"] > 80
    assert row["eval/tags/f1"] > 60


def test_what_is_wrong_is_refused():
    with pytest.raises(ValueError, match="words must be one of crf, memm, bimemm, softmax, got 'hmm'"):
        SequenceLabelling(words="hmm")
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        SequenceLabelling(layers=0)
