"""Makes RESULTS.md and its figures from the lines of results.jsonl: ``python benchmarks/learning/report.py``.

It reads the options of every run again, which takes about a minute.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import drawing
from measures import (
    final_loss,
    is_worse,
    main_figure,
    main_metric,
    mean_lifetime,
    mean_of,
    recycled,
    share_to_reach,
)
from studies import (
    ABLATION_TASKS,
    HERE,
    METHODS,
    QUESTIONS,
    RESULTS,
    TASKS,
    Question,
    Run,
    chosen_rate,
    main_runs,
    rate_runs,
    variant_runs,
)

from benchmarks.reproduce.results import Results

GOAL = 0.7
BASELINES, CANDIDATES = ("LoRA", "PiSSA"), ("SRLoRA", "SRLoRA, zero_b", "LoRA, 4 r")
Lines = dict[int, dict]
"""Results by seed."""


def main() -> None:
    """Write all that the lines allow."""
    results = Results(RESULTS)
    conclusions = _read_conclusions()
    text = [INTRODUCTION, *_rates(results), *_main(results), *conclusions["goal"], *conclusions["digits"]]
    for name, question in QUESTIONS.items():
        text += [*_question(results, name, question), *conclusions[name]]
    (HERE / "RESULTS.md").write_text("\n".join(text) + "\n")


def _read_conclusions() -> dict[str, list[str]]:
    """What is written in conclusions.md, by the name of its part."""
    _, *parts = (HERE / "conclusions.md").read_text().split("\n## ")
    named = (part.split("\n\n", 1) for part in parts)
    return {name: ["", text.strip()] for name, text in named}


INTRODUCTION = """# Does it learn better?

Made by `python benchmarks/learning/report.py` from the lines of [results.jsonl](results.jsonl), one a run, on CPUs.
How it was run is in [run_studies.py](run_studies.py), what in [studies.py](studies.py) and [tasks/](tasks). What
follows from it for a user: [docs/when-it-helps.md](../../docs/when-it-helps.md).

- ± is half of the 95% interval of the mean over n seeds, by Student's t. With three seeds that is 2.5 deviations: wide.
- The training loss is the mean over the last tenth of the steps.
- Steps: after what share of its steps a run's training loss, averaged over the tenth before, is down at plain LoRA's
  final one with the same seed. A run that never gets there counts as 1 in the mean, and is named. Time is that share
  times the run's seconds a step over LoRA's, both medians. Read the steps first: two runs and at times more shared the
  machine. Measured side by side a step takes as long as LoRA's ([docs/speed.md](../../docs/speed.md)).
