"""``srlora merge`` makes one plain checkpoint of a base and its adapter."""

from srlora_dist.commands.merge.command import run

__all__ = ["run"]
