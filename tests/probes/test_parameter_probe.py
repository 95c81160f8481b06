"""ParameterProbe against plain autograd over all shared parameters, on one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from explicit import gradients
from problem import SCENARIOS, TASKS, Net, global_batch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtl_dist import Balancer, FeatureProbe, FeatureTap, ParameterProbe
from mtl_dist.probes.parameter.rows import Trunk, Weighing, parameter_rows
from mtl_dist.probes.parameter.segments import bucket_size, plan, variable
from mtl_dist.weighting import MGDA, Equal, GeometricMean, InverseGradNorm

NAMES = ("a", "b", "c")
WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class UNet(nn.Module):
    """Skip connections over everything: no narrow place but at the ends."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(6 if i == 0 else WIDTH, WIDTH) for i in range(3))
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = layer(x).tanh()
            skips.append(x)
        for layer in self.up:
            x = layer(x).tanh() + skips.pop()
        return x


class Tied(nn.Module):
    """One layer three times, with another between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.other = (
            nn.Linear(6, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.first(x)).tanh()).tanh()
        return self.twice(self.other(x).tanh())


class Towers(nn.Module):
    """Two towers and a feature from halfway up one of them: a pytree."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList([nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.right = nn.Sequential(nn.Linear(6, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        half = self.left[0](x).tanh()
        return {"half": half, "left": self.left[1](half), "right": self.right(x)}


def conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(48, WIDTH),
    )  # fmt: skip


TRUNKS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, WIDTH), nn.Tanh()),
    "residual": lambda: nn.Sequential(nn.Linear(6, WIDTH), *(Block() for _ in range(3))),
    "unet": UNet,
    "tied": Tied,
    "towers": Towers,
    "conv": conv,
}


class Model(nn.Module):
    def __init__(self, trunk: nn.Module, balancer: Balancer, *, lazy: bool = False) -> None:
        super().__init__()
        self.trunk, self.balancer, self.lazy = trunk, balancer, lazy
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in NAMES)

    def tasks(self) -> dict[str, Callable]:
        def loss(i: int, z: Tensor | dict[str, Tensor]) -> Tensor:
            z = z if isinstance(z, Tensor) else z["half"] * z["left"] + i * z["right"]
            return 10**i * (self.heads[i](z) + i).square().mean()

        return {name: (lambda z, i=i: loss(i, z)) for i, name in enumerate(NAMES)}

    def forward(self, x: Tensor) -> Tensor:
        return self.balancer((lambda: self.trunk(x)) if self.lazy else self.trunk(x), self.tasks())


def model(trunk: str = "residual", probe: ParameterProbe | None = None, **options: object) -> Model:
    torch.manual_seed(0)
    rule = options.pop("rule", MGDA())
    return Model(TRUNKS[trunk](), Balancer(NAMES, rule, probe=probe or ParameterProbe()), **options)


def inputs() -> Tensor:
    return torch.randn(10, 6, generator=torch.Generator().manual_seed(1))


def explicit(net: Model, x: Tensor, parameters: list[Tensor] | None = None) -> Tensor:
    """The Gram by one full backward a task."""
    wanted = list(net.trunk.parameters()) if parameters is None else parameters
    z = net.trunk(x)
    rows = []
    for head in net.tasks().values():
        found = torch.autograd.grad(head(z), wanted, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(found, wanted, strict=True)
                ]
            )
        )
    matrix = torch.stack(rows).double()
    return matrix @ matrix.T


def error(got: Tensor | None, expected: Tensor) -> float:
    """Largest error of an inner product, per product of the two norms."""
    assert got is not None
    norms = expected.diagonal().sqrt()
    return float(((got - expected) / torch.outer(norms, norms)).abs().max())


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("bucket", [1, 300, 1 << 22])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_gram_equals_explicit_autograd(trunk: str, bucket: int, lazy: bool) -> None:
    net = model(trunk, ParameterProbe(bucket=bucket, reevaluate=lazy), lazy=lazy)
    expected = explicit(net, inputs())
    net(inputs()).backward()
    assert error(net.balancer.report.stats.gram, expected) < 1e-6
    weights = net.balancer.report.weights
    got = gradients(net)
    net.zero_grad()
    z = net.trunk(inputs())
    sum(weights[name] * head(z) for name, head in net.tasks().items()).backward()
    largest = max(g.abs().max() for g in gradients(net).values()).item()
    for name, gradient in gradients(net).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_of_the_distributed_problem(scenario: str) -> None:
    torch.manual_seed(7)
    net = Net(Balancer(TASKS, InverseGradNorm(), probe=ParameterProbe(bucket=50)))
    for step in range(3):
        batch = global_batch(step, scenario)
        z = net.trunk(batch.inputs)
        wanted = list(net.trunk.parameters())
        rows = []
        for i in range(len(TASKS)):
            loss = net._head(i, batch)(z)
            found = (
                [torch.zeros_like(p) for p in wanted]
                if loss is None
                else torch.autograd.grad(loss, wanted, retain_graph=True)
            )
            rows.append(torch.cat([g.flatten() for g in found]))
        matrix = torch.stack(rows).double()
        expected = matrix @ matrix.T
        net(batch).backward()
        got = net.balancer.report.stats.gram
        norms = expected.diagonal().sqrt().clamp(min=1e-30)
        assert float(((got - expected) / torch.outer(norms, norms)).abs().max()) < 1e-6


