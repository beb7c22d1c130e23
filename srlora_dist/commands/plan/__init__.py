"""``srlora plan`` says what a run will hold, send and wait for."""

from srlora_dist.commands.plan.command import run

__all__ = ["run"]
