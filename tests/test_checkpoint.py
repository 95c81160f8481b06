"""Checkpoints: bit for bit the same run, or a refusal that changes nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from problem import TASKS, Net, global_batch
from safetensors.torch import save as tensor_bytes
from subjects import SUBJECTS, build
from torch import Tensor

from mtl_dist import Balancer, checkpoint
from mtl_dist.checkpoint import Packed
from mtl_dist.weighting import MGDA, RLW, InverseLoss, Smooth


def run(net: Net, steps: range) -> list[Tensor]:
    """Weights of each step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001)
    weights = []
    for step in steps:
        optimizer.zero_grad()
        net(global_batch(step, "absent on all ranks")).backward()
        optimizer.step()
        weights.append(net.balancer.report.weight_vector.clone())
        if net.balancer.weighting.observes:
            net.balancer.observe({task: torch.tensor(1.0 + i / (1 + step)) for i, task in enumerate(TASKS)})
    return weights


def make(rule: str) -> Net:
    torch.manual_seed(3)
    return Net(Balancer(TASKS, build(rule, TASKS)))


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def same(a: Balancer, b: Balancer) -> bool:
    return checkpoint.pack(a) == checkpoint.pack(b)


def trained(steps: int = 3) -> Balancer:
    net = make("smooth/mgda")
    run(net, range(steps))
    return net.balancer


@pytest.mark.parametrize("rule", SUBJECTS)
def test_resume_is_bitwise(tmp_path: Path, rule: str) -> None:
    whole = make(rule)
    run(whole, range(4))
    parameters = copy.deepcopy(whole.state_dict())
    checkpoint.save(whole.balancer, tmp_path)
    saved_report = whole.balancer.report
    expected = run(whole, range(4, 8))
    resumed = make(rule)
    resumed.load_state_dict(parameters)
    checkpoint.load(resumed.balancer, tmp_path)
    report = resumed.balancer.report
    assert (report.step, report.weights) == (3, saved_report.weights)
    assert str(report.losses) == str(saved_report.losses)  # NaN for absent tasks
    assert str(report.cosines) == str(saved_report.cosines)
    assert all(torch.equal(a, b) for a, b in zip(expected, run(resumed, range(4, 8)), strict=True))
    assert same(whole.balancer, resumed.balancer)


