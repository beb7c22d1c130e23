"""The paper's Figures 4 and 5: how long directions are live, and how much that varies from site to site."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from srlora_dist.tasks.sources import task_title
from srlora_dist.training.figures.runs import RunFiles, about
from srlora_dist.training.figures.style import OTHERS, RETIRED, TITLES, TRAIN, fit, mark_switches, plt, save

MOST_KINDS, MARKERS = 10, "os^Dv<P"


@dataclass
class Interval:
    """One direction was live at one site.

    Args:
        direction: Its number.
        start: Step after which it was taken.
        end: Step after which it was fused, or the last step of the run.
        fused: Whether it was fused before the end.
    """

    direction: int
    start: int
    end: int
    fused: bool


def active_intervals(switches: list[dict], num_steps: int) -> dict[str, list[Interval]]:
    """For each site when each direction was live, from the lines of ``switches.jsonl``."""
    done: dict[str, list[Interval]] = {}
    live: dict[str, dict[int, int]] = {}
    for line in switches:
        starts = live.setdefault(line["site"], {})
        ended = done.setdefault(line["site"], [])
        ended += [Interval(k, starts.pop(k), line["step"], True) for k in line["directions"] if k in starts]
        starts.update(dict.fromkeys(line["new_directions"], line["step"]))
    for site, starts in live.items():
        done[site] += [Interval(k, start, num_steps, False) for k, start in starts.items()]
    return {site: sorted(intervals, key=lambda x: x.direction) for site, intervals in done.items()}


def why_no_intervals(run: RunFiles) -> str | None:
    """Why a run has no Figures 4 and 5; None if it has."""
    if run.switch_steps:
        return None
    if run.method != "srlora":
        return f"method {run.method} has no switches"
    return f"no switch has happened in {run.num_steps} steps"


def find_site(run: RunFiles, name: str | None) -> str:
    """The site with this in its name, or the one in the middle of the model.

    Raises:
        ValueError: No site has it in its name.
    """
    sites = list(dict.fromkeys(line["site"] for line in run.switches))
    if name is None:
        return sites[len(sites) // 2]
    found = [site for site in sites if name == site] or [site for site in sites if name in site]
    if not found:
        raise ValueError(f"--site is {name!r}, but {run.folder} has no such site: its first are {', '.join(sites[:4])}")
    return found[0]


def draw_site(run: RunFiles, path: Path, site: str) -> Path:
    """Figure 5: when each direction of one site was live."""
    intervals = active_intervals(run.switches, run.num_steps)[site]
    figure, axes = plt.subplots(figsize=(7, max(3.6, 1.9 + 0.1 * len(intervals))))
    for fused, color, label in ((True, RETIRED, "fused into W later"), (False, TRAIN, "live at the end")):
        rows = [x for x in intervals if x.fused == fused]
        lengths, starts = [x.end - x.start for x in rows], [x.start for x in rows]
        axes.barh([x.direction for x in rows], lengths, left=starts, height=0.8, color=color, label=label)
    mark_switches(axes, sorted({x.start for x in intervals if x.start > 0}))
    axes.set(
        title=f"{fit(f'Active directions: {_title([run])}', 7)}\n{fit(site, 7)}",
        xlabel="optimizer step",
        ylabel="direction\n(0 = largest singular value)",
    )
    axes.set_xlim(0, run.num_steps)
    axes.invert_yaxis()
    axes.legend(loc="lower left")
    return save(figure, path, about([run]))


def draw_lengths(runs: list[RunFiles], path: Path) -> Path:
    """Figure 4: how long directions stay, and how much that varies within a site; of several seeds their mean."""
    found = [active_intervals(run.switches, run.num_steps) for run in runs]
    odd = next((run for run, sites in zip(runs, found, strict=True) if sites.keys() != found[0].keys()), None)
    if odd is not None:
        raise ValueError(f"{runs[0].folder} and {odd.folder} have other sites: give them different --labels")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), width_ratios=(1, 1.7))
    _draw_histogram(left, found)
    has_bars = _draw_variances(right, found)
    figure.suptitle(fit(_title(runs), 11))
    of_what = f"{len(found)} seeds" if len(found) > 1 else "the sites of a layer"
    bars = f"Bars: one sample standard deviation over {of_what}. " * has_bars
    return save(figure, path, bars + about(runs))


def _draw_histogram(axes: Axes, found: list[dict[str, list[Interval]]]) -> None:
    lengths = [x.end - x.start for sites in found for site in sites.values() for x in site]
    values, counts = np.unique(lengths, return_counts=True)
    # Switches fall on whole steps, so that lengths of as many intervals differ by a step or two.
    bins = np.histogram_bin_edges(values, bins=min(20, max(1, len(values))))
    axes.hist(values, bins=bins, weights=counts / len(found), color=TRAIN, edgecolor="white")
    sites = len(next(iter(found)))
    axes.set(title=f"Active intervals of {sites} sites", xlabel="length (optimizer steps)")
    axes.set_ylabel("directions" if len(found) == 1 else f"directions (mean of {len(found)} seeds)")


def _draw_variances(axes: Axes, found: list[dict[str, list[Interval]]]) -> bool:
    """Draw the variance by layer, a line for each kind of site; sites outside the layers stand beside them.

    Returns:
        Whether there are bars: of the seeds, or of one run with several sites of a kind in a layer.
    """
    places = {site: _place(site) for site in found[0]}
    layers = sorted({layer for layer, _ in places.values() if layer is not None})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    if len(kinds) > MOST_KINDS:
        places, kinds = {site: (layer, "all sites") for site, (layer, _) in places.items()}, ["all sites"]
    beside = (layers[-1] if layers else 0) + 1
    has_bars = False
    for number, kind in enumerate(kinds):
        at: dict[int, list[list[float]]] = {}  # for each seed those of its sites
        for site, (layer, of_kind) in places.items():
            if of_kind == kind:
                variances = [np.var([x.end - x.start for x in sites[site]]) for sites in found]
                seeds = at.setdefault(beside if layer is None else layer, [[] for _ in found])
                for seed, variance in zip(seeds, variances, strict=True):
                    seed.append(variance)
        drawn = {layer: list(map(np.mean, at[layer])) if len(found) > 1 else at[layer][0] for layer in sorted(at)}
        style = {"color": OTHERS[number % len(OTHERS)], "marker": MARKERS[number % len(MARKERS)], "linewidth": 1.2}
        # Many sites have the same variance, so that lines on the same places would hide each other.
        aside = 0.4 * ((number + 0.5) / len(kinds) - 0.5)
        x, y = [layer + aside for layer in drawn], list(map(np.mean, drawn.values()))
        axes.plot(x, y, label=kind, **style)
        if max(map(len, drawn.values())) > 1:
            has_bars = True
            deviations = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in drawn.values()]
            axes.errorbar(x, y, deviations, fmt="none", ecolor=style["color"], capsize=2, linewidth=0.8)
    if any(layer is None for layer, _ in places.values()):
        axes.set_xticks([*layers, beside], [*map(str, layers), "none"])
    axes.set(title="Variance of the lengths within a site", xlabel="layer", ylabel="variance (steps²)")
    axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), title="kind of site")
    return has_bars


def _place(site: str) -> tuple[int | None, str]:
    """The layer of a site, which is the first number in its name, and what comes after it."""
    match = re.search(r"(?:^|\.)(\d+)\.", site)
    return (None, site) if match is None else (int(match[1]), re.sub(r"\d+", "*", site[match.end() :]))


def _title(runs: list[RunFiles]) -> str:
    seeds = ", ".join(map(str, sorted({int(run.config["seed"]) for run in runs})))
    label, task = runs[0].label, task_title(runs[0].task)
    return f"{TITLES.get(label, label)} on {task}, seed{'s' * (len(runs) > 1)} {seeds}"
