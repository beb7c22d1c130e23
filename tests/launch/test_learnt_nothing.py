"""A run that has learnt nothing does not end as if it had."""

from __future__ import annotations

import json

from tests.launch.conftest import Bench, Case

TASK = """
import torch
from srlora_dist.tasks.metrics import Scorer
from srlora_dist.tasks.text import text_task

def load(config):
    columns = {"text": ["the cat sat", "it was good"] * 20, "labels": [0.5, 1.0] * 20}
    task = text_task(config, columns, columns, 1, Scorer("pearson"))
    collate, loss, seen = task.collate, task.loss, []
    def with_nan(rows):
        batch = collate(rows)
        seen.append(len(rows))
        return batch | {"labels": batch["labels"] * (torch.nan if WHERE else 1)}
    task.collate = with_nan
    task.loss = lambda outputs, labels: loss(outputs, labels.nan_to_num(0.0)) * LOSS
    return task
"""
CASES = {
    "every step": ("True", "1.0", 1, "the gradient was NaN or infinite in all 4 steps, so nothing was learnt"),
    "a loss from the start": ("False", "float('nan')", 1, "the validation loss is nan before the first step"),
    "a loss later": ("False", "(1.0 if len(seen) < 8 else float('nan'))", 1, "and was finite after none"),
    "half of the steps": ("len(rows) == 4 and len(seen) % 4 < 2", "1.0", 0, "2 of 4 steps were left out, because"),
}


def test_a_run_that_has_learnt_nothing_is_never_reported_as_good(bench: Bench) -> None:
    cases = {}
    for name, (where, loss, *_) in CASES.items():
        (bench.folder / f"{name}.py").write_text(TASK.replace("WHERE", where).replace("LOSS", loss))
        short = {"task__name": bench.folder / f"{name}.py", "train__max_steps": 4, "train__eval_every": 4}
        sizes = {"train__batch_size": 4, "train__accumulation_steps": 1, "train__eval_batch_size": 8}
        cases[name] = Case(bench.arguments(f"nothing {name}", **short, **sizes))
    for name, ended in bench.run_all(cases).items():
        *_, status, message = CASES[name]
        assert ended.returncode == status, (name, ended.stderr)
        assert message in ended.stderr, (name, ended.stderr)
        folder = bench.run_folder(f"nothing {name}")
        assert (folder / "summary.json").exists() == (folder / "adapter_last").exists() == (status == 0), name
    summary = json.loads((bench.run_folder("nothing half of the steps") / "summary.json").read_text())
    assert "skipped_steps" in {finding["kind"] for finding in summary["findings"]}
    assert "skipped: 2 of 4 steps" in ended.stdout
    assert "noticed after step 4: 2 of 4 steps" in ended.stdout
