"""SRLoRA (arXiv 2505.12433) for distributed training: LoRA that keeps learning in new subspaces."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from srlora_dist.checkpoint.ledger import SiteSwitch, SwitchReport
    from srlora_dist.config.method import SRLoRAConfig
    from srlora_dist.method.switcher import Switcher
    from srlora_dist.training.hf_callback import SRLoRACallback

__all__ = ["SRLoRACallback", "SRLoRAConfig", "SiteSwitch", "SwitchReport", "Switcher"]

# Imported when they are asked for: a command sets what torch reads at its import, and --help does without torch.
_PLACES = {
    "SRLoRACallback": "training.hf_callback",
    "SRLoRAConfig": "config.method",
    "SiteSwitch": "checkpoint.ledger",
    "SwitchReport": "checkpoint.ledger",
    "Switcher": "method.switcher",
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
