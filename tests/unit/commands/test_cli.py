"""The command ``srlora``: what svd, train, inspect and export do to one run, and how each command refuses."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.commands.cli import COMMANDS, main, usage
from srlora_dist.engine.preemption import SIGNALS
from tests.launch.conftest import Bench, write_model, write_rte
from tests.ranks.engines import make_net
from tests.unit.method.test_switcher import take_steps


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The signals and the state of Accelerate, which a run in this process changes, are put back."""
    folder = tmp_path_factory.mktemp("commands")
    write_model(folder / "model")
    write_rte(folder / "glue")
    handlers = {name: signal.getsignal(name) for name in SIGNALS}
    yield Bench(folder)
    for name, handler in handlers.items():
        signal.signal(name, handler)
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def run(bench: Bench) -> dict[str, object]:
    """``srlora svd`` twice, and ``srlora train`` with the same options; what was printed, and the file between."""
    import contextlib
    import io

    arguments = bench.arguments("one", srlora__target_rank=10)
    printed, files = {}, []
    for name, command in (("first", "svd"), ("second", "svd"), ("train", "train")):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main([command, *arguments]) == 0
        printed[name] = out.getvalue()
        files.append([(path.name, path.stat().st_mtime_ns) for path in (bench.folder / "svd").iterdir()])
    return {"folder": bench.run_folder("one"), "files": files, **printed}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def shown(capsys: pytest.CaptureFixture, *argv: str | Path) -> str:
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture, *argv: str | Path) -> str:
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("srlora: error: ")


@pytest.mark.long
def test_a_run_finds_the_directions_that_were_computed_ahead(run: dict) -> None:
    assert "13 sites, computed in" in run["first"]
    assert "13 sites, found in the cache" in run["second"]
    assert "32 x 64      2          10" in run["first"]
    one, again, after_training = run["files"]
    assert len(one) == 1
    assert one == again == after_training
    assert "srlora on rte: 6 steps on 1 x plain" in run["train"]


def test_svd_prints_the_ends_of_the_spectrum(run: dict, bench: Bench) -> None:
    weights = load_file(bench.folder / "model" / "model.safetensors")
    values = [torch.linalg.svdvals(w)[:10] for name, w in weights.items() if w.dim() == 2 and "embed" not in name]
    assert f"largest singular value {max(v[0] for v in values):.4g} (" in run["first"]
    assert f"smallest {min(v[-1] for v in values):.4g} (" in run["first"]


def test_inspect_says_what_the_run_has_logged(run: dict, capsys) -> None:
    folder = run["folder"]
    switches = [line for line in lines(folder / "switches.jsonl") if line["switch"]]
    whole = json.loads(shown(capsys, "inspect", folder, "--json"))
    assert whole["schedule"] == {"steps": 6, "num_made": 3, "made": [0, 2, 4], "to_come": []}
    assert whole["step"] == 6
    assert whole["method"] == "srlora"
    for row in whole["scores"]:
        scores = [s for line in switches if line["switch"] == row["switch"] for s in line["scores"]]
        assert (row["min"], row["max"]) == (min(scores), max(scores))
        assert row["mean"] == pytest.approx(sum(scores) / len(scores))
    retired = [(line["site"], slot) for line in switches for slot in line["slots"]]
    for site in whole["sites"]:
        assert (site["rank"], site["target_rank"], site["num_taken"], site["num_fused"]) == (4, 10, 8, 4)
        last = [line for line in switches if line["site"] == site["name"]][-1]
        assert site["last_slots"] == last["slots"]
        assert whole["retired"][site["name"]] == [retired.count((site["name"], slot)) for slot in range(4)]
    files = [path for path in (folder / "checkpoints" / "step-6").rglob("*") if path.is_file()]
    assert sum(whole["bytes"].values()) == sum(path.stat().st_size for path in files if path.name != "manifest.json")
    assert whole["bytes"].keys() >= {"trainable", "moments", "ledger", "state"}


def test_inspect_takes_a_run_its_checkpoints_or_one_of_them(run: dict, capsys) -> None:
    folder = run["folder"]
    text = shown(capsys, "inspect", folder)
    assert "6 steps, 3 switches made, after steps 0, 2, 4; to come: none" in text
    assert "32 x 64     4      10      8      4" in text
    assert text == shown(capsys, "inspect", folder / "checkpoints") == shown(capsys, "inspect", text.split(":")[0])
    early = shown(capsys, "inspect", min((folder / "checkpoints").iterdir()))
    assert early.split(":")[0] != text.split(":")[0]


