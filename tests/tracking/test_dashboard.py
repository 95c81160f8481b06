"""The workspace: every key we log is drawn, the specification is as reviewed, and `save` sends just that."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
import warm
from program import ROOT

from mtl_dist import cli
from mtl_dist.stats import StepReport, TaskStats
from mtl_dist.tracking import STEP_KEY, step_row
from mtl_dist.tracking.dashboard import build_workspace, workspace_spec

GOLDEN = Path(__file__).parent / "workspace.json"
TASKS = ("seg", "depth.v2", "lossy", "lo")  # two of them look like another part of a key
TABLES = {"mtl/final/weights", "mtl/final/cosines", "mtl/final/cosine_heatmap"}


def logged_keys():
    """Every key that the training program can log for `TASKS`."""
    ones = torch.ones(len(TASKS), dtype=torch.float64)
    vectors = torch.randn(len(TASKS), 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stats = TaskStats(ones, ones > 0, vectors @ vectors.T, ones)
    row = step_row(StepReport(TASKS, stats, ones, torch.tensor(True)), 1)
    evaluated = {f"eval/loss/{task}" for task in TASKS} | {f"eval/{task}/accuracy" for task in TASKS}
    return (set(row) | evaluated | {"perf/step_ms"} | TABLES) - {STEP_KEY}


def panels(spec):
    return [p for s in spec["section"]["panelBankConfig"]["sections"] for p in s["panels"]]


def shown(panel, key):
    config = json.dumps(panel["config"])
    pattern = panel["config"].get("metricRegex")
    return bool(re.search(pattern, key)) if pattern else f'"{key}"' in config


def without_ids(spec):
    return json.loads(re.sub(r'"__id__": "[^"]*", ', "", json.dumps(spec)))


@pytest.mark.parametrize("tasks", [(), TASKS])
def test_every_logged_key_is_in_one_panel(tasks):
    spec = workspace_spec(build_workspace("acme", "digits", tasks))
    for key in logged_keys():
        titles = [p["config"].get("chartTitle") for p in panels(spec) if shown(p, key)]
        expected = 2 if tasks and key.startswith("mtl/weight/") else 1  # the bars show final weights too
        assert len(titles) == expected, (key, titles)


def test_the_key_check_can_fail():
    spec = workspace_spec(build_workspace("acme", "digits"))
    assert not any(shown(panel, "mtl/new_key") for panel in panels(spec))


def test_named_tasks_show_no_others():
    spec = workspace_spec(build_workspace("acme", "digits", ["depth.v2"]))
    for key in ("mtl/weight/seg", "mtl/weight/depthxv2", "mtl/cosine/seg__depth.v2", "eval/seg/miou"):
        assert not any(shown(panel, key) for panel in panels(spec)), key


def test_all_charts_run_over_optimizer_steps():
    lines = [
        p
        for p in panels(workspace_spec(build_workspace("a", "b")))
        if p["viewType"] == "Run History Line Plot"
    ]
    assert len(lines) == 13
    assert {p["config"]["xAxis"] for p in lines} == {STEP_KEY}
    assert {p["config"]["chartTitle"] for p in lines if p["config"].get("yLogScale")} == {
        *("Losses", "Gradient norms", "Validation losses", "Weighted total")
    }


def test_the_specification_is_as_reviewed():
    spec = without_ids(workspace_spec(build_workspace("acme", "digits", TASKS)))
    assert spec == json.loads(GOLDEN.read_text()), (
        "look at the change, then: python -m tests.tracking.test_dashboard"
    )


def test_the_file_needs_no_account(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    path = tmp_path / "workspace.json"
    arguments = ["dashboard", "--entity", "acme", "--project", "digits", "--tasks", *TASKS]
    assert cli.main([*arguments, "--json", str(path)]) == 0
    assert without_ids(json.loads(path.read_text())) == json.loads(GOLDEN.read_text())
    assert capsys.readouterr().out == f"wrote {path}\n"


def test_a_wrong_task_name_is_status_2(capsys):
    assert cli.main(["dashboard", "--entity", "a", "--project", "b", "--tasks", "x y", "--json", "z"]) == 2
    assert "mtl-dist dashboard: task 'x y' cannot be part of a column name" in capsys.readouterr().err


def test_tasks_once_and_names_that_are_not_empty(capsys):
    for given, message in (
        (["a", "b", "--tasks", "x", "x"], "tasks: give each task once, got ['x', 'x']"),
        (["", "b"], "entity: give a name, got ''"),
        (["a", " "], "project: give a name, got ' '"),
    ):
        entity, project, *rest = given
        assert cli.main(["dashboard", "--json", "z", "--entity", entity, "--project", project, *rest]) == 2
        assert f"mtl-dist dashboard: {message}" in capsys.readouterr().err


class Stub(BaseHTTPRequestHandler):
    """As much of W&B's GraphQL as saving a workspace asks for."""

    requests: list[dict] = []

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Stub.requests.append(request)
        view = {"id": "1", "name": "nw-abc-v"}
        user = {"id": "1", "username": "me", "entity": "acme", "flags": "{}", "teams": {"edges": []}}
        data = {"viewer": user, "upsertView": {"view": view, "inserted": True}}
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def save(port, home, key="0" * 40):
    environment = {
        "HOME": str(home),
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        "WANDB_API_KEY": key,
        "WANDB_ERROR_REPORTING": "false",
        "PYTHONPATH": str(ROOT),
    }
    arguments = ["--entity", "acme", "--project", "digits", "--tasks", *TASKS]
    program = ROOT / "tests" / "console.py"
    return warm.launch(program, 1, "dashboard", *arguments, env=environment, modules=warm.TRAINING)


def test_save_sends_the_specification(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Stub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        done = save(server.server_port, tmp_path)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"saved http://127.0.0.1:{server.server_port}/acme/digits")
    (sent,) = [request["variables"] for request in Stub.requests if "UpsertView2" in request["query"]]
    assert (sent["entityName"], sent["projectName"], sent["type"]) == ("acme", "digits", "project-view")
    assert without_ids(json.loads(sent["spec"])) == json.loads(GOLDEN.read_text())


def test_without_a_key_it_is_status_1(tmp_path):
    done = save(9, tmp_path, key="")
    assert done.returncode == 1
    assert "mtl-dist dashboard: W&B did not accept the workspace: " in done.stderr
    assert "--json FILE" in done.stderr
    assert "Traceback" not in done.stderr


if __name__ == "__main__":
    text = json.dumps(without_ids(workspace_spec(build_workspace("acme", "digits", TASKS))), indent=1)
    GOLDEN.write_text(text + "\n")
