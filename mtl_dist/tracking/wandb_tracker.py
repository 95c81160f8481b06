"""Weights & Biases: the rows against `train/global_step`, and tables at the end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from mtl_dist.tracking.final import cosine_matrix, cosine_svg, final_weights
from mtl_dist.tracking.keys import STEP_KEY
from mtl_dist.tracking.rows import Row
from mtl_dist.tracking.tracker import RunInfo, Tracker, require


class WandbTracker(Tracker):
    """A W&B run, online or offline. `mtl-dist dashboard` creates charts for it.

    A resumed run continues the W&B run of its checkpoint, and both parts are one series. The x axis of every
    column is `train/global_step`. The step of W&B itself cannot go back, so it is not used.

    Args:
        project: W&B project.
        entity: user or team. None: the default of the account.
        name: name of the run. None: the last part of its output folder.
        group: group of runs.
        mode: None: the value of WANDB_MODE, or else online. `wandb sync` sends offline runs later.
        init_timeout: how many seconds the start of an online run may take.
    """

    name = "wandb"

    def __init__(
        self,
        project: str = "mtl-dist",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        init_timeout: float = 30,
    ) -> None:
        require("wandb", self.name, "wandb")
        self._options: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "group": group,
            "job_type": "train",
        }
        self._name = name
        self._mode = mode
        self._init_timeout = init_timeout
        self._run: Any = None
        self._info: RunInfo | None = None
        self._latest: Row = {}

    def start(self, run: RunInfo) -> None:
        """Opens a new run, or continues the run in `run.resume`.

        Raises:
            RuntimeError: the mode is online, and there is no API key or the server does not answer.
        """
        import wandb

        if self._online() and not _has_key():
            raise RuntimeError("no W&B API key; run `wandb login`, set WANDB_API_KEY, or use mode: offline")
        self._info = run
        try:
            self._run = self._begin(run)
        except wandb.errors.Error as error:
            raise RuntimeError(
                f"W&B did not start a run ({error}); check network, key and WANDB_BASE_URL, or use "
                "mode: offline"
            ) from error
        define_wandb_metrics(self._run)
        self.run_id = self._run.id

    def _begin(self, run: RunInfo) -> Any:
        import wandb

        return wandb.init(
            **self._options,
            name=self._name or run.folder.name,
            mode=self._mode,
            id=run.resume.get(self.name),
            resume="allow",
            reinit="create_new",  # does not touch a W&B run that the user has opened
            dir=run.folder,
            config=dict(run.config),
            settings=wandb.Settings(init_timeout=self._init_timeout, silent=True, console="off"),
        )

    def log(self, row: Row) -> None:
        """Queues the row for the process of W&B."""
        self._latest.update(row)
        self._run.log(dict(row))

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Adds the final tables of a finished run, and waits until everything is written."""
        if self._run is None:
            return
        if summary is not None and self._latest:
            self._run.log({STEP_KEY: self._latest[STEP_KEY], **self._tables()})
            self._run.summary.update({"num_processes": summary.get("num_processes")})
        folder = os.path.dirname(self._run.dir)
        where = f"wandb sync {folder}" if self._run.offline else self._run.url
        self._run.finish(exit_code=0 if summary is not None else 1)
        self.where = where

    def _tables(self) -> dict[str, Any]:
        import wandb

        assert self._info is not None  # `start` was called
        tasks = self._info.tasks
        weights = final_weights(self._latest, tasks)
        tables: dict[str, Any] = {
            "mtl/final/weights": wandb.Table(
                columns=list(weights[0]), data=[list(r.values()) for r in weights]
            )
        }
        matrix = cosine_matrix(self._latest, tasks)
        if matrix is not None:
            rows = [[task, *line] for task, line in zip(tasks, matrix, strict=True)]
            tables["mtl/final/cosines"] = wandb.Table(columns=["task", *tasks], data=rows)
            tables["mtl/final/cosine_heatmap"] = wandb.Html(cosine_svg(tasks, matrix), inject=False)
        return tables

    def _online(self) -> bool:
        return (self._mode or os.environ.get("WANDB_MODE") or "online") == "online"


def _has_key() -> bool:
    """Whether an API key exists. Without this check, W&B would stop the training and prompt for a key."""
    import wandb

    return bool(os.environ.get("WANDB_API_KEY")) or wandb.login(prompt=False, verify=False)


def define_wandb_metrics(run: Any) -> None:
    """Makes `train/global_step` the x axis of every column of `run`.

    Use it for runs that another program has opened, such as `accelerator.get_tracker("wandb", unwrap=True)`.
    Then log rows with `mtl_dist.integrations.accelerate.log_row(accelerator, row)`, which gives W&B no
    `step=`: its own step cannot go back when a run is resumed.
    """
    run.define_metric(STEP_KEY)
    run.define_metric("*", step_metric=STEP_KEY)
