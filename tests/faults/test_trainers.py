"""Trainers of others: models that are made anew, balancers that are never used, choices by moving numbers."""

from __future__ import annotations

import copy
import gc
import json
import logging
import pickle
import weakref
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import EarlyStoppingCallback, PretrainedConfig, PreTrainedModel, TrainingArguments

import mtl_dist
from mtl_dist import Balancer, Rule
from mtl_dist.integrations import accelerate as for_accelerate
from mtl_dist.integrations import deepspeed as for_deepspeed
from mtl_dist.integrations import lightning as for_lightning
from mtl_dist.integrations import transformers as for_transformers
from mtl_dist.tracking import step_row
from mtl_dist.weighting import MGDA, RLW, Equal, Fixed, GeometricMean, InverseGradNorm, Smooth
from tests.faults.small import Net, batch, net

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the trainers


# HF Trainer


class Config(PretrainedConfig):
    model_type = "small"


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config: Config, rule: Rule | None = None, **settings: object) -> None:
        super().__init__(config)
        self.net = Net(rule or Smooth(MGDA(), 0.5), **settings)
        self.post_init()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net(x), "z": self.net.trunk(x)}


class Plain(transformers.Trainer):
    """Computes its loss from the model's outputs, as TRL's trainers do."""

    def compute_loss(self, model: nn.Module, inputs: dict, **kwargs: object) -> Tensor:
        return model(**inputs)["z"].square().mean()


