"""Every script under benchmarks/, examples/ and launch/ runs: at a tiny size, where no figure counts."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.launch.conftest import ROOT, Bench
from tests.unit.tasks.test_images import write_idx, write_vit

STEPS = ["--max_steps=8", "--save_steps=8"]
IN_ONE_PROCESS = {
    "benchmarks/step_cost.py": ["--tiny"],
    "benchmarks/window.py": ["--tiny"],
    "benchmarks/fine_tune.py": ["--tiny"],
    "benchmarks/weight_edit.py": ["--tiny"],
    "benchmarks/directions.py": ["--tiny"],
    "benchmarks/preservation.py": [
        "--switches=2",
        "--rows=64",
        "--columns=64",
        "--results={folder}/preservation.jsonl",
    ],
    "examples/hf_trainer.py": [
        "--model={model}",
        "--data={csv}",
        "--max_steps=8",
        "--save_steps=8",
        "--output_dir={folder}/hf",
    ],
    "examples/sft.py": ["--data={text}", "--max_steps=8", "--save_steps=8", "--output_dir={folder}/sft"],
}
ALONE = {  # with ranks or launches
    "benchmarks/run.py": ["--tiny"],
    "benchmarks/engines_agree.py": ["--output_dir={folder}/agree", "--cases", "ddp", "--", "{options}"],
    "benchmarks/decoder.py": [
        *(
            "--model={decoder}",
            "--cases",
            "ddp-fp32",
            "--output_dir={folder}/decoder",
            "--results={folder}/decoder.jsonl",
        ),
        *("--", "--task.data_dir={texts}", "--task.max_length=16", "--train.max_steps=8", "--srlora.target_rank=16"),
    ],
    "benchmarks/support_matrix.py": ["--only", "plain and fp32"],
}
(BY_RUN,) = (
    ast.literal_eval(node.value)
    for node in ast.parse((ROOT / "benchmarks" / "run.py").read_text()).body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SCRIPTS"
)
LEARNING = {f"benchmarks/learning/{name}.py" for name in ("prepare", "run_studies", "report")}
PARTS = {"benchmarks/side_by_side.py", "benchmarks/stack.py"}
PARTS |= {f"benchmarks/learning/{name}.py" for name in ("studies", "measures", "drawing")}
PARTS |= {f"benchmarks/reproduce/{name}.py" for name in ("grid", "paper", "report", "running", "results", "table")}
ELSEWHERE = {
    "examples/my_task.py": "tests/unit/tasks/test_custom.py",
    "launch/train.py": "tests/launch/test_docs.py",
    "launch/reproduce.py": "tests/launch/test_reproduce.py",
}


@pytest.fixture(scope="module")
def places(bench: Bench) -> dict[str, str]:
    folder = bench.folder / "scripts"
    folder.mkdir()
    (folder / "rows.csv").write_text("text,labels\n" + "the cat sat,0\nit was good,1\n" * 16)
    options = bench.arguments("x", srlora__target_rank=8)
    return {
        "folder": str(folder),
        "model": str(bench.folder / "model"),
        "decoder": str(bench.folder / "decoder"),
        "csv": str(folder / "rows.csv"),
        "text": str(bench.folder / "text" / "train.txt"),
        "texts": str(bench.folder / "text"),
        "options": "\0".join(option for option in options if not option.startswith("--output_dir")),
    }


def filled(arguments: list[str], places: dict[str, str]) -> list[str]:
    return [part for argument in arguments for part in argument.format(**places).split("\0")]


def python(bench: Bench, *arguments: str, limit: int = 280) -> subprocess.CompletedProcess:
    environment = bench.environment() | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit, check=False
    )


def committed() -> str:
    command = ["git", "status", "--porcelain", "benchmarks", "docs"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def test_every_script_is_run_here_or_by_another_test() -> None:
    found = {
        str(path.relative_to(ROOT))
        for folder in ("benchmarks", "examples", "launch")
        for path in (ROOT / folder).rglob("*.py")
    }
    by_run = {f"benchmarks/{name}.py" for name in BY_RUN}
    assert found == {*IN_ONE_PROCESS, *ALONE, *by_run, *LEARNING, *PARTS, *ELSEWHERE}
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())


def test_scripts_that_need_one_process_run_at_a_tiny_size(bench: Bench, places: dict[str, str]) -> None:
    before = committed()
    orders = bench.folder / "scripts.json"
    orders.write_text(json.dumps({name: filled(arguments, places) for name, arguments in IN_ONE_PROCESS.items()}))
    ended = python(bench, "tests/launch/in_turn.py", str(orders))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads(ended.stdout) == {}
    assert committed() == before, "a tiny size leaves nothing in the results"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", ALONE)
def test_scripts_that_start_processes_run_at_a_tiny_size(script: str, bench: Bench, places: dict[str, str]) -> None:
    before = committed()
    ended = python(bench, script, *filled(ALONE[script], places), limit=850)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert committed() == before


def write_scripts(folder: Path, **scripts: str) -> None:
    (folder / "benchmarks").mkdir(parents=True)
    for name, code in scripts.items():
        (folder / "benchmarks" / f"{name}.py").write_text(code)


def test_a_script_that_fails_is_named_after_the_others_have_run(bench: Bench) -> None:
    """With run.py itself, on scripts that take no time."""
    folder = bench.folder / "broken"
    touch = "from pathlib import Path; Path(__file__).with_suffix('.ran').touch()"
    write_scripts(folder, first="import not_installed_anywhere", second="raise SystemExit(3)", third=touch)
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import run; from pathlib import Path; "
        f"run.SCRIPTS, run.ROOT = ('first', 'second', 'third'), Path({str(folder)!r}); run.write = lambda: []; "
        "sys.argv = ['run.py', *sys.argv[1:]]; run.main()"
    )
    for size in ("--tiny", "--quick"):
        ended = python(bench, "-c", code, size)
        assert ended.returncode == 1, ended.stderr
        assert ended.stderr.splitlines()[-1] == "did not end well: first, second"
        (folder / "benchmarks" / "third.ran").unlink()
        assert "not_installed_anywhere" in (folder / "runs" / "benchmarks" / "first.log").read_text()
    ended = python(bench, "-c", code, "--tiny", "--only", "third")
    assert ended.returncode == 0, ended.stderr


# --- the study of learning


def write_digits(folder: Path) -> Path:
    """130 pictures of 28 x 28, so that there is one batch."""
    write_idx(folder, counts=(130, 6))
    for split, count in (("train", 130), ("t10k", 6)):
        header = bytes((0, 0, 8, 3)) + b"".join(size.to_bytes(4, "big") for size in (count, 28, 28))
        content = np.random.default_rng(0).integers(0, 255, count * 784, dtype=np.uint8).tobytes()
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + content)
    return folder


@pytest.mark.slow
def test_the_models_of_the_study_can_be_made_again(bench: Bench) -> None:
    folder = bench.folder / "prepared"
    write_digits(folder / "mnist")
    given = f"--fashion_mnist={write_digits(bench.folder / 'fashion')}"
    ended = python(bench, "benchmarks/learning/prepare.py", given, f"--output_dir={folder}")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (folder / "vit-mnist" / "model.safetensors").is_file()
    assert (folder / "vit-fashion_mnist" / "preprocessor_config.json").is_file()


STUDY = """
import sys
from pathlib import Path
sys.path.insert(0, "benchmarks/learning")
import studies
here = Path(sys.argv.pop(1))
studies.HERE, studies.RUNS, studies.RESULTS = here, here / "runs", here / "results.jsonl"
studies.RATES, studies.TASKS, studies.MAIN_SEEDS, studies.ABLATION_TASKS = {"mnist": (1e-3,)}, ("mnist",), (0,), ()
studies.METHODS = {name: studies.METHODS[name] for name in ("LoRA", "PiSSA", "SRLoRA")}
name = sys.argv.pop(1)
script = __import__(name)
sys.exit(script.main())
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_study_and_its_report_can_be_made_again(bench: Bench) -> None:
    here = bench.folder / "study"
    (here / "tasks").mkdir(parents=True)
    (here / "figures").mkdir()
    shutil.copy(ROOT / "benchmarks" / "learning" / "conclusions.md", here)
    options = {
        "task": {"name": "mnist", "data_dir": str(write_idx(here / "idx"))},
        "model": {"name_or_path": write_vit(here / "vit")},
        "srlora": {"target_rank": 16, "svd_cache": str(here / "svd")},
        "train": {"max_steps": 20, "batch_size": 4, "eval_batch_size": 3, "log_every": 1},
    }
    (here / "tasks" / "mnist.yaml").write_text(yaml.safe_dump(options))
    ended = python(bench, "-c", STUDY, str(here), "run_studies", "--parts", "rates", "main", limit=700)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert len((here / "results.jsonl").read_text().splitlines()) == 6
    ended = python(bench, "-c", STUDY, str(here), "report")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "| mnist | SRLoRA |" in (here / "RESULTS.md").read_text()
    assert (here / "figures" / "main.png").is_file()
