"""HF Trainer as it comes: real launches, accumulation, resume, logs, and the settings that are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from accelerate.utils import DistributedType
from program import ROOT
from transformers import TrainerControl, TrainerState

from mtl_dist import Balancer, checkpoint
from mtl_dist.integrations._log_window import LogWindow
from mtl_dist.integrations._trainer import _check, _divide_once
from mtl_dist.integrations.transformers import BalancerCallback, attach
from mtl_dist.weighting import MGDA, RLW, Equal, Smooth

SCRIPT = Path(__file__).parent / "trainer_run.py"
HEADS = {"a": lambda z: z.square().mean(), "b": lambda z: (z - 1).square().mean()}


def train(folder: Path, num_processes: int, engine: str) -> list[dict]:
    """What each rank wrote."""
    draw = random.Random(0)
    sentences = [[draw.randrange(40) for _ in range(6)] for _ in range(40)]
    rows = [{"input_ids": s, "topic": sum(s) % 3, "labels": [w % 5 for w in s]} for s in sentences]
    table = folder / "table.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows))
    environment = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": str(engine == "ddp")}
    out = folder / f"{engine}-{num_processes}"
    done = warm.launch(
        *(SCRIPT, num_processes, out, engine, num_processes, table),
        env=environment,
        timeout=280,
        modules=warm.TRAINER,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(num_processes)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One process on the concatenated batches."""
    [facts] = train(tmp_path_factory.mktemp("alone"), 1, "ddp")
    assert facts["whole"]["world_size"] == 1
    return facts


def off(expected: list, got: list) -> float:
    """Largest difference, relative to the largest value."""
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (expected, got))
    return float((a - b).abs().max() / a.abs().max())


def same_log(a: list[dict], b: list[dict]) -> bool:
    """Without what is measured in time."""
    return [{k: v for k, v in row.items() if k != "perf/sync_ms"} for row in a] == [
        {k: v for k, v in row.items() if k != "perf/sync_ms"} for row in b
    ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("engine", "kind", "model", "zero"),
    [("ddp", "MULTI_CPU", "DistributedDataParallel", None), ("zero2", "DEEPSPEED", "DeepSpeedEngine", 2)],
)
def test_two_ranks_equal_one_process(
    tmp_path: Path, alone: dict, engine: str, kind: str, model: str, zero: int | None
) -> None:
    ranks = train(tmp_path, 2, engine)
    for facts in ranks:
        for name, got in facts.items():
            assert (got["world_size"], got["type"], got["model"], got["zero"]) == (2, kind, model, zero)
            expected = alone[name]
            assert got["step"] == expected["step"] == (6 if name in ("held", "large") else 12)
            assert off(expected["moved"], got["moved"]) <= 1e-6, name
            if name != "held":  # no weights before the first window is whole
                assert off(expected["weights"], got["weights"]) <= 1e-6, name
            assert [row["loss"] for row in got["log"]] == pytest.approx(
                [row["loss"] for row in expected["log"]], rel=1e-6
            )
            assert got["evaluation"].keys() >= {"eval_loss/topic", "eval_loss/kind", "eval_total_loss"}
            assert got["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-5)
        whole, resumed = facts["whole"], facts["resumed"]
        assert resumed["weights"] == whole["weights"][8:], "resume is not bitwise"
        assert resumed["moved"] == whole["moved"]
        assert same_log(resumed["log"], whole["log"])
    assert ranks[0]["whole"]["weights"] == ranks[1]["whole"]["weights"], "ranks disagree"


def test_logs_are_means_as_trainers_own_loss_is(alone: dict) -> None:
    every, third = alone["whole"]["log"], alone["averaged"]["log"]
    assert (len(every), len(third)) == (6, 2)
    assert {"mtl/weight/topic", "mtl/loss/kind", "mtl/grad_norm/topic", "mtl/cosine/topic__kind"} <= every[
        0
    ].keys()
    assert not {"train/loss", "train/global_step"} & every[0].keys()
    for k, row in enumerate(third):
        part = every[3 * k : 3 * k + 3]
        for key in ("loss", "mtl/weight/topic", "mtl/loss/kind", "mtl/grad_norm/topic", "mtl/conflict_rate"):
            assert row[key] == pytest.approx(sum(other[key] for other in part) / 3, rel=1e-6)
    for k, row in enumerate(every):
        first, second = alone["whole"]["weights"][2 * k : 2 * k + 2]
        assert row["mtl/weight/kind"] == pytest.approx((first[1] + second[1]) / 2, rel=1e-12)


def test_held_windows_equal_one_larger_batch(alone: dict) -> None:
    held, large = alone["held"], alone["large"]
    assert off(large["moved"], held["moved"]) <= 1e-6
    assert off(large["weights"], held["weights"][1::2]) <= 1e-6


def trainer(**others: object) -> SimpleNamespace:
    """What `attach` looks at before it touches anything."""
    args = SimpleNamespace(n_gpu=1, restore_callback_states_from_checkpoint=False)
    facts = {"args": args, "compute_loss_func": None, "label_smoother": None, "loss_is_scaled_for_ga": None}
    return SimpleNamespace(**{**facts, **others})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compute_loss_func": print}, "compute_loss_func replaces the loss"),
        ({"label_smoother": object()}, "label_smoothing_factor replaces the loss"),
        ({"loss_is_scaled_for_ga": True}, "set it to None"),
        (
            {"args": SimpleNamespace(n_gpu=2, restore_callback_states_from_checkpoint=False)},
            "torchrun --nproc_per_node 2",
        ),
        ({"args": SimpleNamespace(n_gpu=1, restore_callback_states_from_checkpoint=True)}, "set it to False"),
    ],
)
def test_what_replaces_the_scalar_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(Balancer(["a"], Equal()), trainer(**settings))


