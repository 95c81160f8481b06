"""Initial and prior losses: against the losses' own definitions, streamed, merged, and over ranks."""

import functools
import math
import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from launcher import succeed
from torch import Tensor

from mtl_dist import sync
from mtl_dist.priors import (
    Binary,
    Categorical,
    MultiLabel,
    Priors,
    Regression,
    estimate_priors,
    synchronize,
)
from mtl_dist.stats import TaskStats
from mtl_dist.weighting import InitialLoss, PriorLoss

BCE = F.binary_cross_entropy_with_logits


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def class_labels(num, seed=0):
    """Unequal frequencies of 5 classes, class 3 never, with ignored ones."""
    pool = torch.tensor([0, 0, 0, 1, 1, 2, 4, -100])
    return pool[torch.randint(len(pool), (num,), generator=generator(seed))]


def rates(num, width, seed=0):
    return (torch.rand(num, width, generator=generator(seed)) < torch.linspace(0.1, 0.8, width)).double()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def multilabel_loss(logits, labels):
    """Mean BCE over the labels that are not -1."""
    given = labels != -1
    losses = BCE(logits.expand(labels.shape), labels.clamp(min=0), reduction="none")
    return losses[given].mean()


def cross_entropy(logits, labels, **options):
    return F.cross_entropy(logits.expand(len(labels), -1), labels, **options)


MISSING = torch.where(rates(60, 4, seed=5) > 0, torch.tensor(-1.0, dtype=torch.float64), rates(60, 4))
WEIGHT = [0.5, 2.0, 1.0, 3.0, 0.25]

# statistics, labels, number of constants the model predicts, loss of those constants
CASES = {
    "categorical": (Categorical(5), class_labels(80), 5, cross_entropy),
    "categorical, weighted": (
        Categorical(5, weight=WEIGHT),
        class_labels(80),
        5,
        functools.partial(cross_entropy, weight=torch.tensor(WEIGHT, dtype=torch.float64)),
    ),
    "categorical, smoothed": (
        Categorical(5, label_smoothing=0.1),
        class_labels(80),
        5,
        functools.partial(cross_entropy, label_smoothing=0.1),
    ),
    "categorical, weighted and smoothed, a class ignored": (
        Categorical(5, ignore_index=0, weight=WEIGHT, label_smoothing=0.3),
        class_labels(80).clamp(min=0),
        5,
        functools.partial(
            cross_entropy,
            ignore_index=0,
            label_smoothing=0.3,
            weight=torch.tensor(WEIGHT, dtype=torch.float64),
        ),
    ),
    "binary": (Binary(), rates(70, 1), 1, lambda c, y: BCE(c.expand(y.shape), y)),
    "binary, soft": (Binary(), rates(70, 1) * 0.6 + 0.2, 1, lambda c, y: BCE(c.expand(y.shape), y)),
    "multi-label": (MultiLabel(4), rates(60, 4), 4, lambda c, y: BCE(c.expand(y.shape), y)),
    "multi-label, missing": (MultiLabel(4, missing=-1), MISSING, 4, multilabel_loss),
    "regression": (Regression(), 3 + 2 * normal(50), 1, lambda c, y: F.mse_loss(c.expand(y.shape), y)),
    "regression, vector": (
        Regression(6),
        normal(50, 6) + torch.arange(6),
        6,
        lambda c, y: F.mse_loss(c.expand(y.shape), y),
    ),
    "regression, summed": (
        Regression(6, reduction="sum"),
        normal(50, 6) + torch.arange(6),
        6,
        lambda c, y: F.mse_loss(c.expand(y.shape), y, reduction="sum") / len(y),
    ),
}


def filled(statistics, *batches):
    statistics = statistics.empty()
    for batch in batches:
        statistics.update(batch)
    return statistics


