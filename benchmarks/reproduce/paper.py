"""What the paper reports, as data: H. Yang, L. Wang and M. Z. Hossain, SRLoRA, arXiv 2505.12433v1, 2025.

Only figures are kept here, with the table they stand in. They were taken from two public summaries of the paper, which
agree where both give a figure; the tables themselves could not be opened. Table 2 (epochs, batch, rate and target rank
of each task) is in neither, so it is not here either.
"""

from __future__ import annotations

from dataclasses import dataclass

CITATION = "arXiv 2505.12433"
METRICS = {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews", "pearson": "Pearson", "spearman": "Spearman"}
"""Our names of the figures, and theirs in print."""


@dataclass(frozen=True)
class PaperTask:
    """One task of a table.

    Args:
        metrics: Our names of what the paper reports, in its order; the first is the one to plot.
        figures: For each method of the paper one figure a metric, in percent.
    """

    metrics: tuple[str, ...]
    figures: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class PaperTable:
    """One table of results.

    Args:
        number: Its number.
        title: What it compares.
        model: The model's name on the hub.
        model_title: Its name in print.
        presets: Folder of the presets below ``launch/paper``.
        methods: Those that the paper compares and this project has.
        decimals: Of its figures.
        tasks: By our names.
    """

    number: int
    title: str
    model: str
    model_title: str
    presets: str
    methods: tuple[str, ...]
    decimals: int
    tasks: dict[str, PaperTask]

    @property
    def source(self) -> str:
        """Where the figures stand."""
        return f"{CITATION}, Table {self.number}"


def _task(metrics: tuple[str, ...], **figures: tuple[float, ...]) -> PaperTask:
    return PaperTask(metrics, figures)


_ACCURACY = ("accuracy",)
TABLES = {
    3: PaperTable(
        number=3,
        title="GLUE",
        model="microsoft/deberta-v3-base",
        model_title="DeBERTa-v3-base",
        presets="glue",
        methods=("lora", "pissa", "srlora"),
        decimals=1,
        tasks={
            "sst2": _task(_ACCURACY, lora=(95.9,), pissa=(95.7,), srlora=(96.1,)),
            "mrpc": _task(("f1", "accuracy"), lora=(90.8, 87.5), pissa=(90.5, 87.2), srlora=(90.3, 86.6)),
            "cola": _task(("matthews",), lora=(65.4,), pissa=(64.7,), srlora=(65.1,)),
            "qnli": _task(_ACCURACY, lora=(94.0,), pissa=(94.4,), srlora=(93.4,)),
            "rte": _task(_ACCURACY, lora=(80.4,), pissa=(82.0,), srlora=(82.1,)),
            # The summaries give two figures without names; GLUE reports these two, in this order.
            "stsb": _task(("pearson", "spearman"), lora=(90.5, 89.8), pissa=(89.6, 89.0), srlora=(90.4, 90.2)),
        },
    ),
    4: PaperTable(
        number=4,
        title="image classification",
        model="google/vit-base-patch16-224-in21k",
        model_title="ViT-B/16",
        presets="vision",
        methods=("lora", "srlora"),
        decimals=2,
        tasks={
            "cifar100": _task(_ACCURACY, lora=(90.06,), srlora=(92.51,)),
            "stl10": _task(_ACCURACY, lora=(99.62,), srlora=(99.54,)),
            "mnist": _task(_ACCURACY, lora=(98.89,), srlora=(94.83,)),
            # Not in the paper; with the presets because it can be had without a hub.
            "fashion_mnist": _task(_ACCURACY),
        },
    ),
}
"""The paper's tables of results by their numbers."""


def differs(tasks: list[str], models: list[str]) -> str:
    """Say in a sentence how runs on these tasks, from these models, stand to the paper's.

    Args:
        tasks: Names of the tasks.
        models: What the runs started from: names on the hub, or titles.
    """
    known = [table for table in TABLES.values() if any(table.tasks[n].figures for n in tasks if n in table.tasks)]
    if not known:
        return f"The paper ({CITATION}) has no such task."
    if set(models) <= {table.model for table in known}:
        return f"Model and task as in the paper ({CITATION}); length and rates are ours: its Table 2 was not at hand."
    theirs = " and ".join(table.model_title for table in known)
    ours = "lengths and rates are ours, for its Table 2 was not at hand"
    return f"Differs from the paper ({CITATION}): its model is {theirs}; {ours}."
