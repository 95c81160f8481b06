"""Train a recipe: `python -m mtl_dist.train CONFIG key=value ...`, under any launcher of Accelerate."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from mtl_dist.config import Settings, load_settings
from mtl_dist.tracking import JsonlWriter, Row, step_row
from mtl_dist.training.checkpoints import find_checkpoint, save_checkpoint
from mtl_dist.training.engine import describe_engine
from mtl_dist.training.evaluate import evaluate
from mtl_dist.training.setup import METRICS, SUMMARY, Run, build_run, check_output, claim_output
from mtl_dist.training.summary import summarise, table, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status, 2 where a setting is wrong."""
    parser = argparse.ArgumentParser(prog="python -m mtl_dist.train", description=__doc__)
    add_arguments(parser)
    return run_command(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `train`, shared with `mtl-dist train`."""
    parser.add_argument("--check", action="store_true", help="check the settings and stop, before any launch")
    parser.add_argument(
        "config", metavar="CONFIG", help="YAML file, such as configs/recipe/multi_digits.yaml"
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="settings, such as weighting.name=mgda steps=50"
    )


def run_command(arguments: argparse.Namespace) -> int:
    """Trains from parsed arguments. Wrong settings are told by one process, a line each."""
    try:
        settings = load_settings(arguments.config, arguments.overrides)
        find_checkpoint(settings)
        check_output(settings)
    except ValueError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"mtl_dist.train: {error}", file=sys.stderr)
        else:
            time.sleep(2)  # a launcher kills the others when one ends: let rank 0 tell first
        return 2
    if not arguments.check:
        train(settings)
    return 0


def train(settings: Settings) -> dict[str, Any]:
    """Trains from the start, or from a checkpoint, to `settings.steps`; call it on every rank.

    Returns:
        what is also in `summary.json`.

    Raises:
        ValueError: settings that cannot work together.
        RuntimeError: the launcher started something else than was asked for.
    """
    accelerator, summary = _trained(settings)
    # the model has gone before its group: one that outlives a Gloo group can hang at exit (torch 2.13)
    accelerator.free_memory()
    accelerator.end_training()
    return summary


def _trained(settings: Settings) -> tuple[Accelerator, dict[str, Any]]:
    checkpoint, done = find_checkpoint(settings)
    check_output(settings)
    run = build_run(settings, done)
    claim_output(settings, run.accelerator)
    if checkpoint is not None:
        run.accelerator.load_state(str(checkpoint))
    row = _loop(run, done)
    summary = summarise(row, run.recipe, settings, run.accelerator.num_processes)
    summary["engine"] = describe_engine(run.accelerator, run.model)
    if run.accelerator.is_main_process:
        _close(run, summary)
    return run.accelerator, summary


def _loop(run: Run, done: int) -> Row:
    """The training loop; returns the row of the last step, with its validation columns."""
    settings, accelerator = run.settings, run.accelerator
    main_process = accelerator.is_main_process
    metrics = JsonlWriter(settings.output_dir / METRICS, after_step=done) if main_process else None
    progress = tqdm(total=settings.steps, initial=done, disable=not main_process, unit="step")
    row: Row = {}
    with metrics or nullcontext(), progress:
        start = time.perf_counter()
        for step, batch in enumerate(run.loader, start=done + 1):
            loss = run.model(**batch)
            accelerator.backward(loss)
            run.optimizer.step()
            run.optimizer.zero_grad()
            report = run.balancer.report
            assert report is not None  # the model's forward called the balancer
            row = step_row(report, step)  # waits for the device, so that the time is the step's
            row["perf/step_ms"] = 1e3 * (time.perf_counter() - start)
            if _due(settings.eval_every, step) or step == settings.steps:
                row |= evaluate(run.model, run.eval_data, run.recipe, accelerator, settings.batch_size)
            if metrics is not None:
                metrics.write(row)
            progress.set_postfix_str(_postfix(row, run.recipe.tasks), refresh=False)
            progress.update()
            if _due(settings.checkpoint_every, step):
                save_checkpoint(accelerator, settings, step)
            start = time.perf_counter()
    return row


def _close(run: Run, summary: dict[str, Any]) -> None:
    """Writes the summary and tells the user."""
    folder = run.settings.output_dir
    write_json(folder / SUMMARY, summary)
    processes = f"{run.accelerator.num_processes} process(es) on {run.accelerator.device.type}"
    print(f"\n{run.settings.steps} steps, {processes}, weighting {run.balancer.weighting}\n")
    print(table(summary, run.recipe), end="\n\n")
    for path in (folder / METRICS, folder / SUMMARY, *sorted(folder.glob("checkpoints/step_????????"))):
        print(f"wrote {path}")


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _postfix(row: Row, tasks: Sequence[str]) -> str:
    """`task weight×loss` of every task present."""
    return " ".join(
        f"{task} {row[f'mtl/weight/{task}']:.3g}×{row[f'mtl/loss/{task}']:.3g}"
        for task in tasks
        if f"mtl/loss/{task}" in row
    )


if __name__ == "__main__":
    raise SystemExit(main())
