"""``accelerate launch`` on two hosts with their own addresses, without SLURM: the same result as on one machine."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from tests.cluster.conftest import OPTIONS, Cluster
from tests.cluster.hosts import Host
from tests.launch.conftest import ROOT
from tests.launch.forks import lines

pytestmark = pytest.mark.timeout(900)


def launch(hosts: list[Host], cluster: Cluster, name: str, config: str, backend: str) -> None:
    """Start the run on both hosts and wait for it; the second one is told another output folder."""
    processes = []
    for rank, host in enumerate(hosts):
        options = ["--config_file", f"launch/accelerate/{config}.yaml", "--num_machines", 2, "--num_processes", 2]
        options += ["--machine_rank", rank, "--main_process_ip", hosts[0].name, "--main_process_port", 29500]
        options += ["--rdzv_backend", backend, "--rdzv_conf", f"is_host={int(rank == 0)}"]
        options += ["--deepspeed_multinode_launcher", "standard"]
        arguments = cluster.arguments(name, **OPTIONS)
        if rank == 1:
            arguments += ["--output_dir", cluster.run_folder(f"{name} elsewhere")]
        words = ("accelerate", "launch", *options, "launch/train.py", *arguments)
        log = cluster.folder / f"{name}-{host.name}.log"
        processes.append(host.start(*words, log=log, environment=cluster.environment(), folder=ROOT))
    try:
        statuses = [process.wait(600) for process in processes]
    except subprocess.TimeoutExpired:
        statuses = None
    finally:
        for host in hosts:
            host.clear()
    logs = "\n".join((cluster.folder / f"{name}-{host.name}.log").read_text() for host in hosts)
    assert statuses == [0, 0], logs


@pytest.mark.parametrize("backend", ["static", "c10d"])
def test_two_hosts_give_the_result_of_one(
    backend: str, hosts: list[Host], cluster: Cluster, on_one_machine: None
) -> None:
    launch(hosts, cluster, backend, "cpu2", backend)
    cluster.assert_as_on_one_machine(backend)
    # All of it was written by rank 0, wherever the other one was told to write.
    assert not cluster.run_folder(f"{backend} elsewhere").exists()


def test_deepspeed_needs_no_ssh(hosts: list[Host], cluster: Cluster, on_one_machine: None) -> None:
    """ZeRO-3 adds up in another order, so its losses agree to rounding."""
    launch(hosts, cluster, "zero3", "zero3_cpu", "c10d")
    summary = json.loads((cluster.run_folder("zero3") / "summary.json").read_text())
    assert (summary["storage"], summary["world_size"]) == ("zero3", 2)
    got, expected = (
        torch.tensor([line["loss"] for line in lines(cluster.run_folder(name) / "metrics.jsonl")])
        for name in ("zero3", "whole cpu2")
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