@pytest.mark.parametrize("trunk", ["chain", "residual"])
def test_a_graph_with_narrow_places_is_traversed_once_a_task_and_bucket_by_bucket(trunk: str) -> None:
    x, bucket = inputs(), 500
    net = model(trunk)
    z = net.trunk(x)
    visits: list[str] = []
    pending, seen = [z.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if not hasattr(node, "variable"):
            node.register_hook(lambda *_, node=node: visits.append(node.name()))
        pending.extend(child for child, _ in node.next_functions)
    nodes = sum(not hasattr(node, "variable") for node in seen)
    seeds = [[torch.randn_like(z)] for _ in NAMES]
    shared = Trunk.below((z,), lambda _: True, bucket)
    weighing = Weighing(torch.ones(3), torch.ones(3))
    widths = [rows.shape for rows in parameter_rows([shared] * 3, seeds, weighing)]
    largest = max(p.numel() for p in net.trunk.parameters())
    assert sum(width for _, width in widths) == sum(p.numel() for p in net.trunk.parameters())
    assert max(width for _, width in widths) <= max(bucket, largest)
    assert len(visits) == len(NAMES) * nodes or trunk == "residual"
    # a residual block is one piece, of more parameters than the bucket: some nodes are visited once more
    assert len(visits) < 2 * len(NAMES) * nodes


def test_a_large_trunk_is_traversed_once_a_task() -> None:
    """A bucket of fixed size is less than a layer, whose graph each of its parameters traverses again."""
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(1024, 8, 4096, batch_first=True, norm_first=True, dropout=0.0)
        trunk = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)
        z = trunk(torch.randn(2, 3, 1024))
    total = sum(p.numel() for p in trunk.parameters())
    for bucket, split in ((None, False), (1 << 22, True)):
        segments = plan((z,), lambda _: True, bucket).segments
        assert any(len(segment.groups) > 1 for segment in segments) == split
        groups = [group for segment in segments for group in segment.groups]
        sizes = [sum(variable(leaf).numel() for leaf in group) for group in groups]
        assert sum(sizes) == total
        assert max(sizes) <= (total / 8 if bucket is None else 1 << 22)
    assert [bucket_size(sizes) for sizes in ([], [1 << 23], [1 << 30])] == [1 << 22, 1 << 22, 1 << 27]


def test_blocks_are_segments() -> None:
    net = model("residual")
    block = sum(p.numel() for p in net.trunk[1].parameters())
    assert len(plan([net.trunk(inputs())], lambda _: True, block).segments) == 4
    assert len(plan([net.trunk(inputs())], lambda _: True, 1 << 22).segments) == 1


def test_dropout_and_batch_statistics_as_if_the_trunk_were_evaluated_once() -> None:
    x = inputs()
    results = []
    for lazy in (False, True):
        net = model("conv", ParameterProbe(reevaluate=lazy), lazy=lazy, rule=Equal())
        net.trunk.append(nn.Dropout(0.5))
        torch.manual_seed(5)
        net(x).backward()
        results.append(
            (gradients(net), dict(net.named_buffers()), net.balancer.report.stats.gram, torch.rand(2))
        )
    (grads, buffers, gram, after), (grads2, buffers2, gram2, after2) = results
    assert torch.equal(after, after2)
    assert error(gram2, gram) < 1e-6
    for name, value in buffers.items():
        torch.testing.assert_close(buffers2[name], value, rtol=0, atol=0)
    for name, value in grads.items():
        torch.testing.assert_close(grads2[name], value, rtol=1e-6, atol=1e-6 * value.abs().max().item())