def rows(number: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    return [{"x": x} for x in batch(seed, number)]


def trainer(
    folder: Path, model: Model | None = None, kind: type = transformers.Trainer, **settings: object
) -> transformers.Trainer:
    parts = {k: settings.pop(k) for k in ("model_init", "callbacks", "eval_dataset") if k in settings}
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    defaults |= {
        "label_names": ["x"],
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    args = TrainingArguments(str(folder), **{**defaults, **settings})
    return kind(model, args, train_dataset=rows(), **parts)


def model(rule: Rule | None = None, **settings: object) -> Model:
    torch.manual_seed(0)
    return Model(Config(), rule, **settings)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_whose_loss_does_not_pass_the_balancer_is_refused(
    tmp_path: Path, accumulation: int
) -> None:
    it = trainer(tmp_path, model(), Plain, gradient_accumulation_steps=accumulation)
    for_transformers.attach(it.model.net.balancer, it)
    with pytest.raises(
        RuntimeError, match=r"step 1 .*\['a', 'b'\] was called, but no backward.*compute_loss"
    ):
        it.train()
    assert it.state.global_step == 0


def test_a_balancer_that_the_trainer_never_calls_is_refused_unless_it_is_late(tmp_path: Path) -> None:
    other = Balancer(["a", "b"], MGDA())
    it = trainer(tmp_path, model())
    for_transformers.attach(other, it)
    with pytest.raises(RuntimeError, match=r"never called in training mode.*late=True"):
        it.train()
    for_transformers.detach(other, it)
    for_transformers.attach(other, it, late=True)
    it.train()
    assert it.state.global_step == 4


def test_one_of_two_that_is_never_called_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    it, other = trainer(tmp_path, model(), max_steps=12), Balancer(["c"], Equal())
    for_transformers.attach(it.model.net.balancer, it)
    for_transformers.attach(other, it, name="other")
    it.train()
    assert [r.getMessage() for r in caplog.records if "['c'] was not used" in r.getMessage()]


def test_a_new_model_has_a_new_balancer_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    def make(folder: Path) -> transformers.Trainer:
        settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
        it = trainer(folder, model_init=lambda: Model(Config()), **settings)
        for_transformers.attach(it.model.net.balancer, it, eval_weights={"a": 1.0, "b": 2.0})
        return it

    whole = make(tmp_path / "whole")
    attached = whole.model.net.balancer
    whole.train()
    trained = whole.model.net.balancer
    assert (attached.step, trained.step) == (0, 4)
    assert "mtl/weight/a" in whole.state.log_history[0]
    state = json.loads((tmp_path / "whole/checkpoint-4/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["BalancerCallback"]["attributes"]["balancers"]["balancer"]["step"] == 4
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert resumed.model.net.balancer.step == 4
    assert resumed.model.net.balancer.weights == trained.weights
    whole.train()  # once more: the third model
    assert whole.model.net.balancer.step == 4


def test_two_trials_of_a_search_may_have_other_rules(tmp_path: Path) -> None:
    rules = iter([MGDA(), InverseGradNorm(), RLW()])
    it = trainer(tmp_path, model_init=lambda: Model(Config(), next(rules)))
    for_transformers.attach(it.model.net.balancer, it)
    for _ in range(2):
        it.train()
        assert it.model.net.balancer.step == 4
    assert it.model.net.balancer.weighting == RLW()


def test_a_new_model_without_its_balancer_is_refused(tmp_path: Path) -> None:
    it = trainer(tmp_path, model())
    for_transformers.attach(it.model.net.balancer, it)
    fresh = model()
    fresh.moved = fresh.net
    del fresh.net
    it.model = it.model_wrapped = fresh
    with pytest.raises(ValueError, match=r"has none at 'net.balancer'.*\['moved.balancer'\].*attach again"):
        it.train()


def test_a_balancer_outside_of_the_model_that_is_made_anew_is_refused(tmp_path: Path) -> None:
    it = trainer(tmp_path, model_init=lambda: Model(Config()))
    with pytest.raises(ValueError, match=r"not a part of trainer\.model, and model_init makes a new model"):
        for_transformers.attach(model().net.balancer, it)


def test_a_trainer_keeps_no_balancer_alive(tmp_path: Path) -> None:
    it, owner = trainer(tmp_path, model()), net()
    for_transformers.attach(owner.balancer, it, late=True)
    gone = weakref.ref(owner.balancer)
    del owner
    gc.collect()
    assert gone() is None
    for_transformers.attach(it.model.net.balancer, it)
    it.train()
    assert it.model.net.balancer.step == 4


def test_names_that_cannot_be_columns_are_refused_at_attach(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'loss/a' cannot be part of a column name"):
        for_transformers.attach(Balancer(["loss/a"], Equal()), trainer(tmp_path, model()))
    with pytest.raises(ValueError, match="'loss/a' cannot be part of a column name"):
        for_lightning.attach(
            Balancer(["loss/a"], Equal()), lightning.Trainer(accelerator="cpu", logger=False)
        )


# choosing by a number


def test_evaluations_have_each_tasks_loss_and_a_total_in_fixed_weights(tmp_path: Path) -> None:
    it = trainer(
        tmp_path, model(InverseGradNorm()), eval_strategy="steps", eval_steps=2, eval_dataset=rows(12, 7)
    )
    for_transformers.attach(it.model.net.balancer, it, eval_weights={"a": 1.0, "b": 3.0})
    it.train()
    [_, last] = [row for row in it.state.log_history if "eval_total_loss" in row]
    with torch.no_grad():
        losses = it.model.net.losses(it.model.net.trunk(batch(7, 12)).tanh())
    assert last["eval_loss/a"] == pytest.approx(losses["a"].item(), rel=1e-5)
    assert last["eval_total_loss"] == pytest.approx((losses["a"] + 3 * losses["b"]).item(), rel=1e-5)
    assert "test_loss/b" in it.predict(rows(8)).metrics
    assert "eval_far_loss/a" in it.evaluate({"far": rows(4), "near": rows(8)})
    with pytest.raises(ValueError, match=r"eval_weights must give each of the tasks \['a', 'b'\]"):
        for_transformers.attach(Balancer(["a", "b"], Equal()), it, name="x", eval_weights={"a": 1.0})


def test_a_second_balancer_has_columns_of_its_own(tmp_path: Path) -> None:
    it = trainer(tmp_path, model(), eval_dataset=rows(4))
    for_transformers.attach(it.model.net.balancer, it, name="decoder")
    assert {"eval_decoder/loss/a", "eval_decoder/total_loss"} <= it.evaluate().keys()


CHOICE = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": rows(4)}


@pytest.mark.parametrize(
    ("rule", "settings", "warned"),
    [
        (MGDA(), {"metric_for_best_model": "loss"}, True),
        (MGDA(), {"metric_for_best_model": "eval_loss"}, True),
        (MGDA(), {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}, True),
        (MGDA(), {"lr_scheduler_type": "reduce_lr_on_plateau"}, True),
        (MGDA(), {"metric_for_best_model": "far_loss", "eval_dataset": {"far": rows(4)}}, True),
        (MGDA(), {"metric_for_best_model": "total_loss"}, False),
        (MGDA(), {"metric_for_best_model": "loss/a", "greater_is_better": False}, False),
        (MGDA(), {}, False),
        (Fixed({"a": 1.0, "b": 2.0}), {"metric_for_best_model": "loss"}, False),
    ],
    ids=str,
)
def test_choosing_by_the_moving_total_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rule: Rule, settings: dict, warned: bool
) -> None:
    it = trainer(tmp_path, model(rule), **{**CHOICE, **settings})
    for_transformers.attach(it.model.net.balancer, it)
    it.train()
    said = [r.getMessage() for r in caplog.records if "weights of the moment" in r.getMessage()]
    assert len(said) == warned
    assert all("'eval_total_loss'" in text for text in said)


def test_the_largest_loss_is_not_the_best(tmp_path: Path) -> None:
    it = trainer(tmp_path, model(), **CHOICE, metric_for_best_model="loss/a")
    with pytest.raises(ValueError, match="set greater_is_better=False"):
        for_transformers.attach(it.model.net.balancer, it)


def test_a_run_whose_losses_all_fall_is_not_stopped(tmp_path: Path) -> None:
    def last_step(metric: str) -> int:
        settings = {**CHOICE, "eval_steps": 1, "max_steps": 24, "learning_rate": 0.01, "optim": "sgd"}
        settings |= {"metric_for_best_model": metric, "callbacks": [EarlyStoppingCallback(2)]}
        it = trainer(tmp_path, model(GeometricMean()), **settings)
        for_transformers.attach(it.model.net.balancer, it)
        it.train()
        return it.state.global_step

    assert last_step("total_loss") == 24


# Accelerate


def test_the_next_attempt_takes_the_name_of_one_that_is_gone(tmp_path: Path) -> None:
    accelerator, seen = Accelerator(cpu=True), []

    @find_executable_batch_size(starting_batch_size=64)
    def train(size: int) -> int:
        accelerator.free_memory()
        model = net()
        for_accelerate.attach(model.balancer, accelerator)
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
        seen.append(weakref.ref(model.balancer))
        accelerator.backward(model(batch(0, size)))
        if size > 50:
            raise RuntimeError("CUDA out of memory.")
        accelerator.save_state(tmp_path)
        return size

    assert train() < 64
    assert sum(reference() is not None for reference in seen) <= 1
    assert len(list(tmp_path.glob("*.safetensors"))) == 2, "the model's and one balancer's"
    fresh = net()
    accelerator.free_memory()
    for_accelerate.attach(fresh.balancer, accelerator)
    accelerator.load_state(tmp_path)
    assert fresh.balancer.step == 1


def test_one_that_still_exists_is_detached_first(tmp_path: Path) -> None:
    accelerator, old, new = Accelerator(cpu=True), net(), net()
    for_accelerate.attach(old.balancer, accelerator)
    with pytest.raises(
        ValueError, match=r"still exists.*detach\('balancer', \.\.\.\).*free_memory.*another name"
    ):
        for_accelerate.attach(new.balancer, accelerator)
    for_accelerate.detach("balancer", accelerator)
    for_accelerate.attach(new.balancer, accelerator)
    new(batch()).backward()
    accelerator.save_state(tmp_path)
    assert json.loads((tmp_path / "balancer.json").read_text())["step"] == 1
    with pytest.raises(ValueError, match=r"not attached here; attached are \['balancer'\]"):
        for_accelerate.detach(old.balancer, accelerator)
    for_accelerate.detach(new.balancer, accelerator)
    for_accelerate.attach(new.balancer, accelerator)  # also after its first step
    assert new.balancer.step == 1


def test_another_name_at_resume_is_told(tmp_path: Path) -> None:
    accelerator, model = Accelerator(cpu=True), net()
    for_accelerate.attach(model.balancer, accelerator, name="second")
    accelerator.save_state(tmp_path)
    for_accelerate.detach(model.balancer, accelerator)
    for_accelerate.attach(model.balancer, accelerator)
    with pytest.raises(FileNotFoundError, match=r"this folder has balancers named \['second'\]"):
        accelerator.load_state(tmp_path)


@pytest.mark.parametrize("called", [False, True])
def test_a_loop_that_never_uses_its_balancer_is_refused(called: bool) -> None:
    accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=2), net()
    for_accelerate.attach(model.balancer, accelerator)

    def step() -> None:
        with accelerator.accumulate(model):
            if called:
                model(batch())
            accelerator.backward(model.trunk(batch()).square().mean())

    for _ in range(19):
        step()
    what = "was called, but no backward" if called else "was never called"
    with pytest.raises(RuntimeError, match=f"step 10 after attach.*{what}"):
        step()


def test_a_balancer_that_nobody_holds_is_missed() -> None:
    accelerator, model = Accelerator(cpu=True), nn.Linear(4, 1)
    for_accelerate.attach(Balancer(["a", "b"], MGDA()), accelerator)
    for _ in range(9):
        accelerator.backward(model(batch()).mean())
    with pytest.raises(RuntimeError, match=r"does not exist any more, because no model holds it"):
        accelerator.backward(model(batch()).mean())
    named = Balancer(["a", "b"], MGDA())
    for_accelerate.attach(named, accelerator)
    for_accelerate.detach(named, accelerator)
    for _ in range(20):
        accelerator.backward(model(batch()).mean())


def test_the_steps_of_a_discriminator_before_are_no_fault() -> None:
    accelerator, model, critic = Accelerator(cpu=True), net(), nn.Linear(4, 1)
    for_accelerate.attach(model.balancer, accelerator)
    for _ in range(3):
        for _ in range(5):
            accelerator.backward(critic(batch()).mean())
        accelerator.backward(model(batch()))
    for _ in range(20):
        accelerator.backward(critic(batch()).mean())
    late = Balancer(["a"], Equal())
    for_accelerate.attach(late, accelerator, name="late", late=True)
    for _ in range(20):
        accelerator.backward(critic(batch()).mean())


class Remembering:
    """A tracker of Accelerate."""

    def __init__(self, name: str) -> None:
        self.name, self.calls = name, []

    def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
        self.calls.append((values, step, kwargs))


def test_rows_stand_at_their_own_step() -> None:
    accelerator, model = Accelerator(cpu=True), net()
    accelerator.trackers = [Remembering("tensorboard"), Remembering("wandb")]
    for name in ("balancer", "again"):
        for_accelerate.attach(Balancer(["a", "b"], MGDA()), accelerator, name=name)
    model(batch()).backward()
    row = step_row(model.balancer.report, 7)
    accelerator.log(row, log_kwargs={"wandb": {"commit": False}})
    for_accelerate.log_row(accelerator, row)
    accelerator.log({"lr": 0.1}, step=3)
    accelerator.log(row, step=9)
    accelerator.log({"lr": 0.1})
    board, wandb = (tracker.calls for tracker in accelerator.trackers)
    assert [step for _, step, _ in board] == [7, 7, 3, 9, None]
    assert [step for _, step, _ in wandb] == [None, None, 3, 9, None]
    assert wandb[0] == (row, None, {"commit": False})


# DeepSpeed


class Engine:
    """What `attach` reads of a DeepSpeedEngine that accumulates two micro-batches."""

    sequence_parallel_size, seq_data_parallel_group = 1, None
    optimizer = SimpleNamespace()

    def __init__(self) -> None:
        self.global_steps = self.calls = 0
        self.fp16_enabled = self.zero_optimization_partition_weights = lambda: False
        self.gradient_accumulation_steps, self.managed_gradient_accumulation = lambda: 2, lambda: False

    def step(self) -> str:
        self.calls += 1
        self.global_steps += self.calls % 2 == 0
        return "stepped"


@pytest.mark.parametrize("used", [False, True])
def test_an_engine_that_never_uses_its_balancer_is_refused(
    monkeypatch: pytest.MonkeyPatch, used: bool
) -> None:
    monkeypatch.setattr(for_deepspeed, "check_engine", lambda engine: None)
    model, engine = net(), Engine()
    for_deepspeed.attach(model.balancer, engine)
    for call in range(6):
        if used:
            model(batch()).backward()
        if call == 1 and not used:
            with pytest.raises(RuntimeError, match=r"never called.*engine\.backward"):
                engine.step()
            for_deepspeed.detach(model.balancer, engine)
        else:
            assert engine.step() == "stepped"


# Lightning


class Module(lightning.LightningModule):
    def __init__(self, rule: Rule | None = None, **settings: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net(rule or Smooth(InverseGradNorm(), 0.5), **settings)
        self.weights: list[list[dict[str, float]]] = [[]]
        self.bad_step = -1

    def training_step(self, parts: list[Tensor], index: int) -> Tensor:
        total = self.net(parts[0])
        self.weights[-1].append(self.net.balancer.step)
        return total

    def on_before_optimizer_step(self, optimizer: object) -> None:
        self.weights.append([])

    def on_after_backward(self) -> None:
        if self.trainer.global_step == self.bad_step:
            next(self.parameters()).grad.fill_(torch.inf)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def loader(number: int = 20) -> DataLoader:
    return DataLoader(TensorDataset(batch(0, number)), batch_size=4)


def fitter(folder: Path, **settings: object) -> lightning.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"accelerator": "cpu", "devices": 1, "max_epochs": 3, "enable_checkpointing": False}
    return lightning.Trainer(default_root_dir=folder, **{**quiet, **settings})


@pytest.mark.parametrize("batches", [5, 3.0, 4])
def test_lightnings_windows_follow_optimizer_steps(tmp_path: Path, batches: float) -> None:
    """Lightning steps at an epoch's last batch, wherever the accumulation is then."""
    module, it = (
        Module(window=2),
        fitter(tmp_path, accumulate_grad_batches=2, limit_train_batches=int(batches)),
    )
    for_lightning.attach(module.net.balancer, it)
    it.fit(module, loader())
    steps = [row for row in module.weights if row]
    assert it.global_step == len(steps) == module.net.balancer.step
    for number, row in enumerate(steps):
        assert row[-1] == number + 1
        assert row[:-1] == [number] * (len(row) - 1), "the weights changed inside an optimizer step"


def test_lightning_without_attach_is_refused_at_the_first_step_inside_a_window(tmp_path: Path) -> None:
    module, it = Module(window=2), fitter(tmp_path, accumulate_grad_batches=2)
    with pytest.raises(
        RuntimeError, match=r"came after 1, the first one after 2.*attach\(balancer, trainer\)"
    ):
        it.fit(module, loader())
    assert it.global_step <= 3


def test_lightning_resumes_bit_for_bit(tmp_path: Path) -> None:
    def run(folder: str, resume: Path | None = None) -> Module:
        module, saves = Module(window=2), ModelCheckpoint(tmp_path / folder, save_top_k=-1)
        it = fitter(tmp_path, accumulate_grad_batches=2, callbacks=[saves], enable_checkpointing=True)
        for_lightning.attach(module.net.balancer, it)
        it.fit(module, loader(), ckpt_path=resume, weights_only=None if resume is None else True)
        return module

    whole = run("whole")
    first = min((tmp_path / "whole").glob("*.ckpt"))
    assert "step=3" in first.name, "three optimizer steps for five batches"
    resumed = run("resumed", first)
    assert resumed.net.balancer.step == whole.net.balancer.step == 9
    assert resumed.net.balancer.weights == whole.net.balancer.weights
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_lightning_checkpoint_without_the_balancer_is_refused(tmp_path: Path) -> None:
    module, it = Module(), fitter(tmp_path, max_epochs=1)
    it.fit(module, loader())
    it.save_checkpoint(tmp_path / "plain.ckpt")
    it = fitter(tmp_path)
    for_lightning.attach(module.net.balancer, it)
    with pytest.raises(ValueError, match=r"step 5\) has no state of the balancer 'balancer'"):
        it.fit(module, loader(), ckpt_path=str(tmp_path / "plain.ckpt"))
    it.validate_loop = None
    other = Module(RLW())
    saver = fitter(tmp_path, max_epochs=1)
    for_lightning.attach(other.net.balancer, saver)
    saver.fit(other, loader())
    saver.save_checkpoint(tmp_path / "other.ckpt")
    it = fitter(tmp_path)
    for_lightning.attach(module.net.balancer, it)
    with pytest.raises(ValueError, match="belongs to rule"):
        it.fit(module, loader(), ckpt_path=str(tmp_path / "other.ckpt"))


def test_steps_that_lightnings_scaler_skips_are_forgotten(tmp_path: Path) -> None:
    def run(bad_step: int, steps: int) -> Balancer:
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
        module = Module()
        module.bad_step = bad_step
        it = fitter(tmp_path, plugins=[precision], max_epochs=-1, max_steps=steps)
        for_lightning.attach(module.net.balancer, it)
        it.fit(module, DataLoader(TensorDataset(batch(0, 4).repeat(8, 1)), batch_size=4))
        module.net.balancer.state_dict()
        return module.net.balancer

    assert run(2, 5).step == 4
    assert run(-1, 5).step == 5


def test_rows_in_lightnings_loggers(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    module, it = Module(), fitter(tmp_path, logger=logger, log_every_n_steps=5)
    for_lightning.attach(module.net.balancer, it)
    for_lightning.attach(Balancer(["c"], Equal()), it, name="other", late=True)  # gone at once
    it.callbacks = [c for c in it.callbacks if getattr(c, "name", "") != "other"]
    it.fit(module, loader())
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    table = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert [row["step"] for row in table] == ["4", "9", "14"]
    assert all(float(row["mtl/weight/a"]) > 0 for row in table)


class Loses(Module):
    def training_step(self, parts: list[Tensor], index: int) -> Tensor:
        self.net(parts[0])
        return self.net.trunk(parts[0]).square().mean()


def test_lightning_refuses_what_it_cannot_do_right(tmp_path: Path) -> None:
    module, it = Loses(), fitter(tmp_path)
    for_lightning.attach(module.net.balancer, it)
    with pytest.raises(RuntimeError, match=r"was called, but no backward.*training_step"):
        it.fit(module, loader())
    assert it.global_step == 0
    by_hand = Module(window=2)
    by_hand.automatic_optimization = False
    it = fitter(tmp_path)
    for_lightning.attach(by_hand.net.balancer, it)
    with pytest.raises(ValueError, match="window=2 micro-batches, but with automatic_optimization=False"):
        it.fit(by_hand, loader())
    other, it = Module(window=2), fitter(tmp_path, accumulate_grad_batches=3)
    for_lightning.attach(other.net.balancer, it)
    with pytest.raises(ValueError, match="the engine accumulates 3"):
        it.fit(other, loader())
    with pytest.raises(TypeError, match=r"got int: call attach\(model.balancer, trainer\)"):
        for_lightning.attach(other.net.balancer, 3)
    with pytest.raises(ValueError, match=r"attach works with .*got Odd: use one of them"):
        for_lightning._check_strategy(type("Odd", (), {})())
    with pytest.raises(ValueError, match="deepspeed_engine"):
        for_lightning._check_strategy(type("DeepSpeedStrategy", (), {})())


def test_lightnings_trainer_keeps_no_balancer_alive(tmp_path: Path) -> None:
    it, old = fitter(tmp_path), Module()
    for_lightning.attach(old.net.balancer, it)
    with pytest.raises(ValueError, match="still exists"):
        for_lightning.attach(Module().net.balancer, it)
    del old
    gc.collect()
    with pytest.raises(ValueError, match=r"the model of the attached balancer 'balancer'.*is gone"):
        it.fit(Module(), loader())
    module = Module()
    for_lightning.attach(module.net.balancer, it)
    it.fit(module, loader())
    assert module.net.balancer.step == 15
    assert len([c for c in it.callbacks if isinstance(c, for_lightning.BalancerHooks)]) == 1
    for_lightning.detach("balancer", it)
    with pytest.raises(ValueError, match=r"not attached here; attached are \[\]"):
        for_lightning.detach(module.net.balancer, it)


class AttachesItself(Module):
    def setup(self, stage: str) -> None:
        for_lightning.attach(self.net.balancer, self)


def test_a_module_may_attach_its_balancer_in_setup(tmp_path: Path) -> None:
    module, it = AttachesItself(window=2), fitter(tmp_path, accumulate_grad_batches=2)
    it.fit(module, loader())
    assert it.global_step == module.net.balancer.step == 9


def test_a_callback_travels_with_its_model(tmp_path: Path) -> None:
    """As the launchers that spawn processes send them."""
    module, it = Module(), fitter(tmp_path)
    for_lightning.attach(module.net.balancer, it)
    [callback] = [c for c in it.callbacks if isinstance(c, for_lightning.BalancerHooks)]
    net, sent = pickle.loads(pickle.dumps((module.net, callback)))
    assert sent.balancer is net.balancer
    assert isinstance(sent, lightning.Callback)
    assert copy.deepcopy(callback).state_key == "mtl_dist.balancer"


def test_no_trainer_is_imported_by_the_library() -> None:
    assert not hasattr(mtl_dist, "integrations") or "lightning" not in vars(mtl_dist)
    assert logging.getLogger("mtl_dist")
