"""SRLoRA (arXiv 2505.12433) for distributed training: LoRA that keeps learning in new subspaces."""

from srlora_dist.config import SRLoRAConfig
from srlora_dist.ledger import SiteSwitch, SwitchReport
from srlora_dist.switcher import Switcher

__all__ = ["SRLoRAConfig", "SiteSwitch", "SwitchReport", "Switcher"]
