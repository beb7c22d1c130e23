"""Processes that were started together and do not know of each other are refused; one that is alone is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from srlora_dist import SRLoRACallback, SRLoRAConfig, Switcher
from srlora_dist.engine.launched import launched_engine
from srlora_dist.engine.process import without_local_rank
from srlora_dist.storage.unconnected import HOSTS, RANKS, SIZES, require_connected
from tests.ranks.engines import make_net
from tests.ranks.hf_trainer import make_arguments, make_model

SEVERAL = {
    "Kubeflow, two nodes": {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": "0"},
    "Kubeflow, a blank in the file": {"PET_NNODES": " 2"},
    "Kubeflow, elastic": {"PET_NNODES": "1:4", "PET_NPROC_PER_NODE": "1"},
    "Kubeflow, two GPUs": {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "JOB_COMPLETION_INDEX": "0"},
    "indexed Job": {"JOB_COMPLETION_INDEX": "1"},
    "PMIx": {"PMIX_RANK": "3", "PMIX_NAMESPACE": "prterun-1"},
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
    "MPICH": {"PMI_SIZE": "2", "PMI_RANK": "0"},
    "jsrun": {"JSM_NAMESPACE_SIZE": "12", "JSM_NAMESPACE_RANK": "0"},
    "Flux": {"FLUX_JOB_SIZE": "4", "FLUX_TASK_RANK": "0"},
    "PALS": {"PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1"},
    "SLURM": {"SLURM_STEP_NUM_TASKS": "8"},
    "AWS Batch": {"AWS_BATCH_JOB_NUM_NODES": "2", "AWS_BATCH_JOB_NODE_INDEX": "0"},
    "SageMaker": {"SM_HOSTS": '["algo-1", "algo-2"]'},
    "Azure": {"AZUREML_NODE_COUNT": "2"},
    "Vertex AI": {"CLUSTER_SPEC": '{"cluster": {"workerpool0": ["a:2222"], "workerpool1": ["b:2222"]}}'},
    "TFJob": {"TF_CONFIG": '{"cluster": {"worker": ["a:2222", "b:2222"]}, "task": {"index": 0}}'},
}
ONE = {
    "nothing": {},
    "Kubeflow": {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": "0", "JOB_COMPLETION_INDEX": "0"},
    "Kubeflow, auto": {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "auto"},
    "Kubeflow, fixed": {"PET_NNODES": "1:1"},
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"},
    "srun": {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "PMIX_RANK": "0"},
    "an allocation": {"SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2", "LSB_HOSTS": "a b", "PBS_NP": "8"},
    "SageMaker": {"SM_HOSTS": '["algo-1"]', "SM_NUM_GPUS": "8"},
    "Vertex AI": {"CLUSTER_SPEC": '{"cluster": {"workerpool0": ["a:2222"]}, "task": {"index": 0}}'},
    "not JSON": {"TF_CONFIG": "none", "CLUSTER_SPEC": "{}", "SM_HOSTS": ""},
    "said to be alone": {"WORLD_SIZE": "1", "JOB_COMPLETION_INDEX": "3"},
}


@pytest.fixture
def clean(monkeypatch) -> pytest.MonkeyPatch:
    for name in (*SIZES, *HOSTS, *RANKS, "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "PARALLELISM_CONFIG_", "FSDP_"))]:
        monkeypatch.delenv(name)
    return monkeypatch


def put(clean: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        clean.setenv(name, value)


@pytest.mark.parametrize("name", SEVERAL)
def test_one_of_several_is_refused(name: str, clean) -> None:
    put(clean, SEVERAL[name])
    for check in (launched_engine, require_connected):
        with pytest.raises(ValueError, match="in the environment .*by itself: start accelerate launch or torchrun"):
            check()
    clean.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="would train by itself"):
        launched_engine()


@pytest.mark.parametrize("name", ONE)
def test_one_alone_is_not_refused(name: str, clean, recwarn) -> None:
    put(clean, ONE[name])
    assert launched_engine() == "plain"
    require_connected()
    assert not recwarn.list


@pytest.mark.parametrize("name", ["JOB_COMPLETION_INDEX", "PMIX_RANK"])
def test_the_first_of_perhaps_several_is_warned(name: str, clean) -> None:
    """A Job of one pod has the same environment as the first pod of many."""
    clean.setenv(name, "0")
    with pytest.warns(UserWarning, match=f"{name} is 0 in the environment .*may be the first of several"):
        assert launched_engine() == "plain"


def test_processes_of_a_launcher_know_of_each_other(clean) -> None:
    put(clean, SEVERAL["Kubeflow, two nodes"] | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"})
    put(clean, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
    assert launched_engine() == "ddp"


@pytest.mark.parametrize("environment", [SEVERAL["indexed Job"], {"WORLD_SIZE": "2", "RANK": "0"}])
def test_a_loop_and_a_trainer_are_told_too(environment: dict, clean, tmp_path: Path) -> None:
    """Where ``torch.distributed`` was never set up, in a process that a launcher has started as well."""
    model = make_net()
    switcher = Switcher(model, SRLoRAConfig(target_rank=8, svd_cache=str(tmp_path)), 20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    args = make_arguments(tmp_path)
    assert args.world_size == 1
    put(clean, environment)
    with pytest.raises(ValueError, match="is .* in the environment.*trains? by itself"):
        switcher.bind(model, optimizer)
    with pytest.raises(ValueError, match="is .* in the environment.*trains? by itself"):
        SRLoRACallback(SRLoRAConfig(target_rank=8)).on_init_end(args, None, None, model=make_model())


DEEPSPEED = {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


def test_the_command_deepspeed_without_a_word_to_accelerate_is_refused(clean) -> None:
    put(clean, DEEPSPEED | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    with pytest.raises(ValueError, match="command deepspeed .*zero2.yaml --num_processes 2 launch/train.py, or"):
        launched_engine()
    clean.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    clean.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds_configs/zero2.json")
    assert launched_engine() == "zero2"
    assert without_local_rank(["--local_rank=1", "--seed=3"]) == ["--seed=3"]
    clean.delenv("RANK")
    assert without_local_rank(["--local_rank=1"]) == ["--local_rank=1"]


def test_a_trainer_under_the_command_deepspeed_is_warned(clean, tmp_path: Path, caplog) -> None:
    args = make_arguments(tmp_path)
    put(clean, {name: DEEPSPEED[name] for name in ("CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE")})
    SRLoRACallback(SRLoRAConfig(target_rank=8)).on_init_end(args, None, None, model=make_model())
    assert "no deepspeed=, so that the Trainer runs DDP" in caplog.text


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"DP_REPLICATE": "2", "DP_SHARD": "4"}, "asks for HSDP "),
        ({"TP": "2"}, "asks for tensor parallelism,"),
        ({"CP": "2", "TP": "1", "DP_REPLICATE": "1"}, "asks for context parallelism,"),
        ({"DP_REPLICATE": "2", "TP": "2"}, "asks for HSDP .* and tensor parallelism,"),
        ({"DP_SHARD": "4"}, "asks for a parallelism_config,"),
    ],
)
def test_what_a_parallelism_config_asks_for_is_named(sizes: dict, named: str, clean) -> None:
    put(clean, {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
    put(clean, {f"PARALLELISM_CONFIG_{name}_SIZE": size for name, size in sizes.items()})
    with pytest.raises(ValueError, match=f"the launch {named}.*leave parallelism_config out"):
        launched_engine()
