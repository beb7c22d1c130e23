"""Runs every benchmark and writes RESULTS.md, its plots, and the table of docs/speed.md.

    python benchmarks/run.py [--quick | --tiny] [--only tracking traffic] [--write]

A script answers its questions in a process of its own and appends them to results/<script>.jsonl; of each the last run
on a CPU and the last on a GPU is shown. ``--quick`` takes less than 10 minutes on 2 cores; ``--tiny`` only tries that
every script runs, and writes nothing; ``--write`` runs nothing. The exit status is 1 where a script failed, which is
named after the others have run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import fields
from datetime import datetime
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from side_by_side import PACKAGES, RESULTS, ROOT, Row, verdict

SCRIPTS = (
    "step_cost",
    "tracking",
    "window",
    "traffic",
    "zero3_switch",
    "weight_edit",
    "directions",
    "fine_tune",
    "scaling",
)
TIME_OUT = 3600
HEAD = """# What was measured

Written by `python benchmarks/run.py`. A ratio is that of two contenders timed in turn on the same work, or of two
counts: its median, and its quartiles over the rounds. A row that falls short of its target says why.
"""
FIGURES = ROOT / "benchmarks" / "figures"
BEGIN, END = "<!-- benchmarks: written by benchmarks/run.py -->", "<!-- end of benchmarks -->"


def run(script: str, sizes: list[str], name: str) -> bool:
    """Run one script; tells whether it ended well."""
    print(f"== {script}", flush=True)
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *sizes]
    environment = os.environ | {"SRLORA_BENCHMARK_RUN": name}
    log = ROOT / "runs" / "benchmarks" / f"{script}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as errors:
        try:
            done = subprocess.run(command, stderr=errors, env=environment, timeout=TIME_OUT, check=False)
        except subprocess.TimeoutExpired:
            print(f"{script} did not end within {TIME_OUT} s, see {log}")
            return False
    print(f"   {time.perf_counter() - began:.0f} s" + (f", FAILED: see {log}" if done.returncode else ""), flush=True)
    return done.returncode == 0


def last_run(script: str, on_gpu: bool) -> list[tuple[Row, dict[str, object]]]:
    """The rows of its last run on that kind of device, each with when and where it was."""
    path = RESULTS / f"{script}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    runs = defaultdict(list)
    names = {each.name for each in fields(Row)}
    for line in lines:
        if (line["device"] != "cpu") == on_gpu:
            row = Row(**{key: value for key, value in line.items() if key in names})
            runs[line["run"]].append((row, line))
    return list(runs.values())[-1] if runs else []


def draw(script: str, rows: list[Row], path: Path) -> None:
    """A dot for each row's median, a bar between its quartiles, a line where its target is."""
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.45 * len(rows)), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        low, high = row.quartiles
        colour = {True: "tab:green", False: "tab:red", None: "tab:gray"}[row.is_met]
        axes.plot([low, high], [place, place], color=colour, linewidth=4, alpha=0.4)
        axes.plot(row.median, place, "o", color=colour)
        if row.target is not None:
            axes.plot(row.target, place, "|", color="black", markersize=16)
    axes.set_yticks(range(len(rows)), [f"{row.question}\n{row.case}" for row in reversed(rows)], fontsize=6)
    positive = [value for row in rows for value in (row.median, row.target) if value is not None]
    if min(positive) > 0 and max(positive) > 20 * min(positive):
        axes.set_xscale("log")
    axes.set_xlabel("ratio (dot: median, bar: quartiles, line: target)")
    axes.set_title(script)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(rows: list[Row]) -> list[str]:
    """As lines of Markdown."""
    lines = ["| question | case | ours against | ratio (quartiles) | target | |", "|---|---|---|---|---|---|"]
    for row in rows:
        low, high = row.quartiles
        spread = f" ({low:.3g} to {high:.3g})" if len(row.ratios) > 1 else ""
        target = f"{row.bound} {row.target:g}" if row.target is not None else ""
        judged = verdict(row) + (f": {row.reason}" if row.is_met is False and row.reason else "")
        lines.append(f"| {row.question} | {row.case} | {row.peer} | {row.median:.3g}{spread} | {target} | {judged} |")
    return lines


