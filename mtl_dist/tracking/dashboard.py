"""The W&B workspace for the rows of `mtl_dist`, as code: each chart shows all tasks and compares the runs."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Sequence
from typing import Any

from mtl_dist.tracking.keys import STEP_KEY, check_task_names
from mtl_dist.tracking.tracker import require


def build_workspace(entity: str, project: str, tasks: Sequence[str] = (), name: str = "mtl_dist") -> Any:
    """A `wandb_workspaces.workspaces.Workspace`; this needs no account and no network.

    Args:
        entity: user or team.
        project: W&B project.
        tasks: the tasks to show. Empty: all tasks of the runs, without a bar chart of the final weights.
        name: name of the view.

    Raises:
        ValueError: wandb-workspaces is not installed, a task cannot be part of a key, or a name is empty.
    """
    require("wandb_workspaces", "dashboard", "wandb")
    check_task_names(tasks)
    for what, given in (("entity", entity), ("project", project), ("name", name)):
        if not given.strip():
            raise ValueError(f"{what}: give a name, got {given!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from pydantic, about the validators of wandb-workspaces 0.4.13
        import wandb_workspaces.workspaces as ws

        sections = [
            ws.Section(name=title, is_open=True, panels=panels) for title, panels in _sections(tasks).items()
        ]
        settings = ws.WorkspaceSettings(x_axis=STEP_KEY)
        return ws.Workspace(
            entity=entity,
            project=project,
            name=name,
            sections=sections,
            settings=settings,
            auto_generate_panels=False,
        )


def workspace_spec(workspace: Any) -> dict[str, Any]:
    """What `Workspace.save()` sends, as plain data."""
    # the package has no public function for this; this line is why it is pinned below 0.5
    spec: dict[str, Any] = workspace._to_model().spec.model_dump(
        mode="json", by_alias=True, exclude_none=True
    )
    return spec


def _sections(tasks: Sequence[str]) -> dict[str, list[Any]]:
    wr: Any = importlib.import_module("wandb_workspaces.reports.v2")

    one = f"({'|'.join(map(re.escape, tasks))})" if tasks else ".*"
    measured = f"{one}/.*" if tasks else f"{_any_but('loss')}/.*"
    place = _places()

    def lines(title: str, pattern: str, **options: Any) -> Any:
        return wr.LinePlot(title=title, x=STEP_KEY, metric_regex=pattern, layout=next(place), **options)

    def single(title: str, *keys: str, **options: Any) -> Any:
        return wr.LinePlot(title=title, x=STEP_KEY, y=list(keys), layout=next(place), **options)

    sections = {
        "Tasks": [
            lines("Weights", f"mtl/weight/{one}"),
            lines("Contributions: part of the update", f"mtl/contribution/{one}"),
            lines("Losses", f"mtl/loss/{one}", log_y=True),
            lines("Gradient norms", f"mtl/grad_norm/{one}", log_y=True),
            lines("Validation losses", f"eval/loss/{one}", log_y=True),
            lines("Validation metrics", f"eval/{measured}"),
        ]
    }
    place = _places()
    pair = f"{one}__{one}" if tasks else ".*"
    sections["Gradients"] = [
        lines("Cosines between tasks", f"mtl/cosine/{pair}", range_y=(-1, 1)),
        single("Conflict rate", "mtl/conflict_rate", range_y=(0, 1)),
        single("Entropy of the weights", "mtl/weight_entropy"),
    ]
    place = _places()
    sections["Run"] = [
        single("Weighted total", "train/loss", log_y=True),
        single("Milliseconds per step", "perf/step_ms"),
        single("Milliseconds in the collectives of mtl_dist", "perf/sync_ms"),
        single("Steps held because of NaN or infinite statistics", "mtl/held"),
    ]
    place = _places()
    heatmap = wr.MediaBrowser(
        title="Cosines at the end", media_keys=["mtl/final/cosine_heatmap"], layout=next(place)
    )
    bars = [f"mtl/weight/{task}" for task in tasks]
    sections["End"] = [
        *([wr.BarPlot(title="Final weights", metrics=bars, layout=next(place))] if bars else []),
        heatmap,
        wr.WeavePanelSummaryTable(table_name="mtl/final/weights", layout=next(place)),
        wr.WeavePanelSummaryTable(table_name="mtl/final/cosines", layout=next(place)),
    ]
    sections["Runs compared"] = [wr.RunComparer(diff_only="split", layout=wr.Layout(x=0, y=0, w=24, h=9))]
    return sections


def _places() -> Any:
    """Places for three panels per line, on the grid of W&B with 24 columns."""
    wr: Any = importlib.import_module("wandb_workspaces.reports.v2")

    return (wr.Layout(x=8 * (i % 3), y=7 * (i // 3), w=8, h=7) for i in range(100))


def _any_but(word: str) -> str:
    """A pattern for one part of a key that is not `word`. The patterns of W&B have no look-ahead."""
    starts = [f"{re.escape(word[:i])}[^/{re.escape(c)}][^/]*" for i, c in enumerate(word)]
    shorter = [re.escape(word[:i]) for i in range(1, len(word))]
    return f"({'|'.join([*starts, *shorter, re.escape(word) + '[^/]+'])})"
