"""Does a window change which pairs are chosen? The same training with ``importance_window`` auto and all.

    python benchmarks/window.py [--quick] [--steps 1500]

Trains the demo twice and compares the slots of every site at every switch, and the scores behind them. ``--quick``
takes shorter decays, so that the window is shorter than the interval between switches in a short run too.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from fine_tune import QUICK, run
from side_by_side import Row, arguments, report, tiny_run

from srlora_dist.method.budget import window_length


def read_switches(folder: Path) -> list[dict[str, object]]:
    """A line a switch and site, switch 0 left out."""
    lines = [json.loads(line) for line in (folder / "switches.jsonl").read_text().splitlines()]
    return [line for line in lines if line["switch"] > 0]


def main() -> None:
    """Train with both, compare, and report."""
    options = arguments(__doc__, steps={"type": int, "default": 1500}, decay={"type": float, "default": 0.85})
    steps, decay = (120, 0.3) if options.quick else (options.steps, options.decay)
    torch.set_num_threads(1)
    settings = QUICK | {"train.max_steps": steps, "train.eval_every": steps, "checkpoint.every": 0}
    settings |= {"train.batch_size": 4} if options.quick else {}
    settings |= {"srlora.beta1": decay, "srlora.beta2": decay}
    seen = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            steps = 40
            settings |= tiny_run(Path(folder) / "files") | {"train.max_steps": steps, "train.eval_every": steps}
        for window in ("all", "auto"):
            place = Path(folder) / window
            run("srlora", place, [f"--{k}={v}" for k, v in (settings | {"srlora.importance_window": window}).items()])
            seen[window] = read_switches(place)
    pairs = list(zip(seen["all"], seen["auto"], strict=True))
    differ = sum(one["slots"] != other["slots"] for one, other in pairs)
    scores = [(a, b) for one, other in pairs for a, b in zip(one["scores"], other["scores"], strict=True)]
    length = window_length("auto", decay, decay)
    interval = seen["all"][0]["step"]
    row = Row(
        question="choices that a window changes",
        ours=f"importance_window auto: {length} steps",
        peer="importance_window all",
        case=f"demo, {steps} steps, decays {decay}, {len(pairs)} choices, {length} of each {interval} steps observed",
        ratios=[differ / len(pairs)],
        bound="exactly",
        target=0.0,
        more={"largest relative difference of a score": max(abs(a - b) / a for a, b in scores)},
    )
    report("window", [row], options)


if __name__ == "__main__":
    main()
