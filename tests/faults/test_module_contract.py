"""What a module without parameters can do: be built anywhere, copied, saved, and sent to another process."""

from __future__ import annotations

import copy
import io
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mtl_dist import Balancer, Engine, FeatureProbe, FeatureTap, Rule
from mtl_dist.weighting import COMBINATORS, FAMO, MGDA, RULES, Equal, GradNorm, Smooth, UPGrad
from tests.faults.small import Net, batch, net
from tests.weighting.subjects import SUBJECTS, build


def stepped(rule: Rule | None = None, **settings: object) -> Net:
    model = net(rule, **settings)
    for seed in range(3):
        model(batch(seed)).backward()
    return model


def through_a_file(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "file": through_a_file}
KINDS = {
    "fresh": lambda: net(),
    "stepped": lambda: stepped(),
    "with state": lambda: stepped(Smooth(GradNorm())),
    "tap": lambda: stepped(probe=FeatureTap()),
    "check": lambda: stepped(FAMO(), check=True),
    "window": lambda: stepped(GradNorm(), window=2),
    "skip": lambda: stepped(on_nonfinite="skip"),
    "attached": lambda: attached(),
}


def attached() -> Net:
    """With facts of an engine that cannot be copied or saved."""
    model = net(GradNorm())
    engine = SimpleNamespace(lock=io.StringIO("of this process"))

    def skipped() -> bool:
        return engine.lock.closed

    model.balancer.set_engine(Engine(skipped=skipped))
    model(batch()).backward()
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_on_as_the_original(kind: str, way: str) -> None:
    model = KINDS[kind]()
    other = WAYS[way](model)
    for seed in range(5, 8):
        assert other(batch(seed)).item() == model(batch(seed)).item()
    assert other.balancer.step == model.balancer.step
    assert other.balancer.weights == model.balancer.weights
    assert other.balancer is not model.balancer


def test_an_average_of_models_can_be_kept() -> None:
    model = stepped(GradNorm())
    average = torch.optim.swa_utils.AveragedModel(model)
    model(batch()).backward()
    average.update_parameters(model)
    average.eval()
    assert torch.isfinite(average(batch()))
    assert (average.module.balancer.step, model.balancer.step) == (3, 4)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("given", [True, False])
def test_a_copy_connects_again(way: str, given: bool) -> None:
    model = stepped(group=dist.group.WORLD if given else None)
    other = WAYS[way](model)
    assert other(batch(5)).item() == model(batch(5)).item()
    assert other.balancer.step == model.balancer.step == 4


@pytest.mark.usefixtures("one_rank")
def test_a_group_that_a_file_cannot_hold_must_be_given_again(monkeypatch) -> None:
    model = net(group=dist.group.WORLD)
    world_size = dist.get_world_size
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2 if group is None else world_size(group))
    other = through_a_file(model)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"call attach again, or give the new group"):
        other(batch())
    other.balancer.set_group(dist.group.WORLD)
    other(batch()).backward()


def outline(subject: str) -> dict[str, torch.Tensor]:
    tasks = ["task0", "task1", "task2"]
    state = Balancer(tasks, build(subject, tasks)).state_dict()
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_state_is_the_same_wherever_the_model_is_built(subject: str) -> None:
    """`from_pretrained` builds models on the meta device; users set default devices and dtypes."""
    expected = outline(subject)
    with torch.device("meta"):
        on_meta = outline(subject)
    torch.set_default_dtype(torch.float16)
    try:
        in_half = outline(subject)
    finally:
        torch.set_default_dtype(torch.float32)
    for got in (on_meta, in_half):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert got[key].dtype == value.dtype, key
            assert torch.equal(got[key], value), key


def test_a_model_built_on_the_meta_device_trains() -> None:
    with torch.device("meta"):
        model = Net(Smooth(UPGrad()))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model(batch()).backward()
    assert model.balancer.step == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weighting", MGDA()),
        ("probe", FeatureProbe()),
        ("on_nonfinite", "skip"),
        ("tasks", ("x",)),
        ("window", 3),
    ],
)
def test_a_setting_cannot_change_after_construction(name: str, value: object) -> None:
    model = net(Equal())
    before = repr(model.balancer)
    with pytest.raises(AttributeError, match=f"balancer.{name} is fixed at.*make a new Balancer"):
        setattr(model.balancer, name, value)
    assert repr(model.balancer) == before


def test_half_precision_without_a_loss_scale_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    with caplog.at_level(logging.WARNING, logger="mtl_dist"):
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.float16):
                model(batch())
    assert sum("no loss scale" in record.message for record in caplog.records) == 1
    caplog.clear()
    told = net()
    scaler = torch.amp.GradScaler("cpu")
    told.balancer.set_engine(Engine(scaled=scaler.scale))
    with torch.autocast("cpu", dtype=torch.float16):
        told(batch())
    assert not caplog.records
    assert len(RULES) + len(COMBINATORS) > 40  # the registries that SUBJECTS covers
