"""Merges an exported adapter into its base: a whole checkpoint that plain Transformers loads."""

from __future__ import annotations

from srlora_dist.merging.merger import Merger
from srlora_dist.merging.stored_as import StoredAs

__all__ = ["Merger", "StoredAs"]
