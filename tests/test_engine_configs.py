"""Every file of configs/engine: the CPU forms train for real, by the command in their header, and agree."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from engine_launch import (
    FOLDER,
    documented,
    header,
    launch,
    launch_engine,
    relative,
    vectors,
    whole_parameters,
)

from mtl_dist.tracking import read_rows

ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3")  # that run on CPU processes
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
# a rule with a memory, and gradients of every task; a batch of 64 keeps the steps short
SETTINGS = ("weighting={name: smooth, rule: mgda}", "batch_size=64", "recipe.num_validation=101")


def engine(distributed_type: str, model: str, zero_stage: int | None = None, precision: str = "no"):
    return {
        "distributed_type": distributed_type,
        "num_processes": 2,
        "device": "cpu",
        "zero_stage": zero_stage,
        "mixed_precision": precision,
        "model": model,
    }


EXPECTED = {
    "ddp": engine("MULTI_CPU", "DistributedDataParallel"),
    "fsdp2": engine("FSDP", "FSDPMultiDigitsNet"),
    **{f"zero{stage}": engine("DEEPSPEED", "DeepSpeedEngine", stage) for stage in range(4)},
}

QUICK = ["ddp", "fsdp2", "zero2", "zero3"]
SLOW = ["zero0", "zero1"]  # every launch of DeepSpeed takes 18 s of CPU, and these are in the matrix too


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Output folder of three steps under an engine, launched once."""
    folders = {}

    def of(name, *settings):
        if (name, *settings) not in folders:
            folder = tmp_path_factory.mktemp(name)
            chosen = settings or ("steps=3", "checkpoint_every=3")
            done = launch_engine(name, folder, *SETTINGS, *chosen)
            assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
            folders[(name, *settings)] = folder
        return folders[(name, *settings)]

    return of


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    """All parameters of checkpoints, one vector each."""

    def of(*checkpoints):
        return vectors(whole_parameters(tmp_path_factory.mktemp("whole"), *checkpoints))

    return of


@pytest.mark.long
def test_accumulation_schedule_and_clipping_are_the_same_under_all_engines(trained, parameters):
    steps = ("steps=4", "checkpoint_every=4", "accumulation=2", "schedule=cosine", "warmup_steps=1")
    settings = (*steps, "clip_norm=0.3", "learning_rate=1e-2")
    folders = [trained(name, *settings) for name in QUICK]
    expected = statistics(folders[0])
    first, *others = parameters(*(folder / "checkpoints/step_00000004" for folder in folders))
    plain = trained("ddp", *settings[:-2], "clip_norm=null", "learning_rate=1e-2")
    (unclipped,) = parameters(plain / "checkpoints/step_00000004")
    assert relative(unclipped, first) > 1e-3, "clipping does something"
    for name, folder, other in zip(QUICK[1:], folders[1:], others, strict=True):
        assert relative(statistics(folder), expected) < 1e-3, name
        assert relative(other, first) < 1e-3, name


def recorded(folder):
    return json.loads((folder / "summary.json").read_text())["engine"]


def statistics(folder):
    """Weights, losses and gradient norms of every step."""
    kinds = ("mtl/weight/", "mtl/loss/", "mtl/grad_norm/")
    rows = read_rows(folder / "metrics.jsonl")
    return torch.tensor([[v for k, v in sorted(row.items()) if k.startswith(kinds)] for row in rows])


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in SLOW)])
def test_the_command_of_the_header_runs_that_engine_on_two_processes(trained, name):
    assert recorded(trained(name)) == EXPECTED[name]


@pytest.mark.parametrize("names", [QUICK, pytest.param([*QUICK, *SLOW], marks=pytest.mark.long)])
def test_all_engines_train_the_same_parameters_with_the_same_weights(trained, parameters, names):
    folders = [trained(name) for name in names]
    expected = statistics(folders[0])
    assert expected.shape == (3, 12)
    assert relative(expected[2], expected[0]) > 0.01  # not a comparison of nothing with nothing
    finals = parameters(*(folder / "checkpoints/step_00000003" for folder in folders))
    assert len(finals[0]) == 229013  # all of the model
    for name, folder, final in zip(names, folders, finals, strict=True):
        assert relative(statistics(folder), expected) < 1e-5, name
        assert relative(final, finals[0]) < 1e-5, name


@pytest.mark.parametrize("name", FILES)
def test_accelerate_knows_every_key(name):
    loaded = load_config_from_file(str(FOLDER / name))  # refuses unknown keys at the top
    assert (loaded.num_machines, loaded.machine_rank, loaded.use_cpu) == (1, 0, False)
    assert loaded.num_processes == (2 if "_cpu" in name else 8)
    # a misspelt key below is dropped without a word
    options = {action.dest for action in launch_command_parser()._actions}
    for key in loaded.deepspeed_config | loaded.fsdp_config:
        assert key in options, key


@pytest.mark.parametrize("name", ENGINES)
def test_the_cpu_form_differs_by_the_number_of_processes_only(name):
    gpu, cpu = (yaml.safe_load((FOLDER / f"{name}{form}.yaml").read_text()) for form in ("", "_cpu"))
    assert {**gpu, "num_processes": 2} == cpu


@pytest.mark.parametrize("name", FILES)
def test_a_header_names_its_own_commands(name):
    engine_name = name.removesuffix(".yaml").removesuffix("_cpu")
    assert f"--config_file configs/engine/{name} " in documented(name) + " "
    assert f"#   bash launch/node.sh {engine_name} configs/recipe/multi_digits.yaml\n" in header(name)


def test_the_stages_are_what_their_names_say():
    for name in ("zero0", "zero1", "zero2", "zero3"):
        values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["deepspeed_config"]
        assert values["zero_stage"] == int(name[-1])
        assert values["gradient_clipping"] >= 1e6  # 0.0 would become 1.0


@pytest.mark.long
def test_fsdp2_on_a_cpu_is_refused_rather_than_something_else_run(tmp_path):
    command = documented("fsdp2.yaml").replace("--num_processes 8", "--num_processes 2")
    done = launch(command, tmp_path, *SETTINGS, "steps=3")
    assert done.returncode != 0
    assert "ACCELERATE_USE_FSDP asks for FSDP, but Accelerate runs" in done.stderr
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.long
@pytest.mark.parametrize("name", [*ENGINES, "fsdp2"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(trained, parameters, tmp_path, name):
    whole = trained(name, "steps=4", "checkpoint_every=2")
    half = whole / "checkpoints/step_00000002"
    resumed = trained(name, "steps=4", "checkpoint_every=2", f"resume_from={half}")
    final = "checkpoints/step_00000004"
    assert torch.equal(statistics(resumed), statistics(whole)[2:])
    assert torch.equal(*parameters(whole / final, resumed / final))


@pytest.mark.long
@pytest.mark.parametrize("name", ENGINES)
def test_bf16_trains_near_float32(trained, tmp_path, name):
    command = documented(f"{name}_cpu.yaml").replace(" -m ", " --mixed_precision bf16 -m ")
    done = launch(command, tmp_path, *SETTINGS, "steps=20")
    assert done.returncode == 0, done.stderr
    assert recorded(tmp_path) == {**EXPECTED[name], "mixed_precision": "bf16"}
    # bf16 has 8 bits: 0.4 % a rounding, of losses that fall by a factor of ten
    assert relative(statistics(tmp_path), statistics(trained("ddp", "steps=20"))) < 0.05
