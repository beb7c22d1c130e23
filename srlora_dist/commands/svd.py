"""``srlora svd`` computes the directions of a run ahead of it, so that the run finds them in its cache."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from srlora_dist.engine.process import prepare_process

if TYPE_CHECKING:
    from accelerate import Accelerator

    from srlora_dist.config.run import RunConfig
    from srlora_dist.method.directions import Directions


def run(argv: list[str]) -> None:
    """Compute them with the options of the run, and print what they are.

    Collective: with several processes, which plain or DDP launches may have, see :class:`Directions`.

    Raises:
        ValueError: The options or the model cannot be worked with, or the method needs no directions.
    """
    is_main = prepare_process()
    from srlora_dist.config.parse import parse  # after the environment is set
    from srlora_dist.engine.accelerator import build_accelerator

    config = parse(argv, "srlora svd")
    if config.method not in ("srlora", "pissa"):
        raise ValueError(f"method {config.method} needs no directions: choose srlora or pissa")
    # The run's engine decides how 4-bit weights are packed, but this process is not on it.
    accelerator, engine = build_accelerator(replace(config, engine="auto"))
    if engine not in ("plain", "ddp"):
        raise ValueError(f"the launch asks for {engine}: start srlora svd without a launcher, its file fits any engine")
    began = time.perf_counter()
    directions = _prepare(config, accelerator)
    if is_main:
        print(_summary(directions, time.perf_counter() - began))
    accelerator.end_training()


def _prepare(config: RunConfig, accelerator: Accelerator) -> Directions:
    """Make or find the file of directions, of the same sites as in the run."""
    import torch

    from srlora_dist.layers.discovery import find_sites, keep_payloads_
    from srlora_dist.method.budget import clamp_target_ranks
    from srlora_dist.method.directions import Directions
    from srlora_dist.storage.find import find_storage
    from srlora_dist.tasks.registry import load_task
    from srlora_dist.training.adapter import adapt

    task = load_task(config)
    model = adapt(config, task.model, task.peft_type, task.heads)
    keep_payloads_(model)
    names = [site.name for site in find_sites(model, config.srlora.adapter_name)]
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    model, optimizer = accelerator.prepare(model, optimizer)
    sites = find_sites(model, config.srlora.adapter_name, names)
    clamp_target_ranks(sites, config.lora.rank if config.method == "pissa" else config.srlora.num_directions)
    directions = Directions(find_storage(model, optimizer, sites), config.srlora)
    directions.prepare()
    return directions


def _summary(directions: Directions, seconds: float) -> str:
    sites = directions.storage.sites
    kinds = Counter((site.shape, site.state.target_rank) for site in sites)
    rows = [f"{f'{m} x {n}':>15}{count:>7}{target:>12}" for ((m, n), target), count in sorted(kinds.items())]
    values = {name: numbers for name, numbers in directions.singular_values().items() if numbers}
    top, low = max(values, key=lambda name: values[name][0]), min(values, key=lambda name: values[name][-1])
    how = "found in the cache" if directions.was_there else "computed"
    return "\n".join(
        [
            f"{'shape':>15}{'sites':>7}{'directions':>12}",
            *rows,
            f"largest singular value {values[top][0]:.4g} ({top}), smallest {values[low][-1]:.4g} ({low})",
            f"{len(sites)} sites, {how} in {seconds:.1f} s with the loading of the model",
            f"file: {directions.path}, {directions.path.stat().st_size / 1e6:.2f} MB",
        ]
    )