def test_inspect_shows_one_site(run: dict, capsys) -> None:
    name = "bert.encoder.layer.0.output.dense"
    site = json.loads(shown(capsys, "inspect", run["folder"], "--site", name, "--json"))
    logged = [line for line in lines(run["folder"] / "switches.jsonl") if line["site"] == name]
    assert [part["slots"] for part in site["switches"]] == [line["slots"] for line in logged]
    assert sorted(site["held"]) == sorted({*range(8)} - {d for line in logged for d in line["directions"]})
    text = shown(capsys, "inspect", run["folder"], "--site", name)
    assert "8 of 10 directions taken, 4 pairs fused" in text
    message = refused(capsys, "inspect", run["folder"], "--site", "0.output.dense")
    assert message == "the checkpoint has no site '0.output.dense': choose one of bert.encoder.layer.0.output.dense"


def test_inspect_knows_checkpoints_of_another_loop(tmp_path: Path, capsys) -> None:
    """They hold no options; a ledger in memory keeps its reports as well, also of before it was resumed."""
    config = SRLoRAConfig(target_rank=10, svd_cache=str(tmp_path / "svd"))
    for folder, resumed, num_steps in (("mine", None, 8), ("more", tmp_path / "mine", 6)):
        model = make_net()
        switcher = Switcher(model, config, 20)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        switcher.bind(model, optimizer, resumed)
        take_steps(model, optimizer, switcher, num_steps)
        switcher.save_checkpoint(tmp_path / folder)
    first, second = switcher.due_steps
    text = shown(capsys, "inspect", tmp_path / "mine")
    assert "a loop of your own" in text
    assert f"2 switches made, after steps 0, {first}; to come: {second}" in text
    text = shown(capsys, "inspect", tmp_path / "more")
    assert f"3 switches made, after steps 0, {first}, {second}; to come: none" in text
    assert "retired most often: " in text


@pytest.mark.long
def test_inspect_knows_methods_without_switches(bench: Bench, capsys) -> None:
    assert main(["train", *bench.arguments("plain", method="lora", train__max_steps=1)]) == 0
    assert "no switches: the method makes none" in shown(capsys, "inspect", bench.run_folder("plain"))
    name = "bert.pooler.dense"
    text = shown(capsys, "inspect", bench.run_folder("plain"), "--site", name)
    assert text.startswith(f"{name}: 32 x 32, rank 4, scale 1, 0 of 0 directions taken")


def test_export_writes_the_adapter_of_the_last_step(run: dict, tmp_path: Path, capsys) -> None:
    text = shown(capsys, "export", run["folder"] / "checkpoints", tmp_path / "adapter")
    assert text == f"adapter of step 6: {tmp_path / 'adapter'}\n"
    got, live = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "adapter", run["folder"] / "adapter"))
    assert got.keys() == live.keys()
    last = load_file(run["folder"] / "adapter_last" / "adapter_model.safetensors")
    assert all(torch.equal(got[name], last[name]) for name in last)


REFUSED = {
    "there is no command 'fly'": ["fly"],
    "the following arguments are required: folder": ["inspect"],
    "there is no checkpoint in": ["inspect", "{empty}"],
    "give the checkpoints/ folder of a run": ["export", "{empty}", "{empty}/adapter"],
    "unrecognized arguments: --colour": ["doctor", "--colour"],
    "x.yaml is no file of Accelerate with num_processes": ["doctor", "--config-file", "{empty}/x.yaml"],
    "is no adapter: it has no adapter_config.json": ["merge", "{empty}", "{empty}/merged"],
    "method lora needs no directions": ["svd", "--method", "lora"],
    "configuration: ": ["svd", "--srlora.target_rnk", "3"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_one_line_and_status_2(message: str, tmp_path: Path, capsys) -> None:
    assert message in refused(capsys, *(word.replace("{empty}", str(tmp_path)) for word in REFUSED[message]))


def test_debugging_shows_where_an_error_came_from(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SRLORA_DEBUG", "1")
    with pytest.raises(ValueError, match="there is no checkpoint"):
        main(["inspect", str(tmp_path)])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys) -> None:
    assert f"  {name} " in usage()
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert f"usage: srlora {name}" in capsys.readouterr().out
