"""``srlora plan`` says what a run needs before it is started."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

import jsonargparse

from srlora_dist.config.checks import COUNT, COUNT_OR_NONE, require
from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.config.run import LoRAOptions, ModelOptions, RunConfig, TrainOptions


@dataclass
class PlanOptions:
    """What a run needs: bytes of each rank, what is sent, and estimates of how long it takes; --json prints it as JSON.

    Args:
        model: ``llama-7b``, ``llama-70b``, ``llama-405b``, a folder with config.json, such a file, or a hub's name.
        engine: The storage.
        world_size: Ranks.
        dtype: Type of the pretrained weights.
        quantization: Storage of the pretrained linear layers.
        double_quantization: Quantise the constants of a 4-bit storage as well.
        rank: Pairs of each site.
        target_rank: Directions to share out over the run; ``null`` is 32, with fewer switches where steps are few.
        fusion_ratio: Share of the pairs that one switch fuses.
        target_modules: ``all-linear``, or names with commas between them.
        fusion: Where fused pairs go: ``auto``, ``in_place`` or ``adapter``.
        optimizer: Whose moments are held: AdamW's two, or the one of SGD with momentum.
        steps: Optimizer steps.
        persistence_threshold: ZeRO-3 keeps parameters of up to so many elements whole; ``null`` is 10 times the width.
        device: Whose bandwidths the times are made from.
    """

    model: str
    engine: Literal["plain", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2"] = "zero3"
    world_size: int = 8
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    double_quantization: bool = False
    rank: int = 8
    target_rank: int | None = None
    fusion_ratio: float = 0.5
    target_modules: str = "all-linear"
    fusion: Literal["auto", "in_place", "adapter"] = "auto"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    steps: int = 1000
    persistence_threshold: int | None = None
    device: Literal["a100", "h100", "mi250x", "cpu"] = "h100"

    def __post_init__(self) -> None:
        size = (lambda value: 1 <= value <= 1 << 20, f"1 to {1 << 20}")
        require("", self, {"world_size": size, "steps": COUNT, "persistence_threshold": COUNT_OR_NONE})
        if self.engine in ("plain", "ddp") and (self.engine == "plain") != (self.world_size == 1):
            other = {"plain": "ddp", "ddp": "plain"}[self.engine]
            raise ValueError(f"world_size is {self.world_size}, which engine {self.engine} is not for: choose {other}")
        if self.engine == "fsdp2" and self.quantization == "int8":
            raise ValueError("quantization is int8, which FSDP2 cannot cut: choose nf4, or another engine")

    def run_config(self) -> RunConfig:
        """The options of the run, by the names that the run has for them."""
        storage = {"quantization": self.quantization, "double_quantization": self.double_quantization}
        return RunConfig(
            engine=self.engine,
            model=ModelOptions(self.model, dtype=self.dtype, **storage),
            lora=LoRAOptions(rank=self.rank, alpha=self.rank, target_modules=self.target_modules),
            srlora=SRLoRAConfig(target_rank=self.target_rank, fusion_ratio=self.fusion_ratio, fusion=self.fusion),
            train=TrainOptions(max_steps=self.steps, optimizer=self.optimizer),
        )


def parse(argv: list[str]) -> PlanOptions:
    """Read the command line; a dash in the name of an option is as good as an underscore.

    Raises:
        ValueError: An option is unknown or out of its range; the message names it.
    """
    names = [re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in argv]
    parser = jsonargparse.ArgumentParser(prog="srlora plan", exit_on_error=False)
    parser.add_class_arguments(PlanOptions)
    try:
        options = parser.parse_args(names)
        return PlanOptions(**vars(options))
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise ValueError(f"{error}; see srlora plan --help for the options") from error


def run(argv: list[str]) -> None:
    """Print the plan.

    Raises:
        ValueError: An option is unknown or out of its range, or the model is not known.
    """
    options = parse([word for word in argv if word != "--json"])
    from srlora_dist.commands.plan.report import as_tables, make_plan  # seconds of imports

    plan = make_plan(options.run_config(), options.world_size, options.persistence_threshold, options.device)
    print(json.dumps(plan, indent=1) if "--json" in argv else as_tables(plan))
