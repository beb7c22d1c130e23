"""Which figures one run or several get, and what their files are called."""

from __future__ import annotations

from pathlib import Path

from srlora_dist.tasks.sources import task_title
from srlora_dist.training.figures.intervals import draw_lengths, draw_site, find_site, why_no_intervals
from srlora_dist.training.figures.loss import compare_losses, draw_loss
from srlora_dist.training.figures.runs import RunFiles
from srlora_dist.training.run_log import read_jsonl


def draw(folder: str | Path, summary: dict[str, object]) -> list[Path]:
    """Draw what ``metrics.jsonl`` and ``switches.jsonl`` of a run hold.

    Args:
        folder: The output folder of the run.
        summary: The content of its ``summary.json``.

    Returns:
        The PNG files, in ``figures/``: ``loss.png`` and, after at least one switch, ``active_intervals.png`` and
        ``interval_lengths.png``; none where nothing was logged, as in a run that is resumed after its last step.
    """
    if not read_jsonl(Path(folder) / "metrics.jsonl"):
        return []
    return compare([RunFiles.read(folder, summary)], Path(folder) / "figures")[0]


def compare(runs: list[RunFiles], folder: Path, site: str | None = None) -> tuple[list[Path], list[str]]:
    """Draw Figures 3, 4 and 5 of one run, or of several that have their labels.

    Args:
        runs: One or more; Figures 4 and 5 are drawn once for each label and task, Figure 5 of its first run.
        folder: Made if it is not there.
        site: What is in the name of the site of Figure 5; None takes the one in the middle of the model.

    Returns:
        The PNG files, and a line for each figure that was left out with the reason.

    Raises:
        ValueError: A run has no such site.
    """
    alone = len(runs) == 1
    paths = [draw_loss(runs[0], folder / "loss.png") if alone else compare_losses(runs, folder / "loss.png")]
    left_out = []
    groups: dict[tuple[str, str], list[RunFiles]] = {}
    for run in runs:
        reason = why_no_intervals(run)
        if reason is None:
            groups.setdefault((run.task, run.label), []).append(run)
        else:
            left_out.append(f"{run.folder}: no figures of active intervals, for {reason}")
    for (task, label), group in groups.items():
        parts = (_plain(task_title(task)) if task.endswith(".py") else task, _plain(label))
        end = "" if len(groups) == 1 else "".join(f"-{part}" for part in parts[: 1 + _several_labels(groups)])
        if any(path.stem.endswith(f"intervals{end}") for path in paths):  # of a label with other signs
            end += f"-{len(paths)}"
        paths.append(draw_site(group[0], folder / f"active_intervals{end}.png", find_site(group[0], site)))
        paths.append(draw_lengths(group, folder / f"interval_lengths{end}.png"))
    return paths, left_out


def _several_labels(groups: dict[tuple[str, str], list[RunFiles]]) -> bool:
    return len({label for _, label in groups}) > 1


def _plain(label: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in label)
