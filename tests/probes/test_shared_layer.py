"""SharedLayerProbe against explicit autograd, on one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from explicit import gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtl_dist import Balancer, FeatureProbe, FeatureTap, SharedLayerProbe
from mtl_dist.probes import Probe
from mtl_dist.probes.shared_layer.kernel import _of_pairs
from mtl_dist.probes.shared_layer.products import grouped_products
from mtl_dist.weighting import MGDA, GeometricMean, InverseGradNorm, Rule

TASKS = ("a", "b", "c")
EXACT = SharedLayerProbe(form="exact")
KERNEL = SharedLayerProbe(form="kernel")
AGAIN = SharedLayerProbe(reevaluate=True)
FORMS = [EXACT, KERNEL, AGAIN]

Heads = dict[str, Callable[[Tensor], Tensor]]


def heads_for(z: Tensor) -> Heads:
    """Three losses of different scale, of any output."""
    generator = torch.Generator().manual_seed(5)
    targets = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z.dtype) for _ in TASKS]
    return {
        task: (lambda z, t=t, i=i: 10**i * (z.tanh() - t).square().mean())
        for i, (task, t) in enumerate(zip(TASKS, targets, strict=True))
    }


def weights(*shape: int) -> dict[str, Tensor]:
    return {task: torch.randn(shape) for task in TASKS}


def explicit(layer: nn.Module, x: Tensor, heads: Heads, *, bias: bool = False) -> Tensor:
    """`[n, n]` Gram of the weight's gradients, a backward a task."""
    parameters = [p for name, p in layer.named_parameters() if name == "weight" or bias]
    rows = []
    for head in heads.values():
        found = torch.autograd.grad(head(layer(x)), parameters)
        rows.append(torch.cat([g.flatten() for g in found]).double())
    matrix = torch.stack(rows)
    return matrix @ matrix.T


def measured(probe: Probe, layer: nn.Module, x: Tensor, heads: Heads, rule: Rule | None = None) -> Balancer:
    balancer = Balancer(list(heads), rule or MGDA(), probe=probe)
    balancer(x, heads, layer=layer).backward()
    return balancer


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    norms = expected.diagonal().sqrt()
    error = ((got - expected).abs() / torch.outer(norms, norms)).max()
    assert error <= tolerance, f"relative to the norms, off by {error:.1e}"


LAYERS = {
    "linear": (nn.Linear(7, 5), (6, 7)),
    "linear, more rows than inputs": (nn.Linear(7, 5), (50, 7)),
    "linear, tokens": (nn.Linear(7, 5), (3, 4, 7)),
    "linear, no sample": (nn.Linear(7, 5), (1, 7)),
    "conv1d, stride, dilation": (nn.Conv1d(3, 4, 3, stride=2, dilation=2, padding=3), (2, 3, 11)),
    "conv2d": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 5)),
    "conv2d, same, circular": (
        nn.Conv2d(3, 4, (2, 3), padding="same", padding_mode="circular"),
        (2, 3, 6, 5),
    ),
    "conv2d, same": (nn.Conv2d(3, 4, 3, padding="same", dilation=(1, 2)), (2, 3, 6, 5)),
    "conv2d, valid, groups": (nn.Conv2d(4, 6, 2, padding="valid", groups=2), (3, 4, 5, 5)),
    "conv2d, depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (3, 4, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2, padding=(1, 0, 1), padding_mode="reflect"), (2, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("probe", FORMS, ids=repr)
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_gram_of_the_weights_gradients(name: str, probe: SharedLayerProbe, bias: bool) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    heads = heads_for(layer(x))
    balancer = measured(replace(probe, bias=bias), layer, x, heads)
    close(balancer.report.stats.gram, explicit(layer, x, heads, bias=bias))


@pytest.mark.parametrize("probe", FORMS, ids=repr)
def test_to_the_last_digits_in_float64(probe: SharedLayerProbe) -> None:
    layer = nn.Linear(40, 9).double()
    x = torch.randn(30, 40, dtype=torch.float64)
    heads = heads_for(layer(x))
    close(measured(probe, layer, x, heads).report.stats.gram, explicit(layer, x, heads), 1e-13)


