"""Notes what a run really held its tensors in, beside its other results; installed in forked ranks (see forked.py)."""

from __future__ import annotations

import json
from pathlib import Path

from srlora_dist.training.trainer import FineTuner


def install() -> None:
    """Make each run leave ``evidence.json`` in its output folder."""
    original = FineTuner._summary

    def summary(trainer: FineTuner) -> dict[str, object]:
        if trainer.log is not None:
            path = Path(trainer.config.output_dir) / "evidence.json"
            path.write_text(json.dumps(find_evidence(trainer)))
        return original(trainer)

    FineTuner._summary = summary


def find_evidence(trainer: FineTuner) -> dict[str, object]:
    """Facts from the live objects of DeepSpeed and FSDP2, on this rank."""
    from torch.distributed.fsdp import FSDPModule

    storage = trainer.method.switcher.storage
    layers = [trainer.optimizer]
    while hasattr(layers[-1], "optimizer"):
        layers.append(layers[-1].optimizer)
    weights = [site.weight for site in storage.sites]
    found = {
        "innermost": type(layers[-1]).__name__,
        "num_sharded_modules": sum(isinstance(module, FSDPModule) for module in trainer.model.modules()),
        "local_share": weights[0].to_local().numel() / weights[0].numel() if hasattr(weights[0], "to_local") else 1,
    }
    if trainer.config.engine in ("zero1", "zero2"):
        found["optimizer_offloaded"] = layers[1].cpu_offload
    if trainer.config.engine == "zero3":
        found |= {
            "optimizer_offloaded": layers[1].offload_optimizer,
            "weights_offloaded": layers[1].offload_param,
            "num_on_nvme": sum(weight.ds_tensor.status.name == "NOT_AVAILABLE" for weight in weights),
            "hpz_ranks": layers[1].zero_hpz_partition_size,
            "num_secondary": sum(weight.ds_secondary_tensor is not None for weight in weights),
        }
    return found
