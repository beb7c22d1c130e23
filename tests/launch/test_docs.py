"""Every command that README and docs show is run: on small models, for few steps, on CPU ranks, page by page."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from srlora_dist.commands.cli import main
from tests.launch.conftest import ROOT, Bench
from tests.launch.forks import Forks
from tests.unit.tasks.test_images import write_classes, write_idx, write_vit
from tests.unit.tasks.test_instruct import write_jsonl
from tests.unit.tasks.test_instruct import write_model as write_chat_model

pytestmark = pytest.mark.slow
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {
    "make test": "it is what runs this",
    "make unit": "a part of what runs this",
    "make install": "it has run before this",
    "make cluster": "as root, with SLURM",
    "srlora doctor": "tests/launch/test_doctor.py",
    "srlora svd": "tests/unit/commands/test_cli.py",
    "srlora inspect runs/one": "tests/unit/commands/test_cli.py",
    "srlora export runs/one": "tests/unit/commands/test_cli.py",
    "srlora merge runs/nf4": "tests/unit/commands/test_merge.py",
    "srlora plan": "tests/unit/commands/test_plan.py",
    "python benchmarks/engines_agree.py": "by hand: it takes minutes",
    "sbatch": "tests/cluster/test_slurm.py",
    "apt install": "it changes the machine",
    "pip install -c": "it has run before this",
    "module load": "of one cluster",
    "tail -f": "the log of a job",
    "export": "a path on the reader's machine",
}
"""What is not run here, by how the command begins after its variables, and where it is, or why nowhere."""

OF_SEVERAL_NODES = "--num_machines"  # tests/launch/test_presets.py runs those as two launchers
WITH_LIBAIO = "zero3_nvme"  # and those where libaio is
SHORT = {
    "task.max_length": 16,
    "task.max_train_samples": 24,
    "task.max_eval_samples": 4,
    "lora.rank": 4,
    "srlora.target_rank": 8,
    "train.max_steps": 3,
    "train.batch_size": 4,
    "train.eval_batch_size": 4,
}


def commands(page: Path) -> list[str]:
    """In their order: those of shell blocks, and those after a dollar sign in blocks with output."""
    found = []
    for kind, block in re.findall(r"```(\w*)\n(.*?)```", page.read_text(), flags=re.DOTALL):
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        shown = lines if kind == "bash" else [line[2:] for line in lines if kind == "" and line.startswith("$ ")]
        found += [command for line in shown if (command := re.sub(r"(^|\s+)#.*", "", line).strip())]
    return found


def is_elsewhere(command: str) -> bool:
    plain = re.sub(r'^(\w+=("[^"]*"|\S*)\s+)+', "", command)
    return any(plain.startswith(start) for start in ELSEWHERE)


@pytest.fixture(scope="module")
def places(bench: Bench, forks: Forks) -> dict[str, str]:
    """What stands in the documentation for something of the reader's, and what is taken for it."""
    folder = bench.folder
    write_vit(folder / "docs_vit")
    write_idx(folder / "docs_idx")
    write_classes(folder / "docs_pictures")
    write_chat_model(folder / "docs_chat")
    write_jsonl(folder / "docs_jsonl", [{"prompt": "one and one is", "completion": " two"}] * 24)
    (folder / "glue" / "MRPC").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (folder / "glue" / "MRPC" / name).write_text("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\ta\tb\n")
    (folder / "docs_tsv").mkdir()
    for name in ("train.tsv", "test.tsv"):
        (folder / "docs_tsv" / name).write_text("the cat sat\ttells\nwas it good\tasks\n" * 12)
    (folder / "docs.csv").write_text("text,labels\n" + "the cat sat,0\nit was good,1\n" * 16)
    for method, copies in {
        "srlora": ("demo-srlora", "rte-srlora", "a", "b"),
        "lora": ("rte-lora", "rte-pissa"),
    }.items():
        train(forks, bench, "cpu1", [f"--output_dir={folder / 'docs' / method}", f"--method={method}"])
        for name in copies:
            shutil.copytree(folder / "docs" / method, folder / "docs" / "runs" / name)
    return {
        "path/to/glue": str(folder / "glue"),
        "path/to/jsonl": str(folder / "docs_jsonl"),
        "path/to/decoder": str(folder / "docs_chat"),
        "path/to/pictures": str(folder / "docs_pictures"),
        "path/to/vit": str(folder / "docs_vit"),
        "path/to/folder": str(folder / "docs_tsv"),
        "/usr/share/datasets/fashion-mnist": str(folder / "docs_idx"),
        "roberta-base": str(folder / "model"),
        "config_file FILE": "config_file launch/accelerate/cpu2.yaml",
        "runs/": f"{folder}/docs/runs/",
        "layer.2.": "layer.1.",
        "$NODE": "0",
        "$FIRST_NODE": "127.0.0.1",
        " ...": "",
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, bench: Bench, forks: Forks, places: dict[str, str]) -> None:
    problems = {}
    for command in commands(page):
        if is_elsewhere(command):
            continue
        if command.startswith("make "):
            recipe = subprocess.run(
                ["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
            )
            command = next(line for line in recipe.stdout.splitlines() if "accelerate launch" in line)
        for place, taken in places.items():
            command = command.replace(place, taken)
        try:
            run(shlex.split(command), bench, forks)
        except Exception as error:
            problems[command] = str(error)
    assert problems == {}


def run(words: list[str], bench: Bench, forks: Forks) -> None:
    program, *rest = words
    if Path(program).name == "accelerate":
        run_launch(rest[1:], bench, forks)
    elif program == "srlora":
        run_console(rest, bench)
    elif program == "python":
        run_script(rest, bench)
    else:
        assert (program, rest[0]) == ("pip", "install"), "this is a command of a new kind: say how it is run"
        extras = set(re.search(r"\[(.*)\]", rest[-1])[1].split(","))
        assert extras <= set(metadata("srlora-dist").get_all("Provides-Extra"))


def run_launch(words: list[str], bench: Bench, forks: Forks) -> None:
    """``accelerate launch``: its options are read by Accelerate's own parser, the training runs on forked ranks."""
    options = launch_command_parser().parse_args(words)
    assert options.config_file is None or (ROOT / options.config_file).is_file()
    program, rest = options.training_script, options.training_script_args
    if program.startswith("examples/"):
        run_example(["-m", "accelerate.commands.launch", *words], bench)
        return
    assert program == "launch/train.py" or (options.module and [program, rest.pop(0)] == ["srlora_dist", "train"])
    if OF_SEVERAL_NODES in words or WITH_LIBAIO in str(options.config_file):
        return
    name = Path(options.config_file).stem if options.config_file else "cpu1"
    twin = name if name.startswith("cpu") else {"ddp": "cpu2"}.get(name, f"{name}_cpu".replace("_cpu_cpu", "_cpu"))
    train(forks, bench, twin, rest)


def train(forks: Forks, bench: Bench, twin: str, arguments: list[str]) -> None:
    """Run it with the options that are given, and what makes it short; what has to be there is filled in."""
    folder, given = bench.folder, " ".join(arguments)
    kind = (re.findall(r"--task\.name[ =](\S+)", given) or ["rte"])[-1]
    model, data = {
        "rte": ("model", "glue"),
        "cifar100": ("docs_vit", "docs_pictures"),
        "fashion_mnist": ("docs_vit", "docs_idx"),
        "instruct": ("docs_chat", "docs_jsonl"),
    }.get(kind, ("model", "glue"))
    defaults = {
        "task.name": "rte",
        "task.data_dir": folder / data,
        "model.name_or_path": folder / model,
        "output_dir": folder / "docs" / "run",
        "srlora.svd_cache": folder / "svd",
        "checkpoint.resume": "never",
    }
    filled = [f"--{key}={value}" for key, value in defaults.items() if f"--{key}" not in given]
    short = [f"--{key}={value}" for key, value in SHORT.items()]
    world_size = 1 if twin == "cpu1" else 2
    ended = forks.start(yaml=twin, world_size=world_size, arguments=[*arguments, *filled, *short])
    assert set(ended["statuses"].values()) == {0}, ended["stderr"]


def run_console(words: list[str], bench: Bench) -> None:
    places = {"merged/": "merged", "adapter/": "adapter", "adapter_400": "adapter_400", "figures/rte": "figures"}
    words = [str(bench.folder / "docs" / places[word]) if word in places else word for word in words]
    assert main(words) == 0


def run_script(words: list[str], bench: Bench) -> None:
    if words[0].startswith("examples/"):
        run_example(words, bench)
        return
    assert words[0] == "launch/reproduce.py"
    dry = [*words[1:], *["--dry_run"] * ("--dry_run" not in words)]  # tests/launch/test_reproduce.py runs a grid
    assert runpy.run_path(str(ROOT / words[0]))["main"](dry) == 0


def run_example(words: list[str], bench: Bench) -> None:
    """With little data and a small model; its last checkpoint becomes the one that the page exports."""
    folder = bench.folder / "docs" / "runs" / "mine"
    is_sft = any(word.endswith("sft.py") for word in words)
    text = bench.folder / "text" / "train.txt"
    own = (
        ["--data", str(text)]
        if is_sft
        else ["--data", str(bench.folder / "docs.csv"), "--model", str(bench.folder / "model")]
    )
    short = ["--max_steps", "8", "--save_steps", "8", "--output_dir", str(folder / "sft" if is_sft else folder)]
    environment = bench.environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run(
        [sys.executable, *words, *own, *short], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    if (folder / "checkpoint-8").exists():
        shutil.rmtree(folder / "checkpoint-400", ignore_errors=True)
        (folder / "checkpoint-8").rename(folder / "checkpoint-400")


def test_nothing_is_run_elsewhere_that_is_not_there() -> None:
    shown = [command for page in PAGES for command in commands(page)]
    for start, where in ELSEWHERE.items():
        assert any(re.search(rf"(^|\s){re.escape(start)}", command) for command in shown), f"{start} is not shown"
        assert (ROOT / where).is_file() or not where.startswith("tests/"), where