# of 400 draws the largest error was 8e-5, and with the kernel 3e-4: rounding errors of its QR decomposition
# in float32, some units of 6e-8, stand beside a mean that is 1e-3 of the samples
@pytest.mark.parametrize(("probe", "bound"), [(EXACT, 2e-4), (AGAIN, 2e-4), (KERNEL, 6e-4)], ids=repr)
@pytest.mark.parametrize("seed", range(4))
def test_cancelling_samples_keep_their_digits(probe: SharedLayerProbe, bound: float, seed: int) -> None:
    """The mean gradient is 1e-3 of the samples': products of pairs of rows would lose 6 digits."""
    torch.manual_seed(seed)
    layer = nn.Linear(64, 9)
    half = torch.randn(16, 64)
    x = torch.cat([half, half])
    sign = torch.cat([torch.ones(16, 1), -torch.ones(16, 1) + 1e-3])
    heads = {t: (lambda z, w=w: (z * w.repeat(2, 1) * sign).sum()) for t, w in weights(16, 9).items()}
    got = measured(probe, layer, x, heads).report.stats.gram
    close(got, explicit(nn.Linear(64, 9).double(), x.double(), heads), bound)
    assert torch.linalg.eigvalsh(got)[0] >= -1e-12 * got.trace()


@pytest.mark.parametrize("probe", FORMS, ids=repr)
def test_gradient_is_that_of_the_weighted_total(probe: SharedLayerProbe) -> None:
    torch.manual_seed(0)
    trunk, layer, head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 6)
    model, x = nn.ModuleList([trunk, layer, head]), torch.randn(10, 5)
    heads = {t: (lambda z, f=f: f(head(z))) for t, f in heads_for(torch.zeros(10, 6)).items()}
    balancer = measured(probe, layer, trunk(x), heads)
    got, weights = gradients(model), balancer.report.weights
    model.zero_grad()
    z = layer(trunk(x))
    sum(weights[t] * f(z) for t, f in heads.items()).backward()
    for name, expected in gradients(model).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_all_forms_choose_the_same_weights_and_auto_is_one_of_them() -> None:
    layer, x = nn.Linear(30, 20), torch.randn(8, 30)
    heads = heads_for(layer(x))
    weights = [measured(p, layer, x, heads).report.weight_vector for p in (*FORMS, SharedLayerProbe())]
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("probe", [FeatureProbe(), FeatureTap()], ids=repr)
def test_other_probes_take_the_layer_as_part_of_the_trunk(probe: Probe) -> None:
    layer, x = nn.Linear(7, 5), torch.randn(6, 7)
    heads = heads_for(layer(x))
    plain = Balancer(TASKS, MGDA(), probe=probe)
    plain(layer(x), heads).backward()
    through = measured(probe, layer, x, heads)
    assert torch.equal(plain.report.stats.gram, through.report.stats.gram)


def test_in_eval_mode_and_for_rules_of_losses_the_layer_is_applied() -> None:
    layer, x = nn.Linear(7, 5), torch.randn(6, 7)
    heads = heads_for(layer(x))
    mean = sum(f(layer(x)) for f in heads.values()) / 3
    balancer = Balancer(TASKS, MGDA(), probe=SharedLayerProbe()).eval()
    torch.testing.assert_close(balancer(x, heads, layer=layer), mean)
    losses_only = Balancer(TASKS, GeometricMean())
    losses_only(x, heads, layer=layer).backward()
    assert losses_only.report.stats.gram is None
    assert layer.weight.grad is not None


def test_a_probe_beside_a_rule_of_losses_reports() -> None:
    layer, x = nn.Linear(7, 5), torch.randn(6, 7)
    heads = heads_for(layer(x))
    balancer = measured(SharedLayerProbe(), layer, x, heads, GeometricMean())
    norms = explicit(layer, x, heads).diagonal().sqrt().tolist()
    assert list(balancer.report.grad_norms.values()) == pytest.approx(norms, rel=1e-5)