- LoRA, 4 r has four times the rank and so four times the trainable parameters: what more directions would give.
- Differences are taken seed by seed: the same seed has the same data in the same order."""


def _collect(results: Results, runs: list[Run]) -> dict[str, Lines]:
    """By name of the method or variant."""
    found: dict[str, Lines] = {}
    for run in runs:
        line = results.of(run.cell)
        if line is not None:
            found.setdefault(run.name, {})[run.cell.seed] = line
    return found


def _rates(results: Results) -> list[str]:
    rows = []
    for task in TASKS:
        for name in METHODS:
            losses = {
                run.rate: line["final"]["loss"]
                for run in rate_runs(task)
                if run.name == name and (line := results.of(run.cell)) is not None
            }
            if losses:
                cells = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())
                rows.append(f"| {task} | {name} | {cells} | {chosen_rate(task, name) or 'not all run'} |")
    about = "Chosen for each method from the same grid, by the lowest final validation loss on a seed of its own."
    return ["", "## Learning rates", "", about, *_table("task | method | rate: validation loss | chosen", rows)]


def _main(results: Results) -> list[str]:
    rows, verdicts, curves = [], [], {}
    for task in TASKS:
        found = _collect(results, main_runs(task))
        if not set(BASELINES) <= set(found):
            continue
        curves[task] = found
        rows += [_row(task, name, found[name], found["LoRA"]) for name in METHODS if name in found]
        verdicts += [_verdict(task, name, found) for name in CANDIDATES if name in found]
    if not curves:
        return []
    drawing.draw_curves(curves, list(METHODS), HERE / "figures" / "main.png")
    header = "task | method | training loss | validation loss | metric | steps | time | n"
    text = ["", "## The methods side by side", *_table(header, rows), "", "![training losses](figures/main.png)", ""]
    header = "task | method | steps | LoRA itself | metric less LoRA's | metric less PiSSA's"
    return [*text, "### The goal", "", GOAL_TEXT, *_table(header, verdicts)]


GOAL_TEXT = (
    f"Plain LoRA's final training loss in at most {GOAL:.0%} of the steps, and a final metric nowhere worse than "
    "LoRA's or PiSSA's by more than the interval of the difference. LoRA itself can be down at its final loss "
    "before the end, where its curve is noisy."
)


def _row(task: str, name: str, lines: Lines, base: Lines) -> str:
    shares = _shares(lines, base)
    missed = sum(share is None for share in shares.values())
    steps = _steps(lines, base)
    times = [
        share * lines[seed]["step_seconds"] / base[seed]["step_seconds"]
        for seed, share in zip(shares, steps, strict=True)
    ]
    cells = [
        *(task, name, mean_of([final_loss(line) for line in lines.values()])),
        mean_of([line["final"]["loss"] for line in lines.values()]),
        mean_of([main_figure(line) for line in lines.values()]),
        f"{mean_of(steps)}{f' ({missed} never)' if missed else ''}",
        *(mean_of(times), len(lines)),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _shares(lines: Lines, base: Lines) -> dict[int, float | None]:
    return {seed: share_to_reach(line, final_loss(base[seed])) for seed, line in lines.items() if seed in base}


def _steps(lines: Lines, base: Lines) -> list[float]:
    """The shares; 1 for a run that never gets there."""
    return [1.0 if share is None else share for share in _shares(lines, base).values()]


def _verdict(task: str, name: str, found: dict[str, Lines]) -> str:
    """A row of the table of the goal."""
    steps, own = (statistics.mean(_steps(found[of], found["LoRA"])) for of in (name, "LoRA"))
    met = "met" if steps <= GOAL else f"missed by {steps - GOAL:.2f}"
    cells = [task, name, f"{steps:.2f}, {met}", f"{own:.2f}"]
    for other in BASELINES:
        difference = mean_of(_differences(found[name], found[other], main_figure))
        worse = is_worse(difference, main_metric(next(iter(found[name].values()))))
        verdict = "one seed" if difference.half is None else "worse" if worse else "not worse"
        cells.append(f"{difference:+}, {verdict}")
    return "| " + " | ".join(cells) + " |"


def _differences(lines: Lines, base: Lines, figure: Callable[[dict], float]) -> list[float]:
    return [figure(line) - figure(base[seed]) for seed, line in lines.items() if seed in base]


def _question(results: Results, name: str, question: Question) -> list[str]:
    """Its tables: each task, and the differences of all tasks and seeds taken together."""
    rows, points, differences = [], {}, {}
    for task in ABLATION_TASKS:
        of_methods = _collect(results, main_runs(task))
        base = of_methods.get(question.of, {})
        found = _collect(results, variant_runs(task, name))
        if not base or not found:
            continue
        seeds = set(base) & {seed for lines in found.values() for seed in lines}
        named = {question.of: base} | {key: of_methods[key] for key in BASELINES} | found
        points[task] = {key: {seed: lines[seed] for seed in sorted(seeds & set(lines))} for key, lines in named.items()}
        for key, lines in points[task].items():
            rows.append(_variant_row(task, key, lines, base))
            if key != question.of:
                pair = (_differences(lines, base, figure) for figure in (final_loss, main_figure))
                for known, new in zip(differences.setdefault(key, ([], [])), pair, strict=True):
                    known += new
    if not rows:
        return []
    drawing.draw_variants(points, question.title, HERE / "figures" / f"{name}.png")
    text = ["", f"## {question.title}", "", f"Differences from {question.of}, at its rate (LoRA and PiSSA at theirs)."]
    text += _table("task | variant | training loss | metric | fused after one interval | lifetime | n", rows)
    text += ["", f"![{question.title}](figures/{name}.png)"]
    if len(points) > 1:
        rows = [
            f"| {key} | {mean_of(losses):+} | {mean_of(metrics):+} | {len(losses)} |"
            for key, (losses, metrics) in differences.items()
        ]
        text += ["", "All tasks and seeds together:", *_table("variant | training loss | metric | n", rows)]
    return text


def _table(header: str, rows: list[str]) -> list[str]:
    return ["", f"| {header} |", "|---" * (header.count("|") + 1) + "|", *rows]


def _variant_row(task: str, key: str, lines: Lines, base: Lines) -> str:
    share, lifetime = ([figure(line) for line in lines.values()] for figure in (recycled, mean_lifetime))
    share = "-" if None in share else f"{statistics.mean(share):.0%}"
    lifetime = "-" if None in lifetime else f"{statistics.mean(lifetime):.2f}"
    if all(line is base[seed] for seed, line in lines.items()):
        loss, metric = (mean_of([figure(x) for x in lines.values()]) for figure in (final_loss, main_figure))
    else:
        loss, metric = (f"{mean_of(_differences(lines, base, figure)):+}" for figure in (final_loss, main_figure))
    cells = [task, key, loss, metric, share, lifetime, len(lines)]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