def test_files_are_json_and_tensors_and_the_same_for_the_same_state(tmp_path: Path) -> None:
    checkpoint.save(trained(), tmp_path / "one")
    checkpoint.save(trained(), tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")
    header = json.loads((tmp_path / "one" / "balancer.json").read_text())
    assert sorted(content(tmp_path / "one")) == sorted(["balancer.json", header["tensors"]])
    assert (header["format"], header["step"], header["tasks"]) == (1, 3, list(TASKS))
    assert header["tensors"].endswith(".safetensors")


def test_the_same_state_in_another_order_and_layout_gives_the_same_bytes(tmp_path: Path) -> None:
    def transposed(value: object) -> object:
        return value.T.contiguous().T if isinstance(value, Tensor) and value.dim() == 2 else value

    net = make("gradvac")
    run(net, range(3))
    state = net.balancer.state_dict()
    assert any(isinstance(value, Tensor) and value.dim() == 2 for value in state.values())
    other = make("gradvac").balancer
    other.load_state_dict({key: transposed(value) for key, value in reversed(state.items())})
    net.balancer.report = None
    for folder, balancer in (("one", net.balancer), ("two", other)):
        checkpoint.save(balancer, tmp_path / "made" / folder)
    assert content(tmp_path / "made" / "one") == content(tmp_path / "made" / "two")


def test_before_the_first_step(tmp_path: Path) -> None:
    checkpoint.save(Balancer(TASKS, InverseLoss()), tmp_path)
    other = Balancer(TASKS, InverseLoss())
    checkpoint.load(other, tmp_path)
    assert other.report is None
    assert other.step == 0


def test_two_balancers_share_a_folder_and_a_later_save_replaces_an_earlier(tmp_path: Path) -> None:
    first, second = trained(1), trained(2)
    for name, balancer in {"balancer": first, "balancer2": second, "balancer-3": first}.items():
        checkpoint.save(balancer, tmp_path, name)
    checkpoint.save(trained(3), tmp_path)
    assert len(content(tmp_path)) == 6, "the replaced tensors stay"
    got = trained(0)
    for name, steps in (("balancer", 3), ("balancer2", 2), ("balancer-3", 1)):
        checkpoint.load(got, tmp_path, name)
        assert got.step == steps


def test_a_writer_killed_on_the_way_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(trained(1), tmp_path)
    written = checkpoint.write_whole

    def killed(file: Path, content: bytes) -> None:
        if file.suffix == ".json":
            file.with_name(file.name + ".tmp").write_bytes(content[:10])
            raise KeyboardInterrupt
        written(file, content)

    monkeypatch.setattr(checkpoint, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(trained(2), tmp_path)
    got = trained(0)
    checkpoint.load(got, tmp_path)
    assert same(got, trained(1))


def flip(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def edit(**changes: object) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".safetensors", flip, "digest does not fit"),
        (".safetensors", lambda content: content[:-8], "digest does not fit"),
        (".safetensors", lambda content: b"", "digest does not fit"),
        (".json", edit(step=7), "digest does not fit"),
        (".json", edit(sha256="0" * 64), "digest does not fit"),
        (".json", edit(format=2), "in format 2, this version of mtl_dist reads 1"),
        (".json", lambda content: content[: len(content) // 2], "damaged"),
        (".json", lambda content: b"[]", "damaged"),
        (".json", lambda content: b"\xff", "damaged"),
        (".json", edit(tensors=None), "damaged"),
    ],
)
def test_damage_is_refused(
    tmp_path: Path, suffix: str, change: Callable[[bytes], bytes], message: str
) -> None:
    checkpoint.save(trained(), tmp_path)
    [file] = tmp_path.glob(f"*{suffix}")
    file.write_bytes(change(file.read_bytes()))
    check_refused(tmp_path, trained(2), message)


def test_missing_is_told(tmp_path: Path) -> None:
    balancer = trained(2)
    with pytest.raises(FileNotFoundError, match="before the balancer was attached"):
        checkpoint.load(balancer, tmp_path)
    checkpoint.save(trained(), tmp_path)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"safetensors.*balancers named \[\].*Resume from a complete one"
    ):
        checkpoint.load(balancer, tmp_path)
    for name in ("second", "first"):
        checkpoint.save(trained(), tmp_path, name)
    with pytest.raises(FileNotFoundError, match=r"balancers named \['first', 'second'\]"):
        checkpoint.load(balancer, tmp_path, "third")
    assert same(balancer, trained(2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Balancer(TASKS[::-1], Smooth(MGDA(), 0.9)), "belongs to tasks"),
        (lambda: Balancer(TASKS[:2], Smooth(MGDA(), 0.9)), "belongs to tasks"),
        (lambda: Balancer(TASKS, Smooth(MGDA(), 0.8)), "belongs to rule"),
        (lambda: Balancer(TASKS, RLW()), "belongs to rule"),
    ],
)
def test_a_foreign_checkpoint_is_refused(tmp_path: Path, other: Callable[[], Balancer], message: str) -> None:
    checkpoint.save(trained(), tmp_path)
    check_refused(tmp_path, other(), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {**t, "state.rule.sum": t["state.rule.sum"].float()},
            "must be torch.float64, got torch.float32",
        ),
        (lambda t: {**t, "state.rule.sum": torch.zeros(4, dtype=torch.float64)}, "must have shape"),
        (lambda t: {**t, "state.rule.new": torch.zeros(3)}, "unknown keys"),
        (lambda t: {key: t[key] for key in t if key != "state.weights"}, "missing keys"),
    ],
)
def test_state_of_another_kind_is_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    """As a later version of a rule might write it: the digest is right, the content does not fit."""
    packed = checkpoint.pack(trained())
    changed = Packed(packed.header, tensor_bytes(change(checkpoint.read_tensors(packed.tensors))))
    signed = Packed({**changed.header, "sha256": changed.digest}, changed.tensors)
    balancer = trained(2)
    with pytest.raises(ValueError, match=message):
        checkpoint.unpack(balancer, signed, "there")
    assert same(balancer, trained(2))


def check_refused(folder: Path, balancer: Balancer, message: str) -> None:
    before = checkpoint.pack(balancer)
    with pytest.raises(ValueError, match=message) as refusal:
        checkpoint.load(balancer, folder)
    assert str(folder / "balancer.json") in str(refusal.value)
    assert checkpoint.pack(balancer) == before


def test_as_one_json_value() -> None:
    value = json.loads(json.dumps(checkpoint.to_json(checkpoint.pack(trained()))))
    balancer = trained(0)
    checkpoint.unpack(balancer, checkpoint.from_json(value, "there"), "there")
    assert same(balancer, trained())
    for wrong in (None, [], {}, {"tensors": 3}, {"tensors": "€"}):
        with pytest.raises(ValueError, match="there: the balancer's checkpoint is damaged"):
            checkpoint.from_json(wrong, "there")


@pytest.mark.parametrize("name", ["", "a/b", "..", "a.b", "a b"])
def test_names_are_safe(tmp_path: Path, name: str) -> None:
    for use in (checkpoint.save, checkpoint.load):
        with pytest.raises(ValueError, match="letters, digits"):
            use(trained(0), tmp_path, name)


def test_reduced_precision_is_stored_as_float64(tmp_path: Path) -> None:
    """MPS computes in float32; its state goes on elsewhere, and elsewhere's on MPS."""
    balancer = trained()
    course = balancer._progress
    course.restart({k: v.float() for k, v in course.state.items()}, course.weights.float(), course.step)
    checkpoint.save(balancer, tmp_path)
    other = trained(0)
    checkpoint.load(other, tmp_path)
    assert torch.equal(other._progress.weights, course.weights.double())
    checkpoint.load(balancer, tmp_path)
    assert balancer.step == 3
