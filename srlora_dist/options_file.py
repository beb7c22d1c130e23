"""Refuses files of options that the parser would report without their names, or read in part."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml


def check_files(argv: list[str] | None, sections: list[str]) -> None:
    """Look at each file that ``--config`` names.

    Args:
        argv: The command line; None is that of the process.
        sections: Keys that have options below them.

    Raises:
        ValueError: A file cannot be read, is no mapping, or gives an option twice; the message names file and line.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", action="append", nargs="?", default=[])
    for name in finder.parse_known_args(argv)[0].config:
        if not name:
            raise ValueError("--config has no value: give a YAML file")
        try:
            root = yaml.compose(Path(name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"--config {name} cannot be read ({error}): give a YAML file of options") from error
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"--config {name} does not map options to values: write lines such as seed: 1")
        _check_mapping(name, root, sections)


def _check_mapping(file: str, mapping: yaml.MappingNode, sections: list[str], prefix: str = "") -> None:
    found = set()
    for key, value in mapping.value:
        option, where = f"{prefix}{key.value}", f"--config {file}, line {key.start_mark.line + 1}"
        if option in found:  # YAML's readers take the last one in silence
            raise ValueError(f"{where}: {option} is given twice: keep one")
        found.add(option)
        if isinstance(value, yaml.MappingNode):
            _check_mapping(file, value, sections, f"{option}.")
        elif option in sections:
            raise ValueError(f"{where}: {option} has no options below it: indent them, or remove the line")
