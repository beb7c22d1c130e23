"""Every file of ds_configs and launch/accelerate is loaded, and trains on the engine that it names, on CPU ranks.

A file for GPUs has to give a process the same environment as its twin for the CPU, but for what hides the GPUs.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.cpp_extension import _get_build_directory

from tests.launch.conftest import ROOT, Bench, write_model
from tests.launch.forked import launch_environment, launch_options
from tests.launch.forks import Forks, lines
from tests.processor import require_deepspeed_type

LAUNCH, DEEPSPEED = ROOT / "launch" / "accelerate", ROOT / "ds_configs"
NVME_PATH = "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH"
NUM_STEPS = 3


@dataclass
class Preset:
    """What a file for the CPU has to give, and which file for GPUs it stands for.

    Args:
        gpu: That file.
        engine: In ``summary.json``.
        evidence: In what evidence.py finds.
        model: Folder of the model in the bench.
        environment: Beside what the file gives.
    """

    gpu: str
    engine: str
    evidence: dict[str, object] = field(default_factory=dict)
    model: str = "model"


CPU_ADAM = {"optimizer_offloaded": True, "innermost": "DeepSpeedCPUAdam"}
PRESETS = {
    "cpu2": Preset("ddp", "ddp"),
    "fsdp2_cpu": Preset("fsdp2", "fsdp2", {"num_sharded_modules": 4, "local_share": 0.5}),
    "zero0_cpu": Preset("zero0", "zero0", {"local_share": 1}),
    "zero1_cpu": Preset("zero1", "zero1", {"optimizer_offloaded": False}),
    "zero2_cpu": Preset("zero2", "zero2", {"optimizer_offloaded": False}),
    "zero2_offload_cpu": Preset("zero2_offload", "zero2", CPU_ADAM),
    "zero3_cpu": Preset("zero3", "zero3", {"weights_offloaded": False, "hpz_ranks": 1}),
    "zero3_offload_cpu": Preset("zero3_offload", "zero3", CPU_ADAM | {"weights_offloaded": True, "num_on_nvme": 0}),
    "zero3_hpz_cpu": Preset("zero3_hpz", "zero3", {"hpz_ranks": 2, "num_secondary": 13}),
    "zero3_nvme_cpu": Preset("zero3_nvme", "zero3", CPU_ADAM | {"num_on_nvme": 2}, "wide"),
}
NODES = {"multi_node_static_cpu": "multi_node_static", "multi_node_c10d_cpu": "multi_node_c10d"}
TWINS = {"cpu1": "single", **{name: preset.gpu for name, preset in PRESETS.items()}, **NODES}
FORMS = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.02}
"""Types of the weights, with the relative difference of a loss from that of plain float32 which they explain."""


def without_async_io() -> bool:
    """Whether DeepSpeed would have to compile for minutes before it can use NVMe."""
    built = Path(_get_build_directory("async_io", verbose=False)) / "async_io.so"
    return not built.exists() and "SRLORA_TEST_NVME" not in os.environ


by_hand = pytest.mark.skipif("SRLORA_TEST_PRESETS" not in os.environ, reason="left out: SRLORA_TEST_PRESETS=all")
EACH_TIME = {"bfloat16": ("zero0_cpu", "zero2_offload_cpu", "zero3_offload_cpu", "fsdp2_cpu")}
EACH_TIME |= {"float32": tuple(PRESETS), "float16": ("zero0_cpu", "zero3_offload_cpu")}
"""What is run each time: every file in float32, and in 16 bits where tests/ranks does not do the same."""


def cells() -> list[object]:
    """Each DeepSpeed file in each type; on the others float16 needs a GPU."""
    slow = pytest.mark.skipif(without_async_io(), reason="compiles async_io from libaio-dev: SRLORA_TEST_NVME=1")
    found = []
    for name, preset in PRESETS.items():
        for dtype in FORMS:
            marks = [slow] if preset.model == "wide" else []
            marks += [by_hand] if name not in EACH_TIME[dtype] else []
            if dtype != "float16" or preset.engine.startswith("zero"):
                found.append(pytest.param(name, dtype, id=f"{name} {dtype}", marks=marks))
    return found


def options(bench: Bench, name: str, **more: object) -> list[str]:
    """The command line of a run of three steps with a switch on the way."""
    chosen = {
        "train__learning_rate": 0.001,
        "train__max_steps": NUM_STEPS,
        "train__eval_every": NUM_STEPS,
        "checkpoint__every": 0,
    }
    return bench.arguments(name, **chosen | more)


def summary_of(bench: Bench, name: str) -> dict[str, object]:
    return json.loads((bench.run_folder(name) / "summary.json").read_text())


def losses(bench: Bench, name: str) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in lines(bench.run_folder(name) / "metrics.jsonl")])


def choices(bench: Bench, name: str) -> list[tuple]:
    """What each switch chose at each site."""
    keys = ("step", "switch", "site", "slots", "directions", "new_directions")
    return [tuple(map(str, map(line.get, keys))) for line in lines(bench.run_folder(name) / "switches.jsonl")]


def plain(bench: Bench, forks: Forks, model: str = "model") -> str:
    """The name of a plain float32 run on that model, which is made once."""
    run = f"plain {model}"
    if not (bench.run_folder(run) / "summary.json").exists():
        arguments = options(bench, run, model__name_or_path=bench.folder / model)
        ended = forks.start(yaml="cpu1", world_size=1, arguments=arguments, limit=200)
        assert ended["statuses"] == {"0": 0}, ended["stderr"]
    return run


@pytest.fixture(scope="module")
def wide(bench: Bench) -> Path:
    """Two of its weights have runs of 1 MiB in 16 bits on two ranks; DeepSpeed puts those and larger ones on NVMe."""
    write_model(bench.folder / "wide", num_layers=1, width=512, inner_width=2048)
    return bench.folder / "wide"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "dtype"), cells())
def test_trains(name: str, dtype: str, bench: Bench, forks: Forks, request: pytest.FixtureRequest) -> None:
    require_deepspeed_type(dtype)
    preset, run = PRESETS[name], f"{name} {dtype}"
    if preset.model == "wide":
        request.getfixturevalue("wide")
    reference = plain(bench, forks, preset.model)
    (bench.folder / "nvme").mkdir(exist_ok=True)
    code = f"import os; os.environ[{NVME_PATH!r}] = {str(bench.folder / 'nvme')!r}\n"
    code += "from tests.launch.evidence import install; install()"
    arguments = options(bench, run, model__dtype=dtype, model__name_or_path=bench.folder / preset.model)
    ended = forks.start(yaml=name, arguments=arguments, code=code, limit=200)
    assert ended["statuses"] == {"0": 0, "1": 0}, ended["stderr"][0][-3000:]
    summary = summary_of(bench, run)
    assert (summary["storage"], summary["world_size"], summary["weights"]) == (preset.engine, 2, dtype)
    assert lines(bench.run_folder(run) / "metrics.jsonl")[-1]["step"] == NUM_STEPS
    evidence = json.loads((bench.run_folder(run) / "evidence.json").read_text())
    assert evidence | preset.evidence == evidence
    assert (evidence["innermost"] == "DeepSpeedCPUAdam") is ("offload" in name or "nvme" in name)
    if dtype == "float32":
        assert choices(bench, run) == choices(bench, reference)
    if summary["skipped_steps"] == 0:  # of fp16 the first steps may overflow
        assert len(choices(bench, run)) == len(choices(bench, reference)) > 13
        torch.testing.assert_close(losses(bench, run), losses(bench, reference), rtol=FORMS[dtype], atol=1e-6)


POISON = """
from srlora_dist.training.trainer import FineTuner
original = FineTuner._micro_step
def poisoned(trainer, batch):
    if trainer.progress.done != 0:
        return original(trainer, batch)
    hook = trainer.trainable[0].register_hook(lambda gradient: gradient * float("nan"))
    result = original(trainer, batch)
    hook.remove()
    return result
