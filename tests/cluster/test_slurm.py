"""launch/slurm.sh under a real SLURM: requeued, and stopped ahead of its time limit, it goes on by itself.

apt-get install slurmd slurmctld slurm-client munge
bash launch/test.sh --long tests/cluster/test_slurm.py          as root
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time

import pytest
import test_launch
from machines import SETTINGS, course, last_step, wait_for_row
from namespaces import why_not
from program import ROOT, environment, train

MISSING = [tool for tool in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(tool) is None]
REASON = why_not() or (f"{', '.join(MISSING)} missing: apt-get install slurmd slurmctld slurm-client munge")
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not() or MISSING), reason=REASON),
]
STEPS = ("steps=400", "checkpoint_every=50", "batch_size=32")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path):
    """A SLURM of one node, and a copy of the repository from which jobs are submitted."""
    folder, clone = tmp_path / "slurm", tmp_path / "clone"
    (folder / "state").mkdir(parents=True)
    values = {"host": socket.gethostname(), "ports": [test_launch.free_port(), test_launch.free_port()]}
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, cpus=os.cpu_count(), **values))
    env = environment({"SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)})

    def call(*command, check=True):
        done = subprocess.run(
            [str(part) for part in command], env=env, cwd=clone, capture_output=True, text=True
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, clone / name)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, clone / name)
    test_launch.installed(clone, "recipes")
    if subprocess.run(["munge", "-n"], capture_output=True).returncode:
        os.makedirs("/run/munge", exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        call("runuser", "-u", "munge", "--", "munged")
    daemons = [
        subprocess.Popen([*command], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in (("slurmctld", "-D"), ("slurmd", "-D", "-N", "n1"))
    ]
    try:
        limit = time.monotonic() + 60
        while "idle" not in call("sinfo", "--noheader", check=False):
            assert time.monotonic() < limit, "SLURM does not start"
            time.sleep(0.5)
        yield call
        call("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        call("scancel", "--user=root", check=False)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


@pytest.mark.parametrize("fault", ["requeue", "time limit"])
def test_the_job_goes_on_by_itself(slurm, tmp_path, fault):
    out = tmp_path / "out"
    said = slurm(
        "sbatch", "launch/slurm.sh", "ddp", test_launch.RECIPE, f"output_dir={out}", *SETTINGS, *STEPS
    )
    job = re.search(r"\d+", said)[0]
    wait_for_row(out, 120)
    if fault == "requeue":
        slurm("scontrol", "requeue", job)
    else:
        slurm("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 makes SLURM send
    limit = time.monotonic() + 120
    while "JobState=PENDING" not in slurm("scontrol", "show", "job", job):
        assert time.monotonic() < limit, "it is not queued again"
        time.sleep(0.5)
    if fault == "time limit":
        stopped = last_step(out)
        assert (out / "checkpoints" / f"step_{stopped:08d}").is_dir(), "not saved"
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM waits two minutes otherwise
    limit = time.monotonic() + 240
    while "JobState=COMPLETED" not in (state := slurm("scontrol", "show", "job", job)):
        assert time.monotonic() < limit, state
        assert "JobState=FAILED" not in state, (tmp_path / "clone" / f"mtl_dist-{job}.log").read_text()[
            -3000:
        ]
        time.sleep(1)
    assert "Restarts=1" in state
    log = (tmp_path / "clone" / f"mtl_dist-{job}.log").read_text(errors="replace")
    assert log.count("this job has no GPUs") == 2, "the log of the first part is gone"
    train(tmp_path / "whole", 2, *SETTINGS, *STEPS)
    assert course(out) == course(tmp_path / "whole")
