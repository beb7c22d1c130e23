"""The command line of a command with a few words: argparse, whose complaints end as one line like all others."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn


class Arguments(argparse.ArgumentParser):
    """Reads the words behind ``srlora NAME``.

    Args:
        name: Name of the command.
        purpose: Its first line of ``--help``.
    """

    def __init__(self, name: str, purpose: str) -> None:
        super().__init__(prog=f"srlora {name}", description=purpose, allow_abbrev=False)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Read them; a dash in the name of an option is as good as an underscore.

        Raises:
            ValueError: A word is unknown, missing or of another kind.
        """
        return self.parse_args([re.sub(r"^--[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), w) for w in argv])

    def error(self, message: str) -> NoReturn:
        """Called by argparse, which would end the process."""
        raise ValueError(f"{message}; see {self.prog} --help")
