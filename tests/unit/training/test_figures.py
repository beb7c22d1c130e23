"""What the figures show of runs that ended, of one that goes on, and of several beside each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt

from srlora_dist.commands import plot
from srlora_dist.config.parse import parse, to_yaml
from srlora_dist.training import figures
from srlora_dist.training.figures import intervals, loss
from srlora_dist.training.figures.runs import RunFiles, about, name_runs
from srlora_dist.training.figures.style import LINES, OTHERS, legend_above, line_styles

SITES = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense", "bert.pooler.dense"]


def write_run(folder: Path, method: str = "srlora", seed: int = 0, ended: bool = True, *more: str) -> Path:
    """Files as a run of 12 steps with a switch after 4 and 8 leaves them; its loss falls faster with a higher seed."""
    folder.mkdir(parents=True)
    options = [f"--method={method}", f"--seed={seed}", "--task.name=rte", "--model.name_or_path=org/a-model", *more]
    (folder / "config.yaml").write_text(to_yaml(parse([*options, "--lora.rank=4", "--srlora.target_rank=8"])))
    steps = range(0, 13 if ended else 7, 2)
    lines = [
        {"step": step, "epoch": step / 10, "split": split, "loss": 1.0 - step * (1 + seed) / 100}
        for step in steps
        for split in (("train", "eval") if step else ("eval",))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    taken = [(0, 0, [], [0, 1, 2, 3]), (4, 1, [2, 3], [4, 5]), (8, 2, [0, 5], [6, 7])]
    switches = [
        {"step": step, "switch": k, "site": site, "slots": [], "directions": old, "new_directions": new, "scores": []}
        for step, k, old, new in taken[: 3 if ended else 2]
        for site in SITES
    ]
    if method == "srlora":
        (folder / "switches.jsonl").write_text("".join(json.dumps(line) + "\n" for line in switches))
    if ended:
        summary = {"model": "org/a-model", "steps": 12, "world_size": 2, "storage": "ddp"}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[plt.Figure, str]]:
    """Figures stay open, with the line below them, to be looked at."""
    kept: list[tuple[plt.Figure, str]] = []
    for module in (loss, intervals):
        monkeypatch.setattr(module, "save", lambda figure, path, text, above=0: kept.append((figure, text)) or path)
    yield kept
    plt.close("all")


@pytest.mark.long
def test_three_figures_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_run(tmp_path / "run")
    plot.run([str(folder)])
    names = ["loss.png", "active_intervals.png", "interval_lengths.png"]
    assert capsys.readouterr().out.split() == [str(folder / "figures" / name) for name in names]
    assert all((folder / "figures" / name).stat().st_size > 10_000 for name in names)


@pytest.mark.long
def test_the_trainer_draws_the_same_files(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").unlink()  # it is written after the figures
    assert [path.name for path in figures.draw(folder, summary)] == [
        "loss.png",
        "active_intervals.png",
        "interval_lengths.png",
    ]


@pytest.mark.long
def test_seeds_become_a_mean_and_a_band(tmp_path: Path, drawn: list) -> None:
    runs = [RunFiles.read(write_run(tmp_path / f"s{seed}", seed=seed)) for seed in (0, 2)]
    runs.append(RunFiles.read(write_run(tmp_path / "lora", "lora")))
    name_runs(runs, None)
    paths, left_out = figures.compare(runs, tmp_path)
    assert [path.name for path in paths] == ["loss.png", "active_intervals.png", "interval_lengths.png"]
    assert len(left_out) == 1
    assert "method lora has no switches" in left_out[0]
    training = drawn[0][0].axes[0]
    mean, alone = training.lines[0], training.lines[1]
    steps = np.array([2, 4, 6, 8, 10, 12])
    assert np.allclose(mean.get_xdata(), steps)
    assert np.allclose(mean.get_ydata(), 1 - steps * 0.02)  # rates of 1 and 3
    band = training.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(1 - 12 * 0.02 - 12 * 0.01 * np.sqrt(2))  # sample deviation of 1 and 3
    assert np.allclose(alone.get_ydata(), 1 - steps * 0.01)
    titles = [text.get_text() for text in drawn[0][0].legends[0].get_texts()]
    assert titles == ["SRLoRA (n=2)", "LoRA", "switch"]
    assert "one sample standard deviation of n seeds" in drawn[0][1]
    assert [axes.get_title() for axes in drawn[0][0].axes] == ["RTE: training loss", "RTE: validation loss"]
    assert all(axes.get_ylabel() and axes.get_title() for axes in drawn[0][0].axes)
    assert "seed 0 / 2" in drawn[0][1]


def test_intervals_of_a_site_and_their_variance(tmp_path: Path, drawn: list) -> None:
    run = RunFiles.read(write_run(tmp_path / "run"))
    figures.compare([run], tmp_path, site="output")
    site, lengths = drawn[1][0].axes[0], drawn[2][0].axes
    assert site.get_title().endswith(SITES[1])
    bars = {(round(bar.get_y() + 0.4), bar.get_x(), bar.get_width()) for bar in site.patches}
    assert bars == {(0, 0, 8), (1, 0, 12), (2, 0, 4), (3, 0, 4), (4, 4, 8), (5, 4, 4), (6, 8, 4), (7, 8, 4)}
    assert sum(bar.get_height() for bar in lengths[0].patches) == 3 * 8
    variance = np.var([8, 12, 4, 4, 8, 4, 4, 4])
    assert [line.get_ydata().tolist() for line in lengths[1].lines] == [[variance]] * 3
    kinds = [text.get_text() for text in lengths[1].get_legend().get_texts()]
    assert kinds == ["attention.self.query", "output.dense", "bert.pooler.dense"]
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.get_title() for axes in [site, *lengths])


def test_a_run_that_has_not_ended_is_drawn_up_to_now(tmp_path: Path, drawn: list) -> None:
    run = RunFiles.read(write_run(tmp_path / "run", "srlora", 0, False))
    figures.compare([run], tmp_path)
    assert max(bar.get_x() + bar.get_width() for bar in drawn[1][0].axes[0].patches) == 6
    assert "not ended yet" in drawn[0][1]


@pytest.mark.long
def test_before_the_first_switch_there_is_a_reason(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    switches = (folder / "switches.jsonl").read_text().splitlines(keepends=True)
    (folder / "switches.jsonl").write_text("".join(switches[: len(SITES)]))
    paths, left_out = figures.compare([RunFiles.read(folder)], tmp_path)
    assert [path.name for path in paths] == ["loss.png"]
    assert "no switch has happened in 12 steps" in left_out[0]


def test_the_line_below_says_what_was_run(tmp_path: Path) -> None:
    here = RunFiles.read(write_run(tmp_path / "here"))
    text = about([here])
    for part in (
        "org/a-model on RTE",
        "12 steps of 32 samples",
        "rank 4, target rank 8",
        "2 x ddp",
    ):
        assert part in text
    assert about([replace(here, note="In a table.")]) == text + "In a table."


@pytest.mark.long
def test_runs_that_differ_in_an_option_are_no_seeds_of_each_other(tmp_path: Path) -> None:
    runs = [RunFiles.read(write_run(tmp_path / str(seed), "srlora", seed)) for seed in (0, 1)]
    runs.append(RunFiles.read(write_run(tmp_path / "other", "srlora", 0, True, "--srlora.fusion_ratio=0.25")))
    name_runs(runs, None)
    assert [run.label for run in runs] == ["srlora, fusion_ratio 0.5"] * 2 + ["srlora, fusion_ratio 0.25"]
    name_runs(runs, ["a", "a", "b"])
    assert [run.label for run in runs] == ["a", "a", "b"]
    with pytest.raises(ValueError, match="2 names for 3 runs"):
        name_runs(runs, ["a", "b"])


@pytest.mark.long
def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        plot.run([str(tmp_path / "none")])
    with pytest.raises(ValueError, match=r"it has no config\.yaml"):
        plot.run([str(tmp_path)])
    folder = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="no such site: its first are bert"):
        plot.run([str(folder), "--site", "mlp"])
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no metrics yet"):
        plot.run([str(folder)])
    with pytest.raises(ValueError, match="srlora plot --help"):
        plot.run([str(folder), "--nonsense"])


def test_a_switch_after_the_last_logged_loss_has_no_negative_length(tmp_path: Path, drawn: list) -> None:
    folder = write_run(tmp_path / "run", "srlora", 0, False)
    metrics = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(metrics[:3]))  # up to step 2, and a switch came after step 4
    run = RunFiles.read(folder)
    assert run.num_steps == 4
    lengths = [x.end - x.start for x in intervals.active_intervals(run.switches, run.num_steps)[SITES[0]]]
    assert sorted(lengths) == [0, 0, 4, 4, 4, 4]


@pytest.mark.long
def test_two_runs_of_one_seed_are_no_seeds_of_each_other(tmp_path: Path) -> None:
    runs = [RunFiles.read(write_run(tmp_path / f"{name}{seed}", "srlora", seed)) for seed in (0, 1) for name in "ab"]
    for run in runs:
        run.summary["storage"] = "zero3" if run.folder.name.startswith("b") else "ddp"
    name_runs(runs, None)
    assert [run.label for run in runs] == ["srlora, 2 x ddp", "srlora, 2 x zero3"] * 2
    for run in runs:
        run.summary["storage"] = "ddp"
    name_runs(runs, None)
    assert [run.label for run in runs] == [f"srlora, {run.folder}" for run in runs]


def test_runs_that_log_at_other_steps_are_no_seeds_of_each_other(tmp_path: Path) -> None:
    """Their training losses are means over other windows, and the steps that both have may be none."""
    runs = [RunFiles.read(write_run(tmp_path / f"{n}", "lora", n, True, f"--train.log_every={n + 1}")) for n in (0, 1)]
    name_runs(runs, None)
    assert [run.label for run in runs] == ["lora, log_every 1", "lora, log_every 2"]


@pytest.mark.long
def test_runs_of_one_label_need_the_same_sites(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))]
    lines = (folders[1] / "switches.jsonl").read_text()
    (folders[1] / "switches.jsonl").write_text(lines.replace("pooler", "other"))
    with pytest.raises(ValueError, match="have other sites: give them different --labels"):
        plot.run([*map(str, folders), "--output", str(tmp_path / "figures")])


@pytest.mark.long
def test_many_labels_are_told_apart_and_none_is_cut(tmp_path: Path) -> None:
    labels = [f"a run that was trained at a rate of 1e-{k} and has a long name of its own" for k in range(24)]
    styles = line_styles(labels)
    assert len({(style["color"], str(style["linestyle"])) for style in styles.values()}) == 24
    assert len(OTHERS) * len(LINES) == 40
    runs = [RunFiles.read(write_run(tmp_path / str(k), "lora")) for k in range(24)]
    name_runs(runs, labels)
    loss.compare_losses(runs, tmp_path / "many.png")
    figure = plt.figure(figsize=(7, 7.8))
    handles = [plt.Line2D([], [], **style) for style in styles.values()]
    height = legend_above(figure, handles, labels, most_across=5)
    extent = figure.legends[0].get_window_extent()
    assert (extent.x0 >= 0, extent.x1 <= figure.bbox.width) == (True, True)
    assert height == pytest.approx(extent.height / figure.dpi)
    assert len(figure.legends) == 1
    plt.close(figure)


@pytest.mark.long
def test_figures_of_labels_that_differ_in_a_sign_are_all_there(tmp_path: Path) -> None:
    runs = [RunFiles.read(write_run(tmp_path / name, "srlora", 0)) for name in "abc"]
    name_runs(runs, ["r+1", "r-1", "r 1"])
    paths, _ = figures.compare(runs, tmp_path / "figures")
    assert len(set(paths)) == len(paths) == 7
    assert all(path.is_file() for path in paths)


@pytest.mark.long
def test_a_task_of_the_users_own_is_called_after_its_file(tmp_path: Path, drawn: list) -> None:
    own = "--task.name=path/to/asks.py"
    runs = [RunFiles.read(write_run(tmp_path / method, method, 0, True, own)) for method in ("srlora", "pissa")]
    runs[1].switches = runs[0].switches
    name_runs(runs, None)
    paths, _ = figures.compare(runs, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "loss.png",
        "active_intervals-asks-srlora.png",
        "interval_lengths-asks-srlora.png",
        "active_intervals-asks-pissa.png",
        "interval_lengths-asks-pissa.png",
    ]
    assert [axes.get_title() for axes in drawn[0][0].axes] == ["asks: training loss", "asks: validation loss"]
    assert drawn[0][0].axes[0].get_ylabel() == "loss"  # of any kind
    assert "on asks" in drawn[0][1]


@pytest.mark.long
def test_bars_of_variances_say_what_they_are(tmp_path: Path, drawn: list) -> None:
    seeds = [RunFiles.read(write_run(tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    for line in seeds[1].switches:
        line["step"] += line["step"] // 4
    name_runs(seeds, None)
    figures.compare(seeds, tmp_path)
    figures.compare(seeds[:1], tmp_path)
    with_seeds, alone = drawn[2], drawn[5]
    assert with_seeds[1].startswith("Bars: one sample standard deviation over 2 seeds. ")
    assert not alone[1].startswith("Bars")
    ends = with_seeds[0].axes[1].collections[0].get_segments()[0][:, 1]
    each = [np.var([8, 12, 4, 4, 8, 4, 4, 4]), np.var([10, 12, 5, 5, 7, 5, 2, 2])]
    assert ends.tolist() == pytest.approx([np.mean(each) - np.std(each, ddof=1), np.mean(each) + np.std(each, ddof=1)])


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text("model: {}\n")
    with pytest.raises(ValueError, match=r"its config\.yaml is of something else"):
        plot.run([str(folder)])