FineTuner._micro_step = poisoned
"""


def test_without_zero_a_step_with_nan_is_left_out(bench: Bench, forks: Forks) -> None:
    """In float32 DeepSpeed would take it."""
    ended = forks.start(yaml="zero0_cpu", arguments=options(bench, "poisoned"), code=POISON, limit=200)
    assert ended["statuses"] == {"0": 0, "1": 0}, ended["stderr"][0][-3000:]
    assert summary_of(bench, "poisoned")["skipped_steps"] == 1
    assert losses(bench, "poisoned").isfinite().all()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


STANDARD = ("--num_machines", "2", "--same_network", "--deepspeed_multinode_launcher", "standard")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        pytest.param("multi_node_static_cpu", (), marks=pytest.mark.slow),
        ("multi_node_c10d_cpu", ()),
        pytest.param("zero3_cpu", STANDARD, marks=by_hand),  # as docs/engines.md says
    ],
)
def test_two_nodes_train_together(name: str, flags: tuple[str, ...], bench: Bench, forks: Forks) -> None:
    """Two launchers on this machine, each with a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / f"{name}.yaml")]
    command += [*flags, "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    run = f"nodes {name}"
    logs = [bench.folder / f"{run} {node}.log" for node in range(2)]
    nodes, end = [], time.monotonic() + 240
    try:
        for node in range(2):
            # c10d needs no number. But Accelerate refuses, on node 0 alone, a port that is taken, and here node 1 can
            # take it: it comes when node 0 has it.
            while node == 1 and not answers(port) and nodes[0].poll() is None and time.monotonic() < end:
                time.sleep(0.1)
            line = [*command, "--machine_rank", str(node), "launch/train.py", *options(bench, run)]
            with logs[node].open("w") as log:
                nodes.append(subprocess.Popen(line, cwd=ROOT, env=bench.environment(), stdout=log, stderr=log))
        # When one has failed the other one waits for it in vain.
        while None in (statuses := [node.poll() for node in nodes]) and not any(statuses) and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        for node in nodes:
            node.kill()
    assert statuses == [0, 0], [log.read_text()[-3000:] for log in logs]
    summary = summary_of(bench, run)
    assert (summary["storage"], summary["world_size"]) == ("zero3" if "zero3" in name else "ddp", 2)
    assert choices(bench, run) == choices(bench, plain(bench, forks))
    torch.testing.assert_close(losses(bench, run), losses(bench, plain(bench, forks)), rtol=1e-5, atol=1e-6)


def test_every_file_is_tested() -> None:
    assert {path.stem for path in LAUNCH.iterdir()} == {*TWINS, *TWINS.values()}
    for path in LAUNCH.iterdir():
        assert path.read_text().startswith(f"# accelerate launch --config_file launch/accelerate/{path.name} ")
    used = {
        yaml.safe_load(path.read_text()).get("deepspeed_config", {}).get("deepspeed_config_file")
        for path in LAUNCH.iterdir()
    }
    assert used - {None} == {f"ds_configs/{path.name}" for path in DEEPSPEED.iterdir()}


@pytest.mark.parametrize("name", TWINS)
def test_a_file_for_gpus_differs_from_its_twin_in_what_hides_gpus(name: str) -> None:
    many = ("--machine_rank", "1", "--main_process_ip", "127.0.0.1") if name in NODES else ()
    ours, theirs = (launch_environment(file, *many) for file in (name, TWINS[name]))
    differ = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
    # Accelerate's own way without a GPU works for one process alone; it also sets how OpenMP threads wait.
    ours_alone = {"ACCELERATE_USE_CPU", "KMP_AFFINITY", "KMP_BLOCKTIME"} if name == "cpu1" else {"CUDA_VISIBLE_DEVICES"}
    assert differ == ours_alone
    documents = [yaml.safe_load((LAUNCH / f"{file}.yaml").read_text()) for file in (name, TWINS[name])]
    for document in documents:
        for key in ("gpu_ids", "use_cpu", *(("num_processes",) if name in NODES else ())):
            document.pop(key, None)
    assert documents[0] == documents[1]


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.stem)
def test_accelerate_takes_each_line_of_a_file(path: Path) -> None:
    """It leaves out, without a word, what has a default on its command line."""
    got, document = vars(launch_options(path.stem)), yaml.safe_load(path.read_text())
    kind = document.pop("distributed_type")
    used = {"DEEPSPEED": "use_deepspeed", "FSDP": "use_fsdp", "MULTI_GPU": "multi_gpu"}
    assert [name for name in used.values() if got[name]] == ([used[kind]] if kind != "NO" else [])
    assert document.pop("compute_environment") == "LOCAL_MACHINE"
    for value in [value for value in document.values() if isinstance(value, dict)]:
        document |= value
    for key, value in document.items():
        assert isinstance(value, dict) or got[key] == value, key


def test_nodes_that_find_each_other_need_no_numbers() -> None:
    for name in NODES:
        assert launch_options(name).rdzv_backend == ("c10d" if "c10d" in name else "static")
    assert launch_options("multi_node_c10d", "--rdzv_backend", "static").rdzv_backend == "static", "as SLURM's node.sh"


@pytest.mark.parametrize("path", sorted(DEEPSPEED.iterdir()), ids=lambda path: path.stem)
def test_a_deepspeed_file_leaves_to_the_run_what_the_run_decides(path: Path) -> None:
    settings = json.loads(path.read_text())
    for section in ("bf16", "fp16"):
        assert settings.pop(section) == {"enabled": "auto"}
    zero = settings.pop("zero_optimization")
    assert {*settings.values()} == {"auto"}
    assert {*settings} == {
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    }
    assert path.stem.startswith(f"zero{zero['stage']}")
