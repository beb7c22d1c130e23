"""What an Accelerate file of the user starts."""

from __future__ import annotations

from pathlib import Path

import yaml


def num_launched(file: Path) -> int:
    """The processes that an Accelerate file starts, all of them on this machine.

    Raises:
        ValueError: It cannot be read, does not say, or is for several machines.
    """
    try:
        settings = yaml.safe_load(file.read_text())
        num_processes, num_machines = int(settings["num_processes"]), int(settings.get("num_machines") or 1)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is no file of Accelerate with num_processes ({error})") from error
    if num_machines > 1:
        raise ValueError(
            f"{file} is for {num_machines} machines, and this command is on one of them: give a file for one machine"
        )
    return num_processes