def test_a_trainer_that_cannot_be_told_of_a_scaled_loss_is_taken() -> None:
    older = trainer()  # transformers 5.0
    del older.loss_is_scaled_for_ga
    _check(older)


@pytest.mark.parametrize(
    ("kind", "steps", "left"), [("MULTI_GPU", 4, 1), ("NO", 4, 1), ("NO", 1, 1), ("DEEPSPEED", 4, 4)]
)
def test_a_loss_is_divided_once(caplog: pytest.LogCaptureFixture, kind: str, steps: int, left: int) -> None:
    older = trainer(  # Accelerate divides too, as in transformers 5.0
        accelerator=SimpleNamespace(distributed_type=DistributedType(kind), gradient_accumulation_steps=steps)
    )
    _divide_once(older)
    assert older.accelerator.gradient_accumulation_steps == left
    assert [record.message[:60] for record in caplog.records] == [
        "mtl_dist: this Trainer divides the loss by the 4 accumulatio"
    ] * (steps != left)


def trained(rule: object, steps: int) -> Balancer:
    balancer = Balancer(["a", "b"], rule)
    step(balancer, steps)
    return balancer


def step(balancer: Balancer, times: int) -> None:
    for k in range(times):
        balancer(torch.full((2, 3), 0.1 * (k + 2), requires_grad=True), HEADS)


def saved_by(**balancers: Balancer) -> TrainerState:
    """The state that Trainer reads back from a checkpoint with these balancers, which live in the caller."""
    callback = BalancerCallback()
    for name, balancer in balancers.items():
        callback.add(balancer, name)
    state = TrainerState(global_step=3, stateful_callbacks=[callback])
    return TrainerState(global_step=3, stateful_callbacks=json.loads(json.dumps(state.stateful_callbacks)))


def begin(state: TrainerState, **balancers: Balancer) -> None:
    callback = BalancerCallback()
    for name, balancer in balancers.items():
        callback.add(balancer, name)
    callback.on_train_begin(None, state, TrainerControl())


def test_two_balancers_are_restored_by_name() -> None:
    rule = Smooth(MGDA(), 0.5)
    first, second = trained(rule, 2), trained(rule, 3)
    a, b = trained(rule, 0), trained(rule, 0)
    begin(saved_by(balancer=first, decoder=second), balancer=a, decoder=b)
    assert checkpoint.pack(a) == checkpoint.pack(first)
    assert checkpoint.pack(b) == checkpoint.pack(second)


def test_a_fresh_start_restores_nothing() -> None:
    balancer = trained(RLW(), 2)
    begin(TrainerState(global_step=0), balancer=balancer)
    assert balancer.step == 2


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: TrainerState(global_step=3), "before the balancer was attached"),
        (lambda: saved_by(other=trained(MGDA(), 1)), "before the balancer was attached"),
        (lambda: saved_by(balancer=trained(RLW(), 1)), "step 3, balancer 'balancer': .*belongs to rule"),
    ],
)
def test_a_foreign_checkpoint_is_refused(state: object, message: str) -> None:
    balancer = trained(MGDA(), 2)
    with pytest.raises(ValueError, match=message):
        begin(state(), balancer=balancer)
    assert balancer.step == 2


def test_a_tampered_checkpoint_is_refused() -> None:
    state = saved_by(balancer=trained(MGDA(), 1))
    state.stateful_callbacks["BalancerCallback"]["attributes"]["balancers"]["balancer"]["step"] = 9
    with pytest.raises(ValueError, match="digest does not fit"):
        begin(state, balancer=trained(MGDA(), 2))


def test_windows_take_each_report_once_and_stay_small() -> None:
    balancer = trained(Smooth(MGDA(), 0.5), 1)
    window = LogWindow(balancer, "decoder/")
    window.add_micro_batch()  # the report of before
    window.close_step()
    assert window.row() == {}
    weights = []
    for k in range(300):
        step(balancer, 1 + k % 2)
        weights.append(balancer.report.weights["a"])
        window.add_micro_batch()
        window.add_micro_batch()
        window.close_step()
        assert len(window._pending) < 128
    row = window.row()
    assert row["mtl/decoder/weight/a"] == pytest.approx(sum(weights) / 300, rel=1e-12)
    assert {key.split("/")[0] for key in row} == {"mtl", "perf"}
    assert window.row() == {}


def test_held_is_the_share_of_steps() -> None:
    balancer = Balancer(["a", "b"], MGDA(), on_nonfinite="hold")
    window = LogWindow(balancer, "")
    for bad in (False, True, False, False):
        balancer(torch.full((2, 3), torch.nan if bad else 0.1, requires_grad=True), HEADS)
        window.add_micro_batch()
        window.close_step()
    assert window.row()["mtl/held"] == 0.25
