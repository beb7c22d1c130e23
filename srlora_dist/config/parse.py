"""Reads the options of a run from the command line and YAML files, and writes them as YAML.

The only module of the room that needs a parser and yaml. ``parse(argv)`` accepts ``--config FILE`` and any
``--section.option value``; later arguments win.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import jsonargparse
import yaml

from srlora_dist.config.run import RunConfig


def parse(argv: list[str] | None = None, prog: str = "srlora train") -> RunConfig:
    """Read ``--config FILE`` and ``--section.option value`` overrides into a :class:`RunConfig`.

    Args:
        argv: The words; None takes those of the process.
        prog: The command that ``--help`` is printed for.

    Raises:
        ValueError: An option is unknown, of the wrong type or out of its range; the message names it.
    """
    _check_files(argv, sections=[f.name for f in fields(RunConfig) if f.default_factory is not MISSING])
    parser = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of options.")
    parser.add_class_arguments(RunConfig)
    try:
        options = parser.instantiate(parser.parse_args(argv))
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise ValueError(f"configuration: {error}; see --help for the options") from error
    del options.config
    config = RunConfig(**vars(options))
    unused = config.without_effect()
    if unused:
        warnings.warn(f"without effect with method {config.method}: {', '.join(unused)}", stacklevel=2)
    return config


def to_yaml(config: RunConfig) -> str:
    """Write the resolved configuration as YAML, enough to run it again with ``--config``."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def _check_files(argv: list[str] | None, sections: list[str]) -> None:
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
