"""The benchmarks measure what they say; see `benchmarks/overhead.py`, `latency.py` and `cost_model.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from program import ROOT, run, run_only
from torch import Tensor, nn

from mtl_dist.stats import LocalStats
from mtl_dist.sync import Call, Kind, Layout

BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    """The benchmarks are scripts that import their neighbours."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def on_fork(python: str, script: Path, *options: object, **others: Any) -> subprocess.CompletedProcess[str]:
    """As `run_only`, of a script on one process, without waiting for imports."""
    return warm.launch(script, 1, *options, **others)


def benchmark(name: str, *options: object, out: Path, timeout: float = 120, run: Callable = run_only) -> str:
    """Runs a benchmark; returns the tables that it wrote."""
    command = [sys.executable, BENCHMARKS / f"{name}.py", *options, "--out", out]
    done = run(*command, env={"PYTHONPATH": str(ROOT)}, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (out / f"{name}.md").read_text(encoding="utf-8")
    assert text.strip() in done.stdout
    return text


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each row of the tables."""
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"
    ]
    return {first: rest for first, *rest in cells}


# ---- counts --------------------------------------------------------------------------------------


def test_operators_are_counted_and_views_are_not():
    from counting import counting

    x = torch.randn(3, 4, requires_grad=True)
    with counting() as counts:
        (x.view(4, 3) * 2).sum().backward()  # mul, sum; ones_like, mul
    assert (counts.operators, counts.reads, counts.collectives) == (4, 0, 0)
    with counting() as counts:
        x.detach().t()[1:].unsqueeze(0).expand(2, -1, -1).select(0, 1)
    assert counts.operators == 0


class _ReadInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad.numpy()
        return grad * grad.tolist()[0]


def test_host_reads_are_counted_in_forward_and_backward():
    from counting import counting

    x = torch.ones(2, requires_grad=True)
    with counting() as counts:
        y = _ReadInBackward.apply(x)
        seen = [bool(y.detach().sum() > 0), y.detach()[0].item(), float(y.detach()[1]), y.tolist()]
        assert torch.equal(x, y)
        assert counts.reads == 5
        y.sum().backward()
    assert counts.reads == 7
    assert seen == [True, 1.0, 1.0, [1.0, 1.0]]
    assert not {"tolist", "numpy"} & set(vars(Tensor)), "the methods of tensors are those of torch again"


def test_copies_that_block_are_reads():
    """On an accelerator, for which the meta device stands here."""
    from counting import _blocks, aten

    device, host = torch.empty(2, device="meta"), torch.empty(2)
    to, into = aten._to_copy.default, aten.copy_.default
    assert _blocks(to, (device,), {"device": "cpu"}, host)
    assert _blocks(into, (host, device), {}, host)
    assert not _blocks(to, (device,), {"device": "cpu", "non_blocking": True}, host)
    assert not _blocks(into, (host, device, True), {}, host)
    assert not _blocks(to, (host,), {"dtype": torch.float64}, host)
    assert not _blocks(into, (device, host), {}, device)


def test_peak_memory_is_that_of_the_block():
    from counting import PeakMemory

    kept = torch.zeros(5_000_000)  # 20 MB before it do not count
    with PeakMemory() as memory:
        for _ in range(3):  # one after the other
            torch.zeros(10_000_000).add_(kept.sum())
    assert memory.megabytes == pytest.approx(40, abs=0.01)


@pytest.mark.parametrize("heads", ["linear", "decoder"])
@pytest.mark.parametrize(
    "name",
    ["losses only, InverseLoss", "FeatureTap, MGDA", *(f"lag=1, {x}" for x in ("InverseGradNorm", "MGDA"))],
)
def test_a_step_with_a_lag_takes_the_memory_of_a_plain_step(heads, name):
    """The gradients at the features live together, and are less than what the heads keep of the forward."""
    from overhead import peak
    from variants import make_step

    plain, balanced = (
        peak(lambda chosen=chosen: make_step(chosen, heads, 8, None, CPU, "plain"), CPU)
        for chosen in ("plain", name)
    )
    assert balanced <= 1.03 * plain


# ---- problems ------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["linear", "decoder", "lm"])
@pytest.mark.parametrize("name", ["losses only, InverseLoss", "FeatureProbe, MGDA", "SharedLayerProbe, MGDA"])
def test_variants_have_the_losses_of_the_plain_step(heads, name):
    from variants import make_step

    step, net = make_step(name, heads, 2, 4, torch.device("cpu"), "plain")
    x, y = net.draw(torch.device("cpu"))
    expected = [loss.item() for loss in net.losses(net.last(net.trunk(x)), y)]
    step(x, y)
    assert list(net.balancer.report.losses.values()) == pytest.approx(expected, rel=1e-5)


def test_two_decoders_are_as_much_work_as_the_trunk():
    """In multiplications per sample: those of 3 x 3 convolutions on images of the same size."""
    from problems import Decoders

    def work(module: nn.Module) -> int:
        return sum(conv.weight.numel() for conv in module.modules() if isinstance(conv, nn.Conv2d))

    net = Decoders(2, 1)
    assert work(net.heads) >= 0.95 * (work(net.trunk) + work(net.last))


# ---- the commands --------------------------------------------------------------------------------


def test_overhead_makes_a_table_and_says_what_it_leaves_out(tmp_path):
    names = ["plain", "plain, again", "plain, and the ranks meet", "losses only, InverseLoss"]
    names += ["FeatureProbe, MGDA", "FeatureTap, MGDA", "lag=1, MGDA"]
    options = ["--heads", "lm", "--tasks", 2, "--rounds", 2, "--warmup", 0, "--batch", 2]
    text = benchmark("overhead", *options, "--variants", *names, out=tmp_path, run=on_fork)
    table = rows(text)
    left_out = re.findall(r"\* Left out: (.*?)\. ", text)
    missing = {name for these in left_out for name in these.split("; ")}
    assert {*names} == missing ^ (table.keys() & {*names})
    assert {"plain, and the ranks meet", "FeatureTap, MGDA"} <= missing
    assert "FeatureTap needs heads as a mapping" in text
    assert table["plain"][:4] == ["1", "1", "0", "1.000"]
    operators = {name: int(cells[4]) for name, cells in table.items() if name in names}
    assert operators["plain"] == operators["plain, again"]
    assert operators["plain"] < operators["losses only, InverseLoss"] < operators["FeatureProbe, MGDA"]
    assert table["plain"][5:] == ["0", "0"]
    for fact in ("torch " + torch.__version__, "cores", "`python benchmarks/overhead.py --heads lm"):
        assert fact in text


def test_plain_torch_on_two_ranks_is_refused():
    from overhead import parser, wanted

    with pytest.raises(SystemExit, match="one rank, got --engine plain --ranks 2: take ddp"):
        wanted(parser().parse_args(["--ranks", "2"]))


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_overhead_of_engines(tmp_path, engine):
    """The losses travel in one collective more than the plain step has, under every engine."""
    options = ["--heads", "decoder", "--tasks", 2, "--engine", engine, "--ranks", 2, "--rounds", 2]
    table = rows(benchmark("overhead", *options, "--batch", 1, out=tmp_path, timeout=280, run=run))
    collectives = {
        name: int(cells[6]) for name, cells in table.items() if name.startswith(("plain", "losses"))
    }
    assert collectives["losses only, InverseLoss"] == collectives["plain"] + 1
    assert collectives["plain, and the ranks meet"] == collectives["plain"] + 1


def may_make_networks() -> bool:
    return os.geteuid() == 0 and Path("/dev/net/tun").exists()


def test_lab_delays_what_travels(tmp_path):
    """A ping takes two one-way delays; where the user may not make networks, a sentence says so."""
    from lab import Lab

    if not may_make_networks():
        with pytest.raises(PermissionError, match="run it as root"), Lab(2, 0.0):
            pass
        return
    echo = "import socket; s = socket.socket(2, 2); s.bind(('', 5)); s.sendto(*s.recvfrom(9))"
    ask = (
        "import socket, time; s = socket.socket(2, 2); s.settimeout(0.2); end = time.time() + 20\n"
        "while time.time() < end:\n"
        "    start = time.perf_counter(); s.sendto(b'x', ('10.77.0.1', 5))\n"
        "    try: s.recv(9)\n"
        "    except OSError: continue\n"
        "    print(time.perf_counter() - start); break\n"
    )
    with Lab(2, 0.02) as lab, (tmp_path / "seconds").open("w") as output:
        processes = [lab.popen(0, [sys.executable, "-c", echo], os.environ)]
        processes.append(lab.popen(1, [sys.executable, "-c", ask], os.environ, output.fileno()))
        assert processes[1].wait(30) == 0
        assert processes[0].wait(10) == 0
    seconds = float((tmp_path / "seconds").read_text())
    assert 0.04 <= seconds < 0.2


@pytest.mark.long
def test_a_meeting_takes_four_delays_on_two_ranks(tmp_path):
    """Gloo's ring: two messages, each announced by its receiver. See `cost_model.ring`."""
    if not may_make_networks():
        pytest.fail("latency.py needs root and /dev/net/tun: deselect this test where they are missing")
    options = ["--ranks", 2, "--delays", 0, 5, "--jitter", 0, "--rounds", 3, "--work", 0]
    text = benchmark("latency", *options, "--variants", "bare all-reduce", out=tmp_path, timeout=280)
    without, delayed = (float(cell.split(" ± ")[0]) for cell in rows(text)["bare all-reduce"][:2])
    assert 0.8 < (delayed - without) / 5 / 4 < 1.5


# ---- the model -----------------------------------------------------------------------------------


def test_page_is_what_the_model_prints():
    done = run_only(sys.executable, BENCHMARKS / "cost_model.py", timeout=60)
    assert done.returncode == 0, done.stderr
    page = (BENCHMARKS / "results" / "cost_model.md").read_text(encoding="utf-8")
    assert done.stdout == page, "python benchmarks/cost_model.py > benchmarks/results/cost_model.md"


def test_expected_maximum_is_the_published_one():
    """Of 2 it is 1/√π; of 8 and 64, tables of normal order statistics (Harter, Biometrika 1961)."""
    from cost_model import expected_maximum

    assert expected_maximum(1) == pytest.approx(0, abs=1e-6)
    assert expected_maximum(2) == pytest.approx(torch.pi**-0.5, abs=1e-5)
    assert expected_maximum(8) == pytest.approx(1.42360, abs=1e-5)
    torch.manual_seed(0)
    assert expected_maximum(64) == pytest.approx(torch.randn(100_000, 64).amax(1).mean().item(), abs=5e-3)


def test_straggling_is_that_of_simulated_ranks():
    from cost_model import FORWARD, WAYS, straggling

    torch.manual_seed(0)
    spread, ranks = 0.05, 8
    forward = FORWARD + spread * FORWARD**0.5 * torch.randn(200_000, ranks)
    backward = 1 - FORWARD + spread * (1 - FORWARD) ** 0.5 * torch.randn(200_000, ranks)
    met = forward.amax(1) + backward.amax(1)
    plain = (forward + backward).amax(1)
    assert straggling(WAYS[0], ranks, spread) == pytest.approx((met - plain).mean().item(), abs=5e-4)
    equal = next(way for way in WAYS if way.name == "lag=1, counts equal")
    assert straggling(equal, ranks, spread) == 0


@pytest.mark.parametrize("tasks", [2, 8, 32])
def test_message_has_the_size_of_the_layout(tasks):
    from cost_model import message

    buffer = Layout(tasks).pack(LocalStats.zeros(tasks, torch.device("cpu")), 0, Call(Kind.TRAINING, 1))
    assert message(tasks) == buffer.numel() * buffer.element_size()
