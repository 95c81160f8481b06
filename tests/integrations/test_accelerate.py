"""Accelerate: real launches, accumulation, resume, and the launches that fall back silently."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from accelerate.utils import DistributedType
from program import ROOT, run

from mtl_dist import Balancer
from mtl_dist.integrations._checkpoints import register
from mtl_dist.integrations.accelerate import attach, check_launch, data_parallel_group, engine_of
from mtl_dist.weighting import MGDA

SCRIPT = Path(__file__).parent / "accelerate_run.py"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
TWO_ON_CPU = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
TWO_ON_CPU += ["--dynamo_backend", "no", "--main_process_port", "0"]
PROBES = ("FeatureProbe", "FeatureTap")


def start(command: list[str], out: Path, engine: str, *probes: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "True", "DS_ACCELERATOR": "cpu"}
    return run(*command, SCRIPT, out, engine, *probes, env=environment, timeout=240)


def facts(out: Path, rank: int) -> dict:
    return json.loads(Path(f"{out}.{rank}").read_text())


def check_resumed(out: Path, probe: str, kind: str, model: str, zero: int | None = None) -> None:
    """Both ranks ran what was asked for, agree, and went on from the checkpoint bit for bit."""
    ranks = [facts(out, rank)[probe] for rank in range(2)]
    for rank in ranks:
        assert (rank["world_size"], rank["type"], rank["model"], rank["zero"]) == (2, kind, model, zero)
        assert rank["step"] == 8
        assert rank["resumed"] == rank["rows"][4:], "resume is not bitwise"
        assert rank["report"] == rank["rows"][3][0], "the report did not travel"
        assert "sizes.json" in rank["refusal"]
        assert "before the balancer was attached" in rank["refusal"]
    assert ranks[0]["rows"] == ranks[1]["rows"], "ranks disagree"
    names = {file.name.split(".")[0]: file.suffix for file in Path(f"{out}.{probe}").glob("*.safetensors")}
    assert {"balancer", "sizes"} <= names.keys()
    assert not list(Path(f"{out}.{probe}").glob("custom_checkpoint*")), "pickled"


def test_two_processes_accumulate_and_resume(tmp_path: Path) -> None:
    """And with accumulation, where the tap sees gradients divided by 2, both probes report true norms."""
    done = start([*LAUNCH, *TWO_ON_CPU], tmp_path / "two", "ddp", *PROBES)
    assert done.returncode == 0, done.stderr
    for probe in PROBES:
        check_resumed(tmp_path / "two", probe, "MULTI_CPU", "DistributedDataParallel")
    a, b = (facts(tmp_path / "two", 0)[probe]["rows"][0] for probe in PROBES)
    assert a[1] == pytest.approx(b[1], rel=1e-6)
    assert a[0] == pytest.approx(b[0], rel=1e-6)


@pytest.mark.parametrize(
    ("engine", "kind", "model", "zero"),
    [
        pytest.param("zero2", "DEEPSPEED", "DeepSpeedEngine", 2, marks=pytest.mark.long),
        ("zero3", "DEEPSPEED", "DeepSpeedEngine", 3),
        ("fsdp2", "FSDP", "FSDPNet", None),
    ],
)
def test_checkpoints_of_sharded_engines(
    tmp_path: Path, engine: str, kind: str, model: str, zero: int | None
) -> None:
    done = warm.launch(
        *(SCRIPT, 2, tmp_path / "two", engine, "FeatureProbe"),
        env={"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "False"},
        timeout=240,
        modules=warm.DEEPSPEED if engine.startswith("zero") else warm.TRAINING,
    )
    assert done.returncode == 0, done.stderr
    check_resumed(tmp_path / "two", "FeatureProbe", kind, model, zero)


def test_the_cpu_launcher_that_runs_one_process_is_refused(tmp_path: Path) -> None:
    command = [*LAUNCH, "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    done = start([*command, "--dynamo_backend", "no"], tmp_path / "cpu", "ddp", "FeatureProbe")
    assert done.returncode != 0
    assert "asked for several processes on the CPU but started one" in done.stderr
    assert "accelerate launch --multi_gpu" in done.stderr


def accelerator(num_processes: int, kind: DistributedType, **others: object) -> SimpleNamespace:
    return SimpleNamespace(num_processes=num_processes, distributed_type=kind, **others)


@pytest.mark.parametrize(
    ("got", "kind", "environment", "message"),
    [
        (
            1,
            DistributedType.NO,
            {"MTL_DIST_NUM_PROCESSES": "2"},
            r"2 processes were asked for, .* has 1 \(NO\)",
        ),
        (1, DistributedType.NO, {"WORLD_SIZE": "4", "RANK": "0"}, "4 processes were asked for"),
        (
            2,
            DistributedType.MULTI_CPU,
            {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"},
            "ACCELERATE_USE_DEEPSPEED asks for DEEPSPEED, but Accelerate runs MULTI_CPU",
        ),
        (
            2,
            DistributedType.MULTI_CPU,
            {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"},
            "asks for FSDP, but Accelerate runs MULTI_CPU",
        ),
    ],
)
def test_fallbacks_say_what_to_change(
    got: int, kind: DistributedType, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        check_launch(accelerator(got, kind), environment)


@pytest.mark.parametrize(
    ("got", "kind", "environment"),
    [
        (1, DistributedType.NO, {}),
        (1, DistributedType.NO, {"MASTER_PORT": "29500"}),  # somebody's own setting
        (1, DistributedType.NO, {"ACCELERATE_MIXED_PRECISION": "no"}),  # accelerate launch of one process
        (2, DistributedType.MULTI_CPU, {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "1"}),
        (2, DistributedType.DEEPSPEED, {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}),
        (2, DistributedType.MULTI_GPU, {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "false"}),
    ],
)
def test_sound_launches_pass(got: int, kind: DistributedType, environment: dict[str, str]) -> None:
    check_launch(accelerator(got, kind), environment)


class Mesh(dict):
    """A device mesh with named axes; each axis gives its name as its group."""

    mesh_dim_names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        self.mesh_dim_names = names
        super().__init__(
            {name: SimpleNamespace(get_group=lambda name=name: name) for name in (*names, "dp", "dp_cp")}
        )


@pytest.mark.parametrize(
    ("mesh", "group"),
    [
        (None, None),
        (Mesh("dp_shard"), "dp_shard"),
        (Mesh("dp_shard", "tp"), "dp_shard"),
        (Mesh("dp_replicate", "dp_shard", "tp"), "dp"),
        (Mesh("cp"), "cp"),
        (Mesh("dp_shard", "cp", "tp"), "dp_cp"),
    ],
)
def test_group_is_the_data_parallel_one(mesh: Mesh | None, group: str | None) -> None:
    assert data_parallel_group(SimpleNamespace(torch_device_mesh=mesh)) == group


def test_mesh_without_a_data_parallel_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="no data-parallel axis"):
        data_parallel_group(SimpleNamespace(torch_device_mesh=Mesh("tp")))


def test_sequences_that_deepspeed_splits_are_refused() -> None:
    split = SimpleNamespace(sp_size=2)
    with pytest.raises(ValueError, match=r"sequence parallelism \(size 2\): the engine sums gradients"):
        data_parallel_group(SimpleNamespace(torch_device_mesh=None, parallelism_config=split))


def scaled(**others: object) -> SimpleNamespace:
    """An accelerator with a loss scale of 8 that accumulates 4 micro-batches."""
    facts = {
        "scaler": SimpleNamespace(scale=lambda one: 8 * one),
        "torch_device_mesh": None,
        "gradient_accumulation_steps": 4,
        "sync_gradients": False,
        "optimizer_step_was_skipped": True,
        "mixed_precision": "fp16",
        "state": SimpleNamespace(deepspeed_plugin=None),
    }
    return accelerator(1, DistributedType.NO, **{**facts, **others})


def test_the_engine_is_what_the_accelerator_says() -> None:
    engine = engine_of(scaled())
    assert engine.scaled(torch.ones(())) == 8
    assert not engine.closes_window()
    assert engine.skipped()
    assert not engine.partitioned
    assert engine_of(scaled(scaler=None)).scaled is None


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_keeps_its_scale_in_the_optimizer(stage: int) -> None:
    of = scaled(scaler=None, state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)))
    of.distributed_type = DistributedType.DEEPSPEED
    engine = engine_of(of)  # before `prepare`, when there is no optimizer yet
    of._optimizers = [SimpleNamespace(optimizer=SimpleNamespace(loss_scale=16.0))]
    assert engine.scaled(torch.ones(())) == 16
    assert engine.partitioned == (stage == 3)


def test_a_held_window_is_the_accumulation_of_the_accelerator() -> None:
    with pytest.raises(ValueError, match="window=2 micro-batches, and the engine accumulates 4"):
        attach(Balancer(["a"], MGDA(), window=2), scaled())


class Recorder(SimpleNamespace):
    """An accelerator that remembers its hooks."""

    __hash__ = object.__hash__

    def __init__(self, *, main: bool, on_each_node: bool = False) -> None:
        configuration = SimpleNamespace(save_on_each_node=on_each_node)
        super().__init__(
            is_main_process=main, is_local_main_process=True, project_configuration=configuration, hooks=[]
        )
        self.register_save_state_pre_hook = self.register_load_state_pre_hook = self.hooks.append


def test_names_keep_balancers_apart() -> None:
    to, first, second = Recorder(main=True), Balancer(["a"], MGDA()), Balancer(["a"], MGDA())
    register(first, to, "balancer")
    with pytest.raises(ValueError, match="already attached, as 'balancer': call attach once"):
        register(first, to, "again")
    with pytest.raises(ValueError, match=r"it still exists \(at step 0\).*detach\('balancer', \.\.\.\)"):
        register(second, to, "balancer")
    with pytest.raises(ValueError, match="letters, digits"):
        register(second, to, "b/c")
    register(second, to, "second")
    assert len(to.hooks) == 2, "one for save_state, one for load_state"


@pytest.mark.parametrize(
    ("main", "on_each_node", "writes"), [(True, False, True), (False, False, False), (False, True, True)]
)
def test_one_process_writes(tmp_path: Path, main: bool, on_each_node: bool, writes: bool) -> None:
    to = Recorder(main=main, on_each_node=on_each_node)
    balancer = Balancer(["a"], MGDA())
    register(balancer, to, "balancer")
    to.hooks[0]([], [], str(tmp_path))
    assert (tmp_path / "balancer.json").exists() == writes
