"""launch/slurm/train.sbatch on a real SLURM of two nodes: stopped in every way that SLURM has, with the same result."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import OPTIONS, Cluster
from tests.cluster.hosts import Host
from tests.cluster.slurm import PROGRAMS, Slurm
from tests.launch.conftest import ROOT
from tests.launch.forks import lines

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", params=["pgid", "linuxproc"])
def slurm(
    request: pytest.FixtureRequest, hosts: list[Host], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Slurm]:
    missing = [name for name in PROGRAMS if not shutil.which(name, path="/usr/bin:/usr/sbin")]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing: apt install slurm-wlm munge")
    slurm = Slurm(hosts, tmp_path_factory.mktemp(request.param), f"proctrack/{request.param}")
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


def submit(slurm: Slurm, cluster: Cluster, name: str, *options: str) -> str:
    """Submit the run as a user would; gives the number of the job."""
    slurm.environment = cluster.environment() | {
        "SLURM_CONF": slurm.environment["SLURM_CONF"],
        "CONFIG": "launch/accelerate/cpu2.yaml",
    }
    log = f"--output={cluster.folder}/{name}.log"
    arguments = cluster.arguments(name, **OPTIONS)
    script = ("launch/slurm/train.sbatch", *arguments)
    return slurm.run("sbatch", "--parsable", "--nodes=2", log, *options, *script, folder=ROOT)


def wait_for(what: str, condition: Callable[[], object], log: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        text = log.read_text() if log.exists() else "no log"
        assert time.monotonic() < end, f"{what} took more than {seconds} s:\n{text}"
        time.sleep(0.5)


def near_the_end_of_its_time(slurm: Slurm, job: str) -> None:
    """What --signal=B:USR1@120 does."""
    slurm.run("scancel", "--batch", "--signal=USR1", job)


def preempted(slurm: Slurm, job: str) -> None:
    """By a job of a partition that goes first, with four minutes of grace."""
    slurm.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def requeued(slurm: Slurm, job: str) -> None:
    """By its user or an operator, with KillWait between SIGTERM and SIGKILL."""
    slurm.run("scontrol", "requeue", job)


@pytest.mark.parametrize("stop", [near_the_end_of_its_time, preempted, requeued])
def test_a_job_that_is_stopped_goes_on(
    stop: Callable[[Slurm, str], None], slurm: Slurm, cluster: Cluster, on_one_machine: None
) -> None:
    name = f"{stop.__name__}-{slurm.proctrack}"
    log, metrics = cluster.folder / f"{name}.log", cluster.run_folder(name) / "metrics.jsonl"
    job = submit(slurm, cluster, name)
    wait_for("training", lambda: metrics.exists() and lines(metrics)[-1]["step"] > 50, log)
    stop(slurm, job)
    wait_for("the second start", lambda: "start 2, on node[1-2]" in log.read_text(), log)
    wait_for("the end", lambda: slurm.job(job)["JobState"] not in ("RUNNING", "COMPLETING", "PENDING"), log)
    found = slurm.job(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    summary = json.loads((cluster.run_folder(name) / "summary.json").read_text())
    assert summary["world_size"] == 2
    # The signal came to the processes of training, which wrote a checkpoint for it.
    stopped_after = re.findall(r"stopped by a signal after step (\d+)", log.read_text())
    assert [str(step) for step in summary["resumed_after"]] == stopped_after
    assert len(stopped_after) == 1
    cluster.assert_as_on_one_machine(name)
