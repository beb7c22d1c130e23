"""``srlora doctor`` tries on this machine what a run needs."""

from srlora_dist.commands.doctor.command import run

__all__ = ["run"]