def test_weights_hold_between_measurements() -> None:
    net = model("chain", ParameterProbe(every=3))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    weights, measured = [], []
    for _ in range(7):
        optimizer.zero_grad()
        net(inputs()).backward()
        optimizer.step()
        report = net.balancer.report
        measured.append(report.stats.gram is not None)
        weights.append(tuple(report.weights.values()))
        assert all(loss > 0 for loss in report.losses.values())
    assert measured == [True, False, False, True, False, False, True]
    assert weights[0] == weights[1] == weights[2] != weights[3] == weights[4]
    fresh = model("chain", ParameterProbe(every=3))
    fresh.balancer.load_state_dict(net.balancer.state_dict())
    assert fresh.balancer.state_dict().keys() == net.balancer.state_dict().keys()


def test_for_the_report_alone_it_measures_each_kth_step_too() -> None:
    net = model("chain", ParameterProbe(every=2), rule=GeometricMean())
    measured = []
    for _ in range(4):
        net(inputs()).backward()
        measured.append(net.balancer.report.grad_norms != {})
    assert measured == [True, False, True, False]
    assert net.balancer.weighting == GeometricMean()  # it reads losses, and none is held back


def test_sketch_is_unbiased_and_within_its_bound() -> None:
    size, x = 64, inputs()
    expected = explicit(model(), x)
    norms = expected.diagonal().sqrt()
    found = []
    for seed in range(60):
        net = model(probe=ParameterProbe(sketch=size, seed=seed, bucket=700), rule=Equal())
        net(x)
        found.append(net.balancer.report.stats.gram / torch.outer(norms, norms))
    errors = torch.stack(found) - expected / torch.outer(norms, norms)
    deviation = errors.square().mean(0).sqrt()
    # a deviation estimated from 60 draws is itself off by 9 %, and this is the largest of several
    assert float(deviation.max()) < (2 / size) ** 0.5 * 1.25
    assert float(deviation.max()) > 0.01  # it is a sketch
    assert float(errors.mean(0).abs().max()) < 4 * float(deviation.max()) / 60**0.5


def test_only_the_parameters_asked_for() -> None:
    net = model("chain")
    last = list(net.trunk[2].parameters())
    net.balancer = Balancer(
        net.balancer.tasks, net.balancer.weighting, probe=ParameterProbe(parameters=lambda: last)
    )
    net(inputs()).backward()
    assert error(net.balancer.report.stats.gram, explicit(net, inputs(), last)) < 1e-6


def test_checkpointed_trunk_is_seen_or_refused() -> None:
    net = model("chain")
    expected = explicit(net, inputs())
    net.balancer(checkpoint(net.trunk, inputs(), use_reentrant=False), net.tasks()).backward()
    assert error(net.balancer.report.stats.gram, expected) < 1e-6
    hidden = checkpoint(net.trunk, inputs().requires_grad_(), use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        net.balancer(hidden, net.tasks())


def test_one_function_for_all_heads_and_inputs_that_require_gradients() -> None:
    net = model("chain")
    expected = explicit(net, inputs())
    z = net.trunk(inputs().requires_grad_())
    net.balancer(z, lambda z: {name: head(z) for name, head in net.tasks().items()})
    assert error(net.balancer.report.stats.gram, expected) < 1e-6


@pytest.mark.parametrize("probe", [FeatureProbe(), FeatureProbe(reevaluate=True), FeatureTap()], ids=repr)
def test_other_probes_take_features_as_a_function(probe: FeatureProbe | FeatureTap) -> None:
    torch.manual_seed(0)
    net = Model(TRUNKS["chain"](), Balancer(NAMES, MGDA(), probe=probe), lazy=True)
    net(inputs()).backward()
    lazy = net.balancer.report.weights
    net.eval()
    assert net(inputs()).isfinite()
    net.train()
    net.lazy = False
    net(inputs()).backward()
    assert net.balancer.report.weights == lazy


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        ParameterProbe(every=0)
    with pytest.raises(ValueError, match="sketch must be None or at least 1, got -1"):
        ParameterProbe(sketch=-1)
    with pytest.raises(ValueError, match=r"window=4 .* ParameterProbe do not add"):
        Balancer(NAMES, MGDA(), probe=ParameterProbe(), window=4)
    net = model("chain")
    with pytest.raises(ValueError, match="no shared parameter is behind the features"):
        net.balancer(net.trunk(inputs()).detach(), net.tasks())
    net.balancer = Balancer(NAMES, MGDA(), probe=ParameterProbe(reevaluate=True))
    with pytest.raises(ValueError, match="Give the features as a function"):
        net.balancer(net.trunk(inputs()), net.tasks())


def test_a_gradient_that_is_not_finite_is_named() -> None:
    net = model("chain")
    heads = {**net.tasks(), "b": lambda z: (z.sum() * 0).sqrt() + 1}  # finite loss, infinite slope
    with pytest.raises(ValueError, match="task 'b'"):
        net.balancer(net.trunk(inputs()), heads)
