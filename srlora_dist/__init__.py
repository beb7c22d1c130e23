"""SRLoRA (arXiv 2505.12433) for distributed training: LoRA that keeps learning in new subspaces."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from srlora_dist.checkpoint.ledger import SiteSwitch, SwitchReport
    from srlora_dist.config.method import SRLoRAConfig
    from srlora_dist.errors import RunStoppedError
    from srlora_dist.method.switcher import Switcher
    from srlora_dist.training.hf_callback import SRLoRACallback

__version__ = "0.1.0"

__all__ = ["RunStoppedError", "SRLoRACallback", "SRLoRAConfig", "SiteSwitch", "SwitchReport", "Switcher", "__version__"]

# Imported when they are asked for: a command sets what torch reads at its import, and --help does without torch.
_PLACES = {
    "RunStoppedError": "errors",
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