def short_table(rows: list[Row]) -> list[str]:
    """A line a question that has a target: its worst case and its best one."""
    lines = ["| | against | ratio, worst case to best | target | cases that meet it |", "|---|---|---|---|---|"]
    questions: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in rows:
        if row.target is not None:
            questions[row.question, row.target].append(row)
    for (question, target), cases in questions.items():
        bound = cases[0].bound
        cases.sort(key=lambda row: row.median, reverse=bound != "at least")
        ends = " to ".join(dict.fromkeys(f"{row.median:.3g}" for row in (cases[0], cases[-1])))
        met = sum(bool(row.is_met) for row in cases)
        unclear = sum("spread" in verdict(row) for row in cases)
        notes = [f"{unclear} within the spread"] if unclear else []
        notes += [f"short at {row.case}: {row.reason}" for row in cases if not row.is_met]
        judged = "; ".join([f"{met} of {len(cases)}", *notes])
        lines.append(f"| {question} | {cases[0].peer} | {ends} | {bound} {target:g} | {judged} |")
    return lines


def section(on_gpu: bool) -> tuple[list[str], list[Row]]:
    """What was measured on one kind of device, as lines of Markdown, and all rows."""
    lines, every = [f"## {'GPU' if on_gpu else 'CPU'}", ""], []
    for script in SCRIPTS:
        found = last_run(script, on_gpu)
        if not found:
            continue
        rows, about = [row for row, _ in found], found[0][1]
        every += rows
        figure = FIGURES / f"{script}{'-gpu' * on_gpu}.png"
        draw(script, rows, figure)
        kind = "quick sizes" if about["quick"] else "full sizes"
        versions = ", ".join(f"{package} {about[package]}" for package in PACKAGES)
        lines += [f"### {script}", "", f"{about['hardware']}, {about['date']}, {kind}; {versions}.", ""]
        lines += [*table(rows), "", f"![{script}](figures/{figure.name})", ""]
    return (lines if every else [*lines, "Not measured.", ""]), every


def write() -> list[Row]:
    """RESULTS.md and the table of docs/speed.md; gives the rows of the CPU."""
    FIGURES.mkdir(exist_ok=True)
    mpl.use("Agg")
    on_cpu, rows = section(False)
    on_gpu, gpu_rows = section(True)
    (ROOT / "benchmarks" / "RESULTS.md").write_text("\n".join([HEAD, *on_cpu, *on_gpu]))
    page = ROOT / "docs" / "speed.md"
    text = page.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    short = sum(row.is_met is False for row in rows)
    judged = sum(row.is_met is not None for row in rows)
    about = last_run(SCRIPTS[0], False)[0][1]
    sizes, gpu = "quick" if about["quick"] else "full", "measured" if gpu_rows else "not measured"
    summary = (
        f"{judged - short} of {judged} rows reach their target: {sizes} sizes, {about['hardware']}, {about['date']}. "
    )
    summary += f"Times are medians of few rounds, counts are exact. On GPUs: {gpu}."
    page.write_text("\n".join([before + BEGIN, "", *short_table(rows), "", summary, "", END]) + after)
    return rows


def main() -> None:
    """Run what is asked for, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--tiny", action="store_true", help="only try that every script runs")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--write", action="store_true", help="write from the last results, run nothing")
    options = parser.parse_args()
    began, name = time.perf_counter(), datetime.now().isoformat(timespec="seconds")
    sizes = [f"--{size}" for size in ("quick", "tiny") if getattr(options, size)]
    failed = [script for script in options.only if not options.write and not run(script, sizes, name)]
    if not options.tiny:
        RESULTS.mkdir(exist_ok=True)
        for row in write():
            print(f"{verdict(row):24}{row.median:12.4g}  {row.question} [{row.case}]")
        print(f"{time.perf_counter() - began:.0f} s; written: benchmarks/RESULTS.md")
    if failed:
        sys.exit(f"did not end well: {', '.join(failed)}")


if __name__ == "__main__":
    main()
