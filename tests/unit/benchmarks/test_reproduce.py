"""The paper's figures and presets, the runs of a grid, its file of results and its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.reproduce.grid import Grid, build_grid, digest
from benchmarks.reproduce.paper import TABLES, differs
from benchmarks.reproduce.report import draw_figures, found_results, write_table
from benchmarks.reproduce.results import Results, finished_summary
from benchmarks.reproduce.running import _wait_for_the_run_before, run_grid  # noqa: F401 (another process calls it)
from srlora_dist.checkpoint.folder_lock import FolderLock
from srlora_dist.config.parse import parse, to_yaml
from srlora_dist.tasks.glue import GLUE
from srlora_dist.tasks.registry import TASKS

PRESETS = Path(__file__).parents[3] / "launch" / "paper"
ALL_PRESETS = [(table, name) for table in TABLES.values() for name in table.tasks]


def grid(tmp_path: Path, *more: str, tasks: str = "rte") -> Grid:
    own = ["--table=3", "--tasks", *tasks.split(), "--seeds=2", f"--output_dir={tmp_path}"]
    return build_grid([*own, "--model=org/a-model", *more], PRESETS)


def summary_of(accuracy: float, **more: float) -> dict:
    keys = ("best_step", "skipped_steps", "resumed_after", "trainable_parameters", "train_seconds", "peak_memory_bytes")
    figures = {"loss": 0.5, "accuracy": accuracy, **more}
    about = {"model": "org/a-model", "steps": 12, "storage": "ddp", "world_size": 2, "versions": {}, "findings": []}
    return {**dict.fromkeys(keys, 0), **about, "start": figures, "best": figures, "final": figures}


def add_done(results: Results, cell: object, summary: dict) -> None:
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "metrics.jsonl").write_text(json.dumps({"step": 12, "epoch": 1.5}) + "\n")
    results.add_done(cell, summary, 1.0, {})


@pytest.mark.parametrize(("table", "name"), ALL_PRESETS, ids=[f"{table.presets}-{name}" for table, name in ALL_PRESETS])
def test_each_task_of_the_paper_has_a_preset(table: object, name: str) -> None:
    path = PRESETS / table.presets / f"{name}.yaml"
    assert path.is_file()
    assert name in TASKS
    config = parse(["--config", str(path)])
    assert config.task.name == name
    assert config.model.name_or_path == table.model
    assert not config.without_effect()


def test_no_preset_is_left_over() -> None:
    known = {PRESETS / table.presets / f"{name}.yaml" for table, name in ALL_PRESETS}
    assert set(PRESETS.rglob("*.yaml")) == known | {PRESETS / "minilm.yaml"}


def test_glue_figures_are_those_that_the_task_reports() -> None:
    for name, task in TABLES[3].tasks.items():
        assert task.metrics == GLUE[name].metrics
        assert all(len(figures) == len(task.metrics) for figures in task.figures.values())
        assert set(task.figures) == set(TABLES[3].methods)


@pytest.mark.long
def test_the_grid_is_method_by_task_by_seed(tmp_path: Path) -> None:
    runs = grid(tmp_path, "--methods", "lora", "srlora", "--train.epochs", "2", tasks="rte mrpc")
    assert [(cell.seed, cell.task, cell.method) for cell in runs.cells] == [
        (seed, task, method) for seed in (0, 1) for task in ("rte", "mrpc") for method in ("lora", "srlora")
    ]
    cell = runs.cells[-1]
    assert (cell.config.train.epochs, cell.config.seed, cell.config.method) == (2, 1, "srlora")
    assert cell.config.train.learning_rate == 1e-3  # the preset's
    assert cell.config.model.name_or_path == "org/a-model"
    assert len({cell.digest for cell in runs.cells}) == len({cell.folder for cell in runs.cells}) == 8
    assert len(grid(tmp_path).cells) == 2 * len(TABLES[3].methods)


@pytest.mark.long
def test_only_what_is_computed_makes_another_run(tmp_path: Path) -> None:
    digests = [cell.digest for cell in grid(tmp_path).cells]
    engine = str(PRESETS.parent / "accelerate" / "zero2.yaml")
    elsewhere = grid(tmp_path / "other", "--train.log_every=3", "--checkpoint.keep=1", "--accelerate", engine)
    assert [cell.digest for cell in elsewhere.cells] == digests
    longer = grid(tmp_path, "--train.epochs=3")
    assert not {cell.digest for cell in longer.cells} & set(digests)
    assert not {cell.folder for cell in longer.cells} & {cell.folder for cell in grid(tmp_path).cells}


@pytest.mark.long
def test_the_precision_of_the_launch_makes_another_run(tmp_path: Path) -> None:
    files = {}
    for precision in ("no", "fp16"):
        files[precision] = tmp_path / f"{precision}.yaml"
        files[precision].write_text(f"mixed_precision: {precision}\nnum_processes: 1\n")
    plain, mixed = (grid(tmp_path, "--accelerate", str(file)).cells[0] for file in files.values())
    assert plain.digest == grid(tmp_path).cells[0].digest != mixed.digest
    assert plain.folder != mixed.folder
    mixed.folder.mkdir(parents=True)
    (mixed.folder / "config.yaml").write_text(to_yaml(mixed.config))
    (mixed.folder / "summary.json").write_text('{"steps": 12}')
    assert finished_summary(mixed) == {"steps": 12}
    results = Results(tmp_path / "results.jsonl")
    add_done(results, mixed, summary_of(0.5))
    runs = grid(tmp_path, "--accelerate", str(files["fp16"]))
    text = write_table(runs, found_results(runs, results), [], tmp_path / "table.md")
    assert "2 x ddp, float32, mixed precision fp16." in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--table=5"], "--table"),
        (["--table=3", "--tasks", "demo"], "has 'demo'.*choose of"),
        (["--table=3", "--methods", "dora"], "has 'dora'.*choose of"),
        (["--table=3", "--seeds=0"], "--seeds is 0"),
        (["--table=3", "--accelerate=nowhere.yaml"], "which is no file"),
        (["--table=3", "--method=lora"], "set by the grid"),
        (["--table=3", "--train.speed=3"], "train.speed"),
        (["--table=3", "--task.data_dir=/nowhere"], "no folder /nowhere"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_grid(options, PRESETS)


def test_a_file_of_options_cannot_set_another_task(tmp_path: Path) -> None:
    """Its figures would stand in the wrong column."""
    (tmp_path / "mine.yaml").write_text("task:\n  name: sst2\n")
    with pytest.raises(ValueError, match="task.name is set to 'sst2', but the grid sets it"):
        grid(tmp_path, "--config", str(tmp_path / "mine.yaml"))


@pytest.mark.long
def test_a_figure_that_is_not_finite_is_told(tmp_path: Path) -> None:
    runs = grid(tmp_path, "--methods", "lora", tasks="stsb")
    results = Results(tmp_path / "results.jsonl")
    for cell in runs.cells:
        add_done(results, cell, summary_of(0.5, pearson=None if cell.seed else 0.5, spearman=0.5))
        (cell.folder / "metrics.jsonl").unlink()  # the curves are left out
    found = found_results(runs, results)
    text = write_table(runs, found, [], tmp_path / "table.md")
    assert "| LoRA | here, last step | 1 of 2 not finite | 50.00 ± 0.00 (n=2) |" in text
    assert [path.name for path in draw_figures(runs, found, tmp_path / "figures")] == ["table3.png"]


@pytest.mark.long
def test_a_result_without_its_metrics_is_kept(tmp_path: Path) -> None:
    """A crash of the machine can lose them when the summary is on disk; the grid has to go on."""
    runs = grid(tmp_path, "--methods", "lora")
    results = Results(tmp_path / "results.jsonl")
    for cell in runs.cells:
        cell.folder.mkdir(parents=True)
        (cell.folder / "metrics.jsonl").write_text("")
        results.add_done(cell, summary_of(0.5), 1.0, {})
    found = found_results(runs, results)
    assert "12 steps of 32 samples, rate" in write_table(runs, found, [], tmp_path / "table.md")
    assert [path.name for path in draw_figures(runs, found, tmp_path / "figures")] == ["table3.png"]


def test_a_file_of_results_that_a_crash_has_cut_is_mended(tmp_path: Path) -> None:
    first, second = grid(tmp_path, "--methods", "lora").cells
    results = Results(tmp_path / "results.jsonl")
    add_done(results, first, summary_of(0.5))
    with results.path.open("a") as file:
        file.write('{"table": 3, "status": "do')
    results = Results(results.path)
    results.add_failed(second, "too hot", 1)
    assert results.of(first)["final"]["accuracy"] == 0.5
    assert results.of(second) is None  # it is tried again
    assert [json.loads(line)["status"] for line in results.path.read_text().splitlines()] == ["done", "failed"]
    assert str(tmp_path) not in results.path.read_text()


def test_a_run_that_ended_without_a_result_is_found(tmp_path: Path) -> None:
    cell, other = grid(tmp_path, "--methods", "lora").cells
    assert finished_summary(cell) is None
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.yaml").write_text(to_yaml(cell.config))
    assert finished_summary(cell) is None
    (cell.folder / "summary.json").write_text('{"steps": 12}')
    assert finished_summary(cell) == {"steps": 12}
    (cell.folder / "config.yaml").write_text(to_yaml(other.config))
    assert finished_summary(cell) is None


@pytest.mark.long
def test_the_table_has_means_deviations_and_the_papers_figures(tmp_path: Path) -> None:
    runs = grid(tmp_path, tasks="rte mrpc")
    results = Results(tmp_path / "results.jsonl")
    for cell in runs.cells:
        if cell.method == "srlora" and cell.task == "rte":
            add_done(results, cell, summary_of(0.6 + 0.02 * cell.seed))
    add_done(results, grid(tmp_path, "--train.epochs=3").cells[-1], summary_of(0.99))  # of another grid
    text = write_table(runs, found_results(runs, results), ["mrpc lora seed 0: too hot"], tmp_path / "table.md")
    rows = {tuple(line.split(" | ")[:2]): line.split(" | ")[2:] for line in text.splitlines() if line.startswith("| ")}
    assert rows["| SRLoRA", "here, last step"][0] == "61.00 ± 1.41 (n=2)"  # of 60 and 62, the sample's
    assert rows["| SRLoRA", "here, last step"][1] == "not run"
    assert rows["| SRLoRA", "arXiv 2505.12433, Table 3"] == ["82.1", "90.3", "86.6 |"]
    assert rows["| LoRA", "arXiv 2505.12433, Table 3"] == ["80.4", "90.8", "87.5 |"]
    assert "org/a-model" in text
    assert "Differs from the paper" in text
    assert "DeBERTa-v3-base" in text
    assert "Failed: mrpc lora seed 0: too hot" in text
    assert (tmp_path / "table.md").read_text() == text


@pytest.mark.long
def test_a_result_outlives_options_that_are_added_later(tmp_path: Path) -> None:
    config = asdict(grid(tmp_path).cells[0].config)
    older = {**config, "srlora": {name: value for name, value in config["srlora"].items() if name != "grace"}}
    assert digest(older, "no") == digest(config, "no")
    assert digest({**config, "srlora": {**config["srlora"], "grace": 1}}, "no") != digest(config, "no")


HOLD = """
import sys, time
from srlora_dist.checkpoint.folder_lock import FolderLock
lock = FolderLock(sys.argv[1], "the run", "wait")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.long
def test_a_grid_names_the_one_that_runs_and_waits_for_a_run_that_a_killed_one_left(tmp_path) -> None:
    one = grid(tmp_path)
    with FolderLock(one.results, "another grid", "wait"):
        program = (
            f"from tests.unit.benchmarks.test_reproduce import *; run_grid(grid(Path({str(tmp_path)!r})), Path('no'))"
        )
        refused = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert f"{one.results} is in use by process {os.getpid()} on host" in refused.stderr
        run = subprocess.Popen([sys.executable, "-c", HOLD, one.cells[0].folder, "1.5"], stdout=subprocess.PIPE)
        assert run.stdout.readline() == b"held\n"
        _wait_for_the_run_before(one.cells[0])
        assert run.wait(1) == 0


def test_what_differs_from_the_paper_is_said() -> None:
    assert "its model is DeBERTa-v3-base" in differs(["rte"], ["org/a-model"])
    assert "Model and task as in the paper" in differs(["rte"], ["microsoft/deberta-v3-base"])
    assert "has no such task" in differs(["demo"], ["org/a-model"])
