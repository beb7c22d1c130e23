"""Every option that a user can set, declared once; importing it loads neither torch nor a parser nor yaml."""

from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.config.run import (
    CheckpointOptions,
    LoRAOptions,
    ModelOptions,
    RunConfig,
    TaskOptions,
    TrainOptions,
)

__all__ = [
    "CheckpointOptions",
    "LoRAOptions",
    "ModelOptions",
    "RunConfig",
    "SRLoRAConfig",
    "TaskOptions",
    "TrainOptions",
]