@pytest.mark.parametrize("case", CASES)
def test_initial_loss_is_that_of_zero_outputs(case):
    statistics, labels, num_constants, loss = CASES[case]
    zero = torch.zeros(num_constants, dtype=torch.float64)
    expected = loss(zero, labels).item()
    assert filled(statistics, labels).initial_loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_prior_loss_is_that_of_the_best_constants(case):
    statistics, labels, num_constants, loss = CASES[case]
    constants = torch.zeros(num_constants, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [constants], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(constants, labels)
        value.backward()
        return value

    optimizer.step(closure)
    best = loss(constants, labels).item()
    prior = filled(statistics, labels).prior_loss
    # a class that never occurs has its best logit at minus infinity, so the optimiser ends a little above
    assert prior == pytest.approx(best, rel=1e-7)
    assert prior <= best + 1e-14
    assert prior < filled(statistics, labels).initial_loss


def test_textbook_values():
    assert filled(Categorical(4), torch.tensor([0, 1, 2, 3])).prior_loss == pytest.approx(math.log(4))
    assert filled(Categorical(4), torch.tensor([2, 2])).prior_loss == 0
    assert filled(Categorical(4), torch.tensor([2, 2])).initial_loss == pytest.approx(math.log(4))
    assert filled(Binary(), torch.tensor([True, False])).prior_loss == pytest.approx(math.log(2))
    targets = filled(Regression(), torch.tensor([1.0, 3.0]))
    assert (targets.initial_loss, targets.prior_loss) == (5, 1)
    vectors = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert filled(Regression(2), vectors).prior_loss == 2.5
    assert filled(Regression(2, reduction="sum"), vectors).prior_loss == 5


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("case", CASES)
def test_batches_equal_one_pass(case, batch_size):
    statistics, labels, _, _ = CASES[case]
    whole = filled(statistics, labels)
    streamed = filled(statistics, labels[:0], *labels.split(batch_size), labels[:0])
    assert streamed.count == whole.count
    assert streamed.initial_loss == pytest.approx(whole.initial_loss, rel=1e-12)
    assert streamed.prior_loss == pytest.approx(whole.prior_loss, rel=1e-12)


DTYPES = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
@pytest.mark.parametrize("statistics", [Categorical(2), Binary(), MultiLabel(1), Regression()])
def test_any_dtype(statistics, dtype):
    labels = torch.tensor([[0], [1], [1]])
    expected = filled(statistics, labels)
    assert filled(statistics, labels.to(dtype)).prior_loss == expected.prior_loss


def test_every_element_is_a_label_where_the_loss_says_so():
    mask = class_labels(60).reshape(3, 4, 5)
    assert filled(Categorical(5), mask).prior_loss == filled(Categorical(5), mask.flatten()).prior_loss
    ones = rates(6, 4)
    assert filled(Binary(), ones).prior_loss == filled(Binary(), ones.flatten()).prior_loss
    assert filled(MultiLabel(4), ones.reshape(2, 3, 4)).prior_loss == filled(MultiLabel(4), ones).prior_loss
    images = normal(5, 2, 3)
    assert filled(Regression(6), images).prior_loss == filled(Regression(6), images.flatten(1)).prior_loss


@pytest.mark.parametrize("missing", [-1.0, math.nan])
def test_missing_labels_of_one_logit(missing):
    labels = torch.tensor([1.0, missing, 0.0, 1.0])
    assert (
        filled(Binary(missing=missing), labels).prior_loss == filled(Binary(), labels[[0, 2, 3]]).prior_loss
    )


def test_a_label_never_given_has_no_part():
    labels = torch.tensor([[1.0, -1.0], [0.0, -1.0]])
    assert filled(MultiLabel(2, missing=-1), labels).prior_loss == pytest.approx(math.log(2))


@pytest.mark.parametrize("statistics", [Categorical(4), Binary(), MultiLabel(2), Regression(2)])
def test_update_never_waits_for_the_device(statistics):
    labels = torch.zeros(3, 2, device="meta")  # has no values: whoever reads one raises
    with pytest.raises(RuntimeError):
        labels.max().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.bincount(labels.flatten().long())
    filled(statistics, labels, labels)


# numerics


@pytest.mark.parametrize("batch_size", [1, 3, 256, 10_000])
def test_variance_of_a_large_mean(batch_size):
    targets = 1e8 + normal(10_000)
    expected = (targets - 1e8).var(unbiased=False).item()
    assert filled(Regression(), *targets.split(batch_size)).prior_loss == pytest.approx(expected, rel=1e-6)


def test_variance_of_a_large_mean_merged_unequally():
    targets = 1e8 + normal(10_000)
    expected = (targets - 1e8).var(unbiased=False).item()
    parts = [filled(Regression(), part) for part in targets.split([1, 9, 0, 9000, 90, 900])]
    assert functools.reduce(operator.add, parts).prior_loss == pytest.approx(expected, rel=1e-6)
    assert functools.reduce(operator.add, parts[::-1]).prior_loss == pytest.approx(expected, rel=1e-6)


floats = st.floats(-1e3, 1e3, allow_subnormal=False)


@st.composite
def three_parts(draw):
    """Statistics of three lists of labels of one loss, some empty, and those of all labels."""
    statistics, elements = draw(
        st.sampled_from(
            [
                (Categorical(4, weight=[1, 2, 0.5, 1], label_smoothing=0.1), st.integers(0, 3)),
                (Binary(missing=-1), st.sampled_from([-1, 0, 1])),
                (MultiLabel(1), st.integers(0, 1)),
                (Regression(), floats),
            ]
        )
    )
    lists = [draw(st.lists(elements, max_size=6)) for _ in range(3)]
    tensors = [torch.tensor(values, dtype=torch.float64).unsqueeze(1) for values in lists]
    return [filled(statistics, tensor) for tensor in tensors], filled(statistics, torch.cat(tensors))


@settings(max_examples=150, deadline=None)
@given(three_parts())
def test_merging_is_associative_commutative_and_equals_one_pass(parts_and_whole):
    (a, b, c), whole = parts_and_whole
    for merged in ((a + b) + c, a + (b + c), (c + a) + b, whole.empty() + whole):
        assert merged.count == whole.count
        if whole.count:
            scale = max(1.0, whole.initial_loss)
            assert merged.initial_loss == pytest.approx(whole.initial_loss, rel=1e-12)
            # a variance far below E y² is right to that scale's rounding
            assert merged.prior_loss == pytest.approx(whole.prior_loss, rel=1e-12, abs=1e-14 * scale)


def test_adding_leaves_both_as_they_were():
    a, b = filled(Regression(), torch.tensor([1.0])), filled(Regression(), torch.tensor([3.0]))
    assert (a + b).prior_loss == 1
    assert (a.prior_loss, b.prior_loss, a.count, b.count) == (0, 0, 1, 1)


def test_one_process_synchronises_with_itself():
    statistics = filled(Regression(2), normal(5, 2))
    alone = statistics.synchronize()
    assert alone is not statistics
    assert alone.prior_loss == pytest.approx(statistics.prior_loss, rel=1e-15)
    assert alone.synchronize().count == statistics.count


# errors


@pytest.mark.parametrize("statistics", [Categorical(3), Binary(), MultiLabel(2), Regression()])
@pytest.mark.parametrize("loss", ["initial_loss", "prior_loss"])
def test_no_labels(statistics, loss):
    empty = filled(statistics, torch.zeros(0, 2))
    with pytest.raises(ValueError, match="no labels yet"):
        getattr(empty, loss)


@pytest.mark.parametrize(
    ("statistics", "labels", "message"),
    [
        (Categorical(3), [0, 3, 3, 1], r"0 to 2 or ignore_index -100; 2 of 4 are not, and their mean is 3$"),
        (Categorical(3), [0, -1], r"1 of 2 are not, and their mean is -1$"),
        (Categorical(3), [0.0, 1.5], r"1 of 2 are not, and their mean is 1.5$"),
        (Categorical(3), [0.0, math.nan], r"their mean is nan$"),
        (Categorical(3), [0.0, math.inf], r"their mean is inf$"),
        (Binary(), [0, 2], r"from 0 to 1; 1 of 2 are not, and their mean is 2$"),
        (Binary(), [0, -1], r"their mean is -1$"),
        (Binary(missing=-1), [0, math.nan], r"or missing \(-1\); 1 of 2 are not, and their mean is nan$"),
        (MultiLabel(1, missing=math.nan), [[0], [-1]], r"or missing \(nan\); 1 of 2"),
        (Regression(), [0.0, math.nan], r"must be finite; 1 of 2 are not, and their mean is nan$"),
        (Regression(), [0.0, -math.inf], r"their mean is -inf$"),
    ],
)
def test_labels_out_of_range(statistics, labels, message):
    seen = filled(statistics, torch.tensor(labels))
    for read in (lambda: seen.initial_loss, lambda: seen.prior_loss):
        with pytest.raises(ValueError, match=message) as error:
            read()
        assert repr(statistics) in str(error.value)
    with pytest.raises(ValueError, match="are not"):
        _ = (seen + statistics.empty()).prior_loss


@pytest.mark.parametrize(
    ("statistics", "shape"),
    [
        (Regression(), (4, 2)),
        (Regression(6), (6,)),
        (Regression(), ()),
        (MultiLabel(3), (3, 4)),
        (MultiLabel(1), ()),
    ],
)
def test_labels_of_a_wrong_shape(statistics, shape):
    with pytest.raises(ValueError, match=r"takes labels") as error:
        filled(statistics, torch.zeros(shape))
    assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Categorical(1), "num_classes must be at least 2, got 1"),
        (lambda: Categorical(3, weight=[1, 2]), r"3 finite numbers >= 0, got \(1.0, 2.0\)"),
        (lambda: Categorical(2, weight=[1, -2]), r"got \(1.0, -2.0\)"),
        (lambda: Categorical(2, weight=[1, math.nan]), "finite numbers"),
        (lambda: Categorical(2, label_smoothing=1.5), r"label_smoothing must be in \[0, 1\], got 1.5"),
        (lambda: Regression(0), "size must be at least 1, got 0"),
        (lambda: Regression(reduction="median"), "got 'median'"),
        (lambda: MultiLabel(0), "num_labels must be at least 1, got 0"),
        (lambda: Binary(missing=0), r"missing must be outside \[0, 1\]"),
    ],
)
def test_fields_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_classes_of_weight_zero_only():
    seen = filled(Categorical(3, weight=[0, 1, 1]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="every label seen has class weight 0"):
        _ = seen.prior_loss


def test_statistics_of_different_losses_do_not_add():
    with pytest.raises(ValueError, match=r"num_classes=3.*num_classes=4"):
        _ = Categorical(3) + Categorical(4)


# one pass over a loader


def batches():
    """Digits and their sums; the second batch has no sums, the third no digits."""
    digits, sums = torch.tensor([0, 1, 1, 2]), torch.tensor([0.0, 5.0, 7.0, 12.0])
    return [{"digit": digits, "sum": sums}, {"digit": digits, "sum": None}, {"sum": sums}]


def test_estimate_priors():
    losses = {"digit": Categorical(3), "sum": Regression()}
    priors = estimate_priors(batches(), losses, labels=lambda batch: batch)
    assert priors.counts == {"digit": 8, "sum": 8}
    assert priors.initial == {"digit": pytest.approx(math.log(3)), "sum": pytest.approx(218 / 4)}
    assert priors.prior == {"digit": pytest.approx(1.5 * math.log(2)), "sum": pytest.approx(218 / 4 - 36)}
    assert losses["digit"].count == 0  # definitions are not filled


def test_estimate_priors_over_a_data_loader():
    digits = class_labels(50).clamp(min=0)
    data = torch.utils.data.TensorDataset(digits, digits * 2.0)
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    losses = {"digit": Categorical(5), "double": Regression()}
    priors = estimate_priors(loader, losses, labels=lambda batch: {"digit": batch[0], "double": batch[1]})
    assert priors.prior["double"] == pytest.approx(4 * digits.double().var(unbiased=False).item(), rel=1e-12)
    assert priors.prior["digit"] == filled(Categorical(5), digits).prior_loss


def test_estimate_priors_names_the_task_in_errors():
    losses = {"digit": Categorical(2), "sum": Regression()}
    with pytest.raises(ValueError, match=r"task 'digit': Categorical.*2 of 8"):
        estimate_priors(batches(), losses, labels=lambda batch: batch)
    losses = {"digit": Categorical(3), "sum": Regression(), "other": Binary()}
    with pytest.raises(ValueError, match=r"task 'other': .*no labels yet"):
        estimate_priors(batches(), losses, labels=lambda batch: batch)
    with pytest.raises(ValueError, match=r"got labels for 'sum'; the tasks are \['digit'\]"):
        estimate_priors(batches(), {"digit": Categorical(3)}, labels=lambda batch: batch)
    with pytest.raises(ValueError, match="at least one task"):
        estimate_priors(batches(), {}, labels=lambda batch: batch)


def test_priors_are_plain_mappings_of_floats():
    priors = Priors.of({"sum": filled(Regression(), torch.tensor([1.0, 3.0]))})
    assert priors == Priors(initial={"sum": 5.0}, prior={"sum": 1.0}, counts={"sum": 2})
    assert all(type(value) is float for value in (*priors.initial.values(), *priors.prior.values()))


def test_the_rules_take_them():
    priors = estimate_priors(batches(), {"sum": Regression(), "digit": Categorical(3)}, labels=lambda b: b)
    for rule, losses in (
        (InitialLoss(losses=priors.initial), priors.initial),
        (PriorLoss(losses=priors.prior), priors.prior),
    ):
        stats = TaskStats(torch.ones(2).double(), torch.ones(2).bool(), None, torch.ones(2).double())
        weights, _ = rule.update(stats, rule.init(["digit", "sum"], torch.device("cpu")))
        assert weights.tolist() == pytest.approx([1 / losses["digit"], 1 / losses["sum"]], rel=1e-12)


def test_the_comparison_of_ranks_has_a_fixed_size(monkeypatch):
    """Ranks with unlike tasks must meet in buffers of one size; what they then say, real processes test."""
    shapes: list[list[torch.Size]] = []
    for module in ("_agreement", "_base"):
        monkeypatch.setattr(
            f"mtl_dist.priors.{module}.all_reduce_sum",
            lambda tensor, group: shapes[-1].append(tensor.shape) or tensor,
        )
    for losses in ({"digit": Categorical(3)}, {"digit": Categorical(400), "sum": Regression(7)}):
        shapes.append([])
        synchronize(losses)
    assert [len(one) for one in shapes] == [3, 3]
    assert shapes[0][0] == shapes[1][0]
    assert shapes[0][1] != shapes[1][1]


@pytest.mark.parametrize(
    ("config", "device"), [("cuda:nccl", "cuda"), ("cpu:gloo,cuda:nccl", "cpu"), ("cpu:gloo", "cpu")]
)
def test_sums_travel_on_a_device_that_the_backend_takes(monkeypatch, config, device):
    monkeypatch.setattr(sync.collectives, "is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: config)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    assert sync.collective_device(None) == torch.device(device)


# real processes


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one_process(world_size):
    printed = succeed("priors_ranks.py", world_size)
    assert printed.count("all checks passed") == world_size
