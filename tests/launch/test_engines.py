"""``accelerate launch`` itself, on one process and two: the results of a run, and its adapters on the untouched base.

The other files of launch/accelerate train in test_presets.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.launch.conftest import NUM_DEV, NUM_TRAIN, Bench, Case, Ended

ENGINES = {"cpu1": ("plain", 1), "cpu2": ("ddp", 2), "zero3_cpu": ("zero3", 2)}
FILES = {
    "config.yaml",
    "metrics.jsonl",
    "switches.jsonl",
    "summary.json",
    "figures/loss.png",
    "figures/active_intervals.png",
    "figures/interval_lengths.png",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter_last/adapter_config.json",
    "adapter_last/adapter_model.safetensors",
    "ledger/switch-00000.safetensors",
    "ledger/switch-00001.safetensors",
    "checkpoints/step-6/manifest.json",
    "checkpoints/step-6/state.json",
}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder: Path, split: str) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in lines(folder / "metrics.jsonl") if line["split"] == split])


@pytest.fixture(scope="module")
def plain(bench: Bench) -> tuple[Path, Ended]:
    ended = bench.launch_yaml("cpu1", *bench.arguments("cpu1"))
    return bench.run_folder("cpu1"), ended


@pytest.mark.parametrize("name", ENGINES)
def test_trains_on_the_engine_that_was_asked_for(name: str, bench: Bench, plain: tuple[Path, Ended]) -> None:
    reference, ended = plain
    if name != "cpu1":
        ended = bench.launch_yaml(name, *bench.arguments(name))
    assert ended.returncode == 0, ended.stderr[-3000:]
    folder = bench.run_folder(name)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["storage"], summary["world_size"]) == ENGINES[name]
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} >= FILES
    for split in ("train", "eval"):
        assert len(losses(folder, split)) == 6 + (split == "eval")  # and one before the first step
        torch.testing.assert_close(losses(folder, split), losses(reference, split), rtol=1e-5, atol=1e-6)
    keys = ("step", "switch", "site", "slots", "directions", "new_directions")
    picked, expected = (
        [[line[key] for key in keys] for line in lines(run / "switches.jsonl")] for run in (folder, reference)
    )
    assert picked == expected
    assert str(folder / "adapter") in ended.stdout
    assert adapter_loss(bench, folder / "adapter_last") == pytest.approx(summary["final"]["loss"], rel=1e-5)
    assert adapter_loss(bench, folder / "adapter") == pytest.approx(summary["best"]["loss"], rel=1e-5)


def adapter_loss(bench: Bench, adapter: Path) -> float:
    """Validation loss of an exported adapter on the untouched base."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from srlora_dist.config.run import ModelOptions, RunConfig, TaskOptions
    from srlora_dist.tasks.registry import load_task

    options = TaskOptions(name="rte", data_dir=str(bench.folder / "glue"), max_length=32)
    config = RunConfig(model=ModelOptions(name_or_path=str(bench.folder / "model")), task=options)
    task = load_task(config)
    base = AutoModelForSequenceClassification.from_pretrained(bench.folder / "model", num_labels=2)
    model = PeftModel.from_pretrained(base, adapter).eval()
    batch = task.collate([task.eval[k] for k in range(NUM_DEV)])
    labels = batch.pop("labels")
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(**batch).logits, labels).item()


def test_metrics_hold_what_the_design_names(plain: tuple[Path, Ended]) -> None:
    start, train, evaluation = lines(plain[0] / "metrics.jsonl")[:3]
    assert (start["step"], start["split"]) == (0, "eval")
    assert train.keys() == {
        *("step", "epoch", "split", "loss", "learning_rate", "grad_norm", "step_time", "tokens_per_second")
    }
    assert evaluation.keys() == {"step", "epoch", "split", "loss", "accuracy"}
    assert train["epoch"] == pytest.approx(1 / (NUM_TRAIN // 8))
    assert any((plain[0] / "tensorboard").iterdir())


METHODS = ("srlora", "lora", "pissa", "adalora")


@pytest.fixture(scope="module")
def more(bench: Bench, plain: tuple[Path, Ended]) -> dict[str, Ended]:
    """The first run again from its config.yaml, and all methods one after the other into one folder."""
    folder = bench.run_folder("same")
    (folder / "figures").mkdir(parents=True)
    for name in ("notes.txt", "figures/mine.png"):
        (folder / name).write_text("keep me")
    again = Case(["--config", str(plain[0] / "config.yaml"), "--output_dir", str(bench.run_folder("again"))])
    into_same = {name: Case(bench.arguments("same", method=name), figures=True) for name in METHODS}
    return bench.run_all({"again": again} | into_same)


def test_saved_configuration_runs_again(bench: Bench, plain: tuple[Path, Ended], more: dict[str, Ended]) -> None:
    assert more["again"].returncode == 0, more["again"].stderr
    assert yaml.safe_load((plain[0] / "config.yaml").read_text())["output_dir"] == str(plain[0])
    again = losses(bench.run_folder("again"), "eval")
    torch.testing.assert_close(again, losses(plain[0], "eval"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_runs(method: str, more: dict[str, Ended]) -> None:
    assert more[method].returncode == 0, more[method].stderr
    assert f"{method} on rte: 6 steps on 1 x plain" in more[method].stdout


def test_a_run_into_the_folder_of_another_starts_fresh(bench: Bench, more: dict[str, Ended]) -> None:
    folder = bench.run_folder("same")
    assert len(lines(folder / "metrics.jsonl")) == 13
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["method"], summary["storage"]) == (METHODS[-1], "plain")
    assert not (folder / "switches.jsonl").exists()
    assert not list((folder / "ledger").iterdir())
    assert not (folder / "checkpoints").exists()  # adalora writes none
    earlier = [json.loads((folder.parent / f"same.{n}" / "summary.json").read_text()) for n in range(1, len(METHODS))]
    assert [each["method"] for each in earlier] == list(METHODS[:-1])
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert (folder / "notes.txt").read_text() == (folder / "figures" / "mine.png").read_text() == "keep me"
    assert adapter_loss(bench, folder / "adapter_last") == pytest.approx(summary["final"]["loss"], rel=1e-5)
