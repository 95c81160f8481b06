"""Names of the files that a run leaves in its output folder. Every reader and writer takes them from here."""

from __future__ import annotations

METRICS = "metrics.jsonl"  # one row per optimizer step
RUN = "run.json"  # the settings that a resumed run must not change
SUMMARY = "summary.json"  # written when the run has finished
REPORT = "report.html"  # written when the run has finished, or by `mtl-dist report`
TRACKING = "tracking.json"  # the run's name in each tracker; every checkpoint has a copy
BEST = "best.json"  # which checkpoint is the best, if `best_metric` names a column
CHECKPOINTS = "checkpoints"  # a folder: one `step_<step>` per checkpoint
EVENTS = "events.out.tfevents.*"  # of TensorBoard
CHECKPOINT_PATTERN = "step_????????"  # finished checkpoints only: an unfinished one has another name
