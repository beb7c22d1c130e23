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


@pytest.fixture(scope="module")
def slurm(
    request: pytest.FixtureRequest, hosts: list[Host], cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Slurm]:
    missing = [name for name in PROGRAMS if not shutil.which(name, path="/usr/bin:/usr/sbin")]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing: apt install slurm-wlm munge")
    environment = cluster.environment() | {"CONFIG": "launch/accelerate/cpu2.yaml"}
    slurm = Slurm(hosts, tmp_path_factory.mktemp(request.param), f"proctrack/{request.param}", environment)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


def submit(
    slurm: Slurm, cluster: Cluster, name: str, script: str = "train", sbatch: tuple = (), **options: object
) -> str:
    """Submit the run as a user would; gives the number of the job."""
    arguments = cluster.arguments(name, **OPTIONS | options)
    words = [*sbatch, f"--output={cluster.folder}/{name}.log", f"launch/slurm/{script}.sbatch", *arguments]
    return slurm.run("sbatch", "--parsable", *words, folder=ROOT)


def has_ended(slurm: Slurm, job: str) -> bool:
    return slurm.job(job)["JobState"] not in ("RUNNING", "COMPLETING", "PENDING", "CONFIGURING")


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


@pytest.mark.parametrize(
    ("slurm", "stop"),
    [
        ("pgid", preempted),
        ("linuxproc", preempted),
        ("linuxproc", near_the_end_of_its_time),
        ("linuxproc", requeued),
    ],
    indirect=["slurm"],
)
def test_a_job_that_is_stopped_goes_on(
    stop: Callable[[Slurm, str], None], slurm: Slurm, cluster: Cluster, on_one_machine: None
) -> None:
    name = f"{stop.__name__}-{slurm.proctrack}"
    log, metrics = cluster.folder / f"{name}.log", cluster.run_folder(name) / "metrics.jsonl"
    job = submit(slurm, cluster, name)
    wait_for("training", lambda: metrics.exists() and lines(metrics)[-1]["step"] > 50, log)
    stop(slurm, job)
    wait_for("the second start", lambda: "start 2, on node[1-2]" in log.read_text(), log)
    wait_for("the end", lambda: has_ended(slurm, job), log)
    found = slurm.job(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    summary = json.loads((cluster.run_folder(name) / "summary.json").read_text())
    assert summary["world_size"] == 2
    # The signal came to the processes of training, which wrote a checkpoint for it.
    stopped_after = re.findall(r"stopped by a signal after step (\d+)", log.read_text())
    assert [str(step) for step in summary["resumed_after"]] == stopped_after
    assert len(stopped_after) == 1
    cluster.assert_as_on_one_machine(name)


@pytest.mark.parametrize("slurm", ["linuxproc"], indirect=True)
@pytest.mark.parametrize(("script", "backend"), [("mi250x", "c10d"), ("a100", "static")])
def test_the_variants_run_without_their_gpus(script: str, backend: str, slurm: Slurm, cluster: Cluster) -> None:
    """On SLURM's word that there are GPUs; the interface of Slingshot is there."""
    name = f"variant-{script}"
    log = cluster.folder / f"{name}.log"
    variables = "PROCESSES_PER_NODE=1,CPU_MASKS=1,CONTAINER=env INSIDE=yes,GLOO_SOCKET_IFNAME=hsn0"
    sbatch = ("--cpus-per-task=2", f"--export=ALL,{variables},RDZV_BACKEND={backend}")
    job = submit(slurm, cluster, name, script, sbatch, train__max_steps=2, train__eval_every=2)
    wait_for("the end", lambda: has_ended(slurm, job), log)
    assert slurm.job(job)["JobState"] == "COMPLETED", log.read_text()
    assert json.loads((cluster.run_folder(name) / "summary.json").read_text())["world_size"] == 2


@pytest.mark.parametrize("slurm", ["linuxproc"], indirect=True)
def test_a_job_that_fails_is_not_put_back(slurm: Slurm, cluster: Cluster) -> None:
    """On one node of two; the other waits for it, until srun asks it to stop after a minute."""
    broken = cluster.folder / "broken.sh"
    broken.write_text('[ "$SLURM_NODEID" = 1 ] && exit 3\nexec "$@"\n')
    log = cluster.folder / "fails.log"
    job = submit(slurm, cluster, "fails", sbatch=(f"--export=ALL,CONTAINER=sh {broken}",))
    wait_for("the end", lambda: has_ended(slurm, job), log)
    found = slurm.job(job)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0"), log.read_text()
    assert "so the job is not put back into the queue" in log.read_text()
