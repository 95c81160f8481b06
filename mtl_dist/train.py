"""Trains a recipe: `python -m mtl_dist.train CONFIG key=value ...`, under any launcher of Accelerate."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from mtl_dist.integrations.stop import EXIT_STATUS, SIGNALS, SaveOnSignal
from mtl_dist.tracking import Row, RunLog
from mtl_dist.tracking.files import METRICS, SUMMARY
from mtl_dist.tracking.report import write_report
from mtl_dist.training.best import note_checkpoint
from mtl_dist.training.checkpoints import checkpoints_of, save_checkpoint, space_needed
from mtl_dist.training.debug import findings_text, make_deterministic, step_table
from mtl_dist.training.engine import describe_engine
from mtl_dist.training.evaluate import evaluate
from mtl_dist.training.files import write_json
from mtl_dist.training.optimizer import set_hyperparameters
from mtl_dist.training.record import StepClock, open_log, postfix, save_ids
from mtl_dist.training.resume import Start, agree_on_start, find_start, last_row, launch_notes
from mtl_dist.training.settings import Settings, load_settings
from mtl_dist.training.setup import Run, build_run, claim_output, enter_output, make_accelerator
from mtl_dist.training.step import train_batch
from mtl_dist.training.storage import check_storage, storage_in_words, tree_size
from mtl_dist.training.summary import summarise, table
from mtl_dist.training.together import RunError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command line. Returns the exit status: 2 if a setting is wrong."""
    parser = argparse.ArgumentParser(prog="python -m mtl_dist.train", description=__doc__)
    add_arguments(parser)
    return run_command(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `train`, which `mtl-dist train` uses too."""
    parser.add_argument("--check", action="store_true", help="check the settings and stop")
    parser.add_argument(
        "config", metavar="CONFIG", help="YAML file, such as configs/recipe/multi_digits.yaml"
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="settings, such as weighting.name=mgda steps=50"
    )


def run_command(arguments: argparse.Namespace) -> int:
    """Trains with the parsed arguments. What is wrong is printed, one line each.

    Returns:
        0: trained, or nothing left to do. 1: the output folder cannot do what the run needs. 2: a setting is
            wrong, or a package is missing. 75: a signal stopped it, and its last step is saved.
    """
    try:
        settings = load_settings(arguments.config, arguments.overrides)
        with storage_in_words(settings.output_dir):
            _check(settings)
    except (ValueError, ImportError, RunError) as error:
        _print_once(str(error))
        return 2
    if arguments.check:
        return 0
    try:
        summary = train(settings)
    except RunError as error:
        (_print_once if error.everywhere else _print)(str(error))
        return 1
    return EXIT_STATUS if summary is None else 0


def _check(settings: Settings) -> None:
    """Raises `ValueError` or `ImportError` if it can be seen before the start that the run cannot be."""
    settings.recipe.object.check_installed()
    start = find_start(settings)
    known = checkpoints_of(settings)
    size = tree_size(known[-1]) if known else 0
    check_storage(settings.output_dir, 0 if start.finished else space_needed(settings, start.done, size))


def train(settings: Settings) -> dict[str, Any] | None:
    """Trains until `settings.steps`, from the start or from a checkpoint. Call it on every rank.

    Returns:
        the content of `summary.json`; None if a signal stopped the run (`SaveOnSignal`).

    Raises:
        ValueError: settings that do not work together.
        RuntimeError: the launcher did not start what was asked for, or (`RunError`) the output folder cannot
            do what the run needs.
    """
    with ExitStack() as held:
        accelerator, summary = _trained(settings, held)
    # free the model before its process group: otherwise a Gloo group can hang at exit (torch 2.13)
    accelerator.free_memory()
    accelerator.end_training()
    return summary


def _trained(settings: Settings, held: ExitStack) -> tuple[Accelerator, dict[str, Any] | None]:
    if settings.check:
        make_deterministic()
    accelerator = make_accelerator(settings)
    enter_output(settings, accelerator, held)
    start = agree_on_start(accelerator, settings)
    if accelerator.is_main_process:
        for note in (*launch_notes(), *start.notes):
            _print(note)
    if start.finished:
        if accelerator.is_main_process:
            _print(f"{str(settings.output_dir)!r} is finished: step {start.done} of {settings.steps}")
        return accelerator, json.loads((settings.output_dir / SUMMARY).read_text(encoding="utf-8"))
    run = build_run(settings, accelerator, start.done)
    claim_output(settings, accelerator, start)
    if start.checkpoint is not None:
        accelerator.load_state(str(start.checkpoint))
        # the checkpoint brought its own values
        set_hyperparameters(run.optimizer, settings.learning_rate, settings.weight_decay)
    with open_log(run, start.done, start.checkpoint) as log:
        if accelerator.is_main_process:
            save_ids(settings, log.run_ids)
        # Ray trains in another thread, where Python delivers no signals
        main_thread = threading.current_thread() is threading.main_thread()
        with SaveOnSignal(run.balancer, SIGNALS if main_thread else ()) as stop:
            row = _loop(run, start, log, stop)
        if row is None:
            log.close(None)
            return accelerator, None
        summary = summarise(row, run.recipe, settings, accelerator.num_processes)
        summary["engine"] = describe_engine(accelerator, run.model)
        if settings.check:
            summary["findings"] = [str(finding) for finding in run.balancer.findings]
        views = log.close(summary)
    if accelerator.is_main_process:
        with storage_in_words(settings.output_dir):
            _close(run, summary, views)
    return accelerator, summary


def _loop(run: Run, start: Start, log: RunLog, stop: SaveOnSignal) -> Row | None:
    """The training loop. Returns the row of the last step, with its validation columns; None if stopped."""
    settings, accelerator, done = run.settings, run.accelerator, start.done
    hidden = not accelerator.is_main_process
    clock, step, stopped = StepClock(), done, False
    with tqdm(
        total=settings.steps, initial=done, disable=hidden or settings.check, unit="step", dynamic_ncols=True
    ) as progress:
        for batch in run.loader:
            report = train_batch(run, batch, step)
            log.add(report)
            if not accelerator.sync_gradients:
                continue  # the optimizer step comes with a later micro-batch
            step += 1
            if settings.check and not hidden and report is not None:
                progress.write(step_table(report, step))
            clock.tick()
            saved = _due(settings.checkpoint_every, step)
            judged = saved and settings.best_metric is not None
            evaluated = _due(settings.eval_every, step) or step == settings.steps or judged
            extra = {"perf/step_ms": clock.lap()} if evaluated or log.is_due(step) else {}
            if evaluated:
                with clock.stopped():
                    extra |= evaluate(run.model, run.eval_data, run.recipe, accelerator, settings.batch_size)
            with storage_in_words(settings.output_dir):
                log.step(step, extra, due=evaluated)
            progress.set_postfix_str(postfix(log.last_row, run.recipe.tasks), refresh=False)
            progress.update()
            stopped = stop.requested() and step < settings.steps
            if saved or (stopped and settings.checkpoint_every):
                with clock.stopped(), storage_in_words(settings.output_dir):
                    log.flush()
                    if settings.best_metric is not None and not hidden:
                        folder, mode = settings.output_dir, settings.best_mode
                        note_checkpoint(folder, step, settings.best_metric, mode, extra)
                    save_checkpoint(accelerator, settings, step)
            if stopped:
                break
        with storage_in_words(settings.output_dir):
            log.flush()
    if stopped:
        if not hidden:
            _print(_stopped(settings, step))
        return None
    row = last_row(settings, done) if done == settings.steps else log.last_row
    assert row is not None  # the last step is always due
    return row


def _close(run: Run, summary: dict[str, Any], views: Sequence[str]) -> None:
    """Writes the summary and the report, and prints the results."""
    folder = run.settings.output_dir
    write_json(folder / SUMMARY, summary)
    report = write_report([folder])
    processes = f"{run.accelerator.num_processes} process(es) on {run.accelerator.device.type}"
    print(f"\n{run.settings.steps} steps, {processes}, weighting {run.balancer.weighting}\n")
    print(table(summary, run.recipe), end="\n\n")
    if run.settings.check:
        print(findings_text(run), end="\n\n")
    for path in (
        folder / METRICS,
        folder / SUMMARY,
        report,
        *checkpoints_of(run.settings),
    ):
        print(f"wrote {path}")
    for view in views:
        print(f"see   {view}")


def _stopped(settings: Settings, step: int) -> str:
    where = f"stopped by a signal after step {step} of {settings.steps}"
    if not settings.checkpoint_every:
        return f"{where}; nothing is saved, because checkpoint_every is 0"
    return f"{where}, which is saved; resume_from=auto goes on from there"


def _print(line: str) -> None:
    """One line for whoever started the run."""
    sys.stderr.write(f"mtl_dist.train: {line}\n")
    sys.stderr.flush()


def _print_once(line: str) -> None:
    """The same, of what all ranks find: rank 0 says it."""
    if int(os.environ.get("RANK", "0")) == 0:
        _print(line)
    else:
        time.sleep(2)  # a launcher kills all processes when one ends: rank 0 must print first


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


if __name__ == "__main__":
    raise SystemExit(main())