def test_a_shared_output_head() -> None:
    """One function for all tasks, and every task reads its own part of the logits."""
    head, hidden = nn.Linear(16, 11, bias=False), torch.randn(4, 6, 16)
    labels = torch.randint(0, 11, (4, 6))

    def losses(logits: Tensor) -> dict[str, Tensor]:
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(4, 6)
        return {"a": each[:2].mean(), "b": each[2:3].mean(), "c": each.mean()}

    balancer = Balancer(TASKS, MGDA(), probe=SharedLayerProbe())
    balancer(hidden, losses, layer=head).backward()
    separate = {t: (lambda z, t=t: losses(z)[t]) for t in TASKS}
    close(balancer.report.stats.gram, explicit(head, hidden, separate))


@pytest.mark.parametrize("probe", FORMS, ids=repr)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_trunk(probe: SharedLayerProbe, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    trunk, layer = nn.Linear(5, 8), nn.Linear(8, 6)
    x = torch.randn(10, 5, requires_grad=True)
    heads = heads_for(layer(trunk(x)))
    plain = measured(probe, layer, trunk(x), heads)
    saved = measured(probe, layer, checkpoint(trunk, x, use_reentrant=use_reentrant), heads)
    assert plain.report.weights == saved.report.weights


def test_compiled_as_a_whole() -> None:
    heads = heads_for(torch.zeros(10, 6))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.balancer = Balancer(TASKS, MGDA(), probe=SharedLayerProbe())
            self.trunk, self.layer = nn.Linear(5, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.balancer(self.trunk(x).tanh(), heads, layer=self.layer)

    x, plain, compiled = torch.randn(10, 5), Net(), Net()
    plain(x).backward()
    torch.compile(compiled, backend="aot_eager")(x).backward()
    assert compiled.balancer.report.weights == pytest.approx(plain.balancer.report.weights, rel=1e-5)
    for name, expected in gradients(plain).items():
        torch.testing.assert_close(gradients(compiled)[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("probe", FORMS, ids=repr)
def test_autocast_and_bfloat16_are_measured_in_float32(probe: SharedLayerProbe) -> None:
    layer, x = nn.Linear(33, 21), torch.randn(16, 33)
    factors = weights(16, 21)
    heads = {t: (lambda z, w=w: (z.float() * w).sum()) for t, w in factors.items()}
    balancer = Balancer(TASKS, MGDA(), probe=probe)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        balancer(x, heads, layer=layer).backward()
    rows = torch.stack([(w.bfloat16().double().T @ x.double()).flatten() for w in factors.values()])
    close(balancer.report.stats.gram, rows @ rows.T, 1e-6)


@pytest.mark.parametrize("scale", [1e-18, 1e12])
@pytest.mark.parametrize("probe", FORMS, ids=repr)
def test_any_scale_of_the_losses(probe: SharedLayerProbe, scale: float) -> None:
    layer, x = nn.Linear(7, 5), torch.randn(6, 7)
    heads = heads_for(layer(x))
    scaled = {t: (lambda z, f=f: scale * f(z)) for t, f in heads.items()}
    close(measured(probe, layer, x, scaled).report.stats.gram / scale**2, explicit(layer, x, heads), 1e-5)


@pytest.mark.parametrize("case", ["layers", "sizes"])
def test_sketch_is_unbiased_and_within_its_bound(case: str) -> None:
    """Over dimensions, batch sizes and sketch sizes; every step of a balancer draws anew."""
    cells = (
        [(24, 40, 5, 64), (64, 64, 40, 64), (10, 300, 1, 64)]
        if case == "layers"
        else [(32, 32, 8, m) for m in (16, 100, 400)]
    )
    for d_out, d_in, batch, size in cells:
        layer, x = nn.Linear(d_in, d_out), torch.randn(batch, d_in)
        heads = heads_for(layer(x))
        exact = explicit(layer, x, heads)
        norms = exact.diagonal().sqrt()
        balancer = Balancer(TASKS, InverseGradNorm(), probe=SharedLayerProbe(sketch=size))
        errors = []
        for _ in range(80):
            balancer(x, heads, layer=layer)
            errors.append((balancer.report.stats.gram - exact) / torch.outer(norms, norms))
        errors = torch.stack(errors)
        bound = math.sqrt(2 / size)
        assert errors.mean(0).abs().max() < 4 * bound / math.sqrt(len(errors)), (d_out, d_in, batch, size)
        assert errors.square().mean(0).sqrt().max() < 1.2 * bound, (d_out, d_in, batch, size)
        assert errors.std(0).max() > 0.1 * bound, "the draws do not differ"


def test_a_sketch_longer_than_the_layer_is_not_taken() -> None:
    layer, x = nn.Linear(7, 5), torch.randn(6, 7)
    heads = heads_for(layer(x))
    close(measured(SharedLayerProbe(sketch=35), layer, x, heads).report.stats.gram, explicit(layer, x, heads))


@pytest.mark.parametrize("num_rows", [0, 1, 31, 32, 33, 200])
@pytest.mark.parametrize("num_tasks", [1, 3, 64])
def test_products_grouped_by_task(num_rows: int, num_tasks: int) -> None:
    left, right = torch.randn(num_rows, 2, 3), torch.randn(num_rows, 2, 4)
    tasks = torch.randint(0, max(1, num_tasks - 1), (num_rows,))  # the last of several is absent
    got = grouped_products(left, right, tasks, num_tasks)
    for task in range(num_tasks):
        own = tasks == task
        torch.testing.assert_close(got[task], torch.einsum("rgo,rgd->god", left[own], right[own]))


def test_what_it_cannot_measure_is_refused() -> None:
    x = torch.randn(6, 7)
    with pytest.raises(ValueError, match="SharedLayerProbe needs the last shared layer"):
        Balancer(TASKS, MGDA(), probe=SharedLayerProbe())(x.requires_grad_(), heads_for(x))
    layer = nn.Sequential(nn.Linear(7, 5), nn.ReLU())
    with pytest.raises(TypeError, match=r"measures nn\.Linear and nn\.Conv1d/2d/3d, without activation"):
        measured(SharedLayerProbe(), layer, x, heads_for(torch.zeros(6, 5)))
    with pytest.raises(ValueError, match="sketch must be None or at least 1, got 0"):
        SharedLayerProbe(sketch=0)
    with pytest.raises(ValueError, match='form must be "auto", "exact" or "kernel", got \'fast\''):
        SharedLayerProbe(form="fast")


@pytest.mark.parametrize("probe", FORMS, ids=repr)
def test_a_bad_gradient_names_its_task(probe: SharedLayerProbe) -> None:
    layer, x = nn.Linear(7, 5), torch.randn(6, 7)
    heads = {**heads_for(layer(x)), "b": lambda z: (0 * z).sqrt().sum() + 1}
    with pytest.raises(ValueError, match="NaN or infinite: task 'b' on rank 0"):
        measured(probe, layer, x, heads)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8, 13])
def test_the_triangle_in_steps_of_any_width(num_rows: int) -> None:
    layer = nn.Linear(16, 3)
    x = torch.randn(num_rows, 16)
    heads = heads_for(layer(x))
    close(measured(KERNEL, layer, x, heads).report.stats.gram, explicit(layer, x, heads))


def test_pairs_some_columns_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    tasks = torch.arange(9) % 3
    monkeypatch.setattr("mtl_dist.probes.shared_layer.kernel.BLOCK", 9 * 4)  # 4 columns, then 2
    rows = torch.stack([x[tasks == i].T @ g[tasks == i] for i in range(3)]).flatten(1)
    halves = [_of_pairs(x, g, tasks, 3, slice(rank, None, 2)) for rank in range(2)]
    torch.testing.assert_close(sum(halves), rows @ rows.T)


def test_a_bad_sample_of_one_task_leaves_the_products_of_the_others() -> None:
    x, g = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    tasks = torch.arange(9) % 3
    good = _of_pairs(x, g, tasks, 3, slice(None))
    g[1, 2] = math.nan
    bad = _of_pairs(x, g, tasks, 3, slice(None))
    kept = torch.tensor([0, 2])
    assert torch.equal(bad[kept][:, kept], good[kept][:, kept])
    assert bad.isfinite().all(), "the task itself is known to be faulty"
