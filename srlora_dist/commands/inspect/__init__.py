"""``srlora inspect`` shows a checkpoint."""

from srlora_dist.commands.inspect.command import run

__all__ = ["run"]
