"""What the tests of several hosts share: two hosts, the tiny task of tests/launch, and its result on one machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, connect
from tests.launch.conftest import ROOT, Bench, write_model, write_rte
from tests.launch.forks import assert_same_results

OPTIONS = {
    "train__timeout": 120,
    "train__max_steps": 120,
    "train__eval_every": 40,
    "train__log_every": 5,
    "train__accumulation_steps": 1,
    "train__warmup_ratio": 0.1,
    "checkpoint__every": 40,
    "model__dropout": 0.1,
}
"""Long enough to be stopped on the way; random numbers are drawn, so that a wrong state would show."""


class Cluster(Bench):
    """The task, in a folder that all hosts see."""

    def environment(self) -> dict[str, str]:
        tools = f"{Path(os.sys.executable).parent}:/usr/sbin"
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SRUN_"))}
        return clean | super().environment() | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def assert_as_on_one_machine(self, name: str) -> None:
        """The same metrics, switches, ledger and adapters, bit for bit."""
        assert_same_results(self.folder / "runs", name, "cpu2")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    folder = tmp_path_factory.mktemp("shared")
    write_model(folder / "model")
    write_rte(folder / "glue")
    return Cluster(folder)


@pytest.fixture(scope="session")
def on_one_machine(cluster: Cluster) -> None:
    """Two processes side by side, never stopped."""
    ended = cluster.launch_yaml("cpu2", *cluster.arguments("whole cpu2", **OPTIONS))
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="session")
def hosts() -> Iterator[list[Host]]:
    if os.geteuid() != 0:
        pytest.skip("only root may make network namespaces")
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("ip or unshare is missing: apt install iproute2 util-linux")
    hosts = [Host(1), Host(2)]
    try:
        try:
            connect(hosts)
        except OSError as error:
            pytest.skip(f"this machine gives no network namespaces: {error}")
        yield hosts
    finally:
        for host in hosts:
            host.remove()
