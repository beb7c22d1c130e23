"""Detects processes that a launcher started together but that are in no process group, so each would train alone."""

from __future__ import annotations

import json
import os
import warnings

SIZES = {
    "SLURM_STEP_NUM_TASKS": "SLURM's srun",
    "OMPI_COMM_WORLD_SIZE": "Open MPI",
    "PMI_SIZE": "MPICH and Intel MPI",
    "MV2_COMM_WORLD_SIZE": "MVAPICH",
    "JSM_NAMESPACE_SIZE": "LSF's jsrun",
    "FLUX_JOB_SIZE": "Flux",
    "HOROVOD_SIZE": "horovodrun",
    "_CONDOR_NPROCS": "HTCondor",
    "PET_NNODES": "Kubeflow, for torchrun",
    "PET_NPROC_PER_NODE": "Kubeflow, for torchrun",
    "LWS_GROUP_SIZE": "Kubernetes' LeaderWorkerSet",
    "AWS_BATCH_JOB_NUM_NODES": "AWS Batch",
    "AZUREML_NODE_COUNT": "Azure Machine Learning",
    "SKYPILOT_NUM_NODES": "SkyPilot",
    "DSTACK_NODES_NUM": "dstack",
}
"""Variables with the number of processes, or of nodes, that a launcher started, and who sets them."""
HOSTS = {"SM_HOSTS": "SageMaker", "CLUSTER_SPEC": "Vertex AI", "TF_CONFIG": "Vertex AI and Kubeflow's TFJob"}
"""Variables with all hosts as JSON."""
RANKS = {
    "PMIX_RANK": "PMIx",
    "PMI_RANK": "MPICH and Intel MPI",
    "OMPI_COMM_WORLD_RANK": "Open MPI",
    "MV2_COMM_WORLD_RANK": "MVAPICH",
    "PALS_RANKID": "Cray's PALS",
    "ALPS_APP_PE": "Cray's aprun",
    "JSM_NAMESPACE_RANK": "LSF's jsrun",
    "FLUX_TASK_RANK": "Flux",
    "JOB_COMPLETION_INDEX": "an indexed Job of Kubernetes",
    "VC_TASK_INDEX": "Volcano",
}
"""Variables with the rank of this process. Some launchers set nothing else, so rank 0 cannot know of other ranks."""
REMEDY = (
    "start accelerate launch or torchrun, once on each node, as docs/multi-node.md says; or, where each is meant to "
    "train by itself, set WORLD_SIZE=1 and take {} out of its environment"
)


def require_connected() -> None:
    """Check that the environment shows no other processes. Only for a process without a process group.

    Raises:
        ValueError: There are other processes. The message names the variable and the remedy.
    """
    if "WORLD_SIZE" in os.environ:
        if os.environ["WORLD_SIZE"] not in ("", "0", "1"):
            raise ValueError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment, but this process trains by itself: call "
                "torch.distributed.init_process_group, or make an Accelerator, before bind()"
            )
        return
    sizes = {name: _size(name) for name in (*SIZES, *HOSTS) if name in os.environ}
    ranks = {name: int(os.environ[name]) for name in RANKS if os.environ.get(name, "").isdecimal()}
    name = next((name for name, number in (sizes | {n: 1 + r for n, r in ranks.items()}).items() if number > 1), None)
    if name is not None:
        who = (SIZES | HOSTS | RANKS)[name]
        raise ValueError(
            f"{name} is {os.environ[name]} in the environment ({who}), but each of these processes would train by "
            f"itself: {REMEDY.format(name)}"
        )
    if ranks and not sizes:
        name = next(iter(ranks))
        warnings.warn(
            f"{name} is 0 in the environment ({RANKS[name]}), so this may be the first of several processes, and each "
            f"would train by itself: if so, {REMEDY.format(name)}",
            stacklevel=1,  # once, whoever asks
        )


def _size(name: str) -> int:
    """Number of processes or hosts that a variable names; 1 if it holds no number, such as ``auto``."""
    text = os.environ[name]
    if name in HOSTS:
        try:
            hosts = json.loads(text)
        except json.JSONDecodeError:
            return 1
        cluster = hosts.get("cluster") if isinstance(hosts, dict) else [hosts]
        groups = cluster.values() if isinstance(cluster, dict) else cluster if isinstance(cluster, list) else ()
        return sum(len(group) for group in groups if isinstance(group, (list, dict)))
    most = text.rpartition(":")[2].strip()  # torchrun's nodes may be a range
    return int(most) if most.isdecimal() else 1
