"""A user's own task: a Python file outside the package, named by its path."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


@functools.cache
def load_file(path: str) -> ModuleType:
    """Run a file once in this process, and give what it defines.

    Args:
        path: Path of a file with ``load(config) -> Task`` and perhaps ``check(config)``; see docs/tasks.md.

    Raises:
        ValueError: There is no such file, it cannot be run, or it has no ``load``.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"task.name is {path!r}, but there is no such file: give the path of a file, or a task's name")
    name = f"srlora_task_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"task.name is {path!r}, which cannot be run ({type(error).__name__}: {error})") from error
    if not callable(getattr(module, "load", None)):
        raise ValueError(f"task.name is {path!r}, which defines no load(config): see docs/tasks.md for what it returns")
    return module
