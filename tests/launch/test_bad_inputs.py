"""A run that cannot work ends at once with one line that names the value, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.conftest import ROOT, Bench, Case, Ended, write_rte

LIMIT_SECONDS = 60

# What accelerate launch --cpu --num_processes 2 and a DeepSpeed launch from another folder leave in the environment.
LONELY = {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}
NO_FILE = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "no/such.json"}
BF16_FILE = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "{bf16}"}

# Options, or in capitals variables of the environment, and what the message must name.
CASES = {
    "unknown task": ({"task__name": "nope"}, "task.name is 'nope'"),
    "missing folder": ({"task__data_dir": "/no/such/folder"}, "task.data_dir is '/no/such/folder'"),
    "wrong columns": ({"task__data_dir": "{columns}"}, "needs the columns sentence1, sentence2, label"),
    "label outside the classes": ({"task__data_dir": "{labels}"}, "the label is 'perhaps'"),
    "misspelt key": ({"train__batchsize": 8}, "train.batchsize"),
    "unwritable output folder": ({"output_dir": "{file}/below"}, "cannot be written"),
    "engine that was not launched": ({"engine": "zero2"}, "asked for is zero2, but the launch asks for plain"),
    "target below the rank": ({"srlora__target_rank": 2}, "srlora.target_rank 2 is below the LoRA rank"),
    "no pair to fuse": ({"srlora__fusion_ratio": 0}, "srlora.fusion_ratio is 0"),
    "LoRA dropout": ({"lora__dropout": 0.1}, "LoRA dropout"),
    "no matching layers": ({"lora__target_modules": "foo,bar"}, "lora.target_modules is 'foo,bar'"),
    "unknown type": ({"model__dtype": "float31"}, "model.dtype"),
    "fp16 without a GPU": ({"model__dtype": "float16"}, "model.dtype float16 needs a GPU on engine plain"),
    "unknown quantisation": ({"model__quantization": "nf5"}, "model.quantization"),
    "8 bits twice": ({"model__quantization": "int8", "model__double_quantization": True}, "model.quantization is int8"),
    "GGUF file of no folder": (
        {"model__name_or_path": "null", "model__gguf_file": "x.gguf"},
        "model.gguf_file is 'x.gguf' without a folder",
    ),
    "missing text": ({"task__name": "lm", "task__data_dir": "{columns}"}, "columns/train.txt"),
    "batch above the data": ({"train__batch_size": 64}, "fewer than train.batch_size 64"),
    "accumulation does not divide": ({"train__batch_size": 9}, "train.batch_size 9 is not a multiple"),
    "processes that Accelerate does not start": (LONELY, "launch/accelerate/cpu2.yaml"),
    "Megatron": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
    "two precisions": ({"ACCELERATE_MIXED_PRECISION": "fp16", "model__dtype": "bfloat16"}, "mixed_precision fp16, but"),
    "fp8": ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision fp8, which is not supported"),
    "DeepSpeed in another precision": (BF16_FILE, "bf16.enabled true, but model.dtype is float32"),
    "FSDP1": ({"ACCELERATE_USE_FSDP": "true"}, "set fsdp_version: 2"),
    "DeepSpeed file that is not there": (NO_FILE, "no/such.json cannot be read"),
    "more switches than steps": ({"srlora__fusion_ratio": 0.1, "train__max_steps": 2}, "switches in 2 steps"),
}


@pytest.fixture(scope="module")
def ended(bench: Bench) -> dict[str, Ended]:
    places = {"columns": bench.folder / "columns", "labels": bench.folder / "labels", "file": bench.folder / "file"}
    places["bf16"] = bench.folder / "bf16.json"
    write_rte(places["columns"], header="index\tpremise\thypothesis\tlabel")
    write_rte(places["labels"], odd_label="perhaps")
    places["file"].write_text("not a folder")
    places["bf16"].write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}')
    cases = {}
    for name, (options, _) in CASES.items():
        filled = {key: value.format(**places) if isinstance(value, str) else value for key, value in options.items()}
        environment = {key: filled.pop(key) for key in options if key.isupper()}
        cases[name] = Case(bench.arguments(f"bad {name}", **filled), environment)
    return bench.run_all(cases)


@pytest.mark.parametrize("name", CASES)
def test_one_line_names_what_is_wrong(name: str, ended: dict[str, Ended]) -> None:
    run = ended[name]
    assert run.returncode != 0
    assert run.seconds < LIMIT_SECONDS
    assert len(run.errors) == 1, run.stderr
    assert run.errors[0].startswith("srlora_dist: error: ")
    assert CASES[name][1] in run.errors[0]
    assert "Traceback" not in run.stderr


def assert_refused(run: Ended, *wanted: str) -> None:
    """One line of ours; the launcher adds that its child failed, but our script shows no traceback."""
    assert run.returncode != 0
    assert run.seconds < LIMIT_SECONDS
    assert len(run.errors) == 1, run.stderr
    for text in wanted:
        assert text in run.errors[0]
    assert 'launch/train.py", line' not in run.stderr


def test_fsdp_without_a_gpu_is_refused(bench: Bench) -> None:
    assert_refused(bench.launch_yaml("fsdp2", *bench.arguments("fsdp")), "FSDP2 without a GPU", "cpu2.yaml")


def test_two_ranks_that_fail_alike_print_once(bench: Bench) -> None:
    arguments = bench.arguments("odd", train__batch_size=9, train__accumulation_steps=1)
    assert_refused(bench.launch_yaml("cpu2", *arguments), "train.batch_size 9", "2 processes", "multiple of 2")


def test_deepspeed_that_accelerate_would_drop_is_refused(bench: Bench, tmp_path: Path) -> None:
    script = script_with(tmp_path, 'os.environ["ACCELERATE_USE_CPU"] = "true"')
    run = bench.launch_yaml("zero2_cpu", *bench.arguments("dropped"), script=script)
    assert_refused(run, "asked for is zero2, but Accelerate set up ddp")


def test_a_rank_that_fails_alone_speaks_for_itself(bench: Bench, tmp_path: Path) -> None:
    labels = write_rte(tmp_path / "labels", odd_label="perhaps")
    line = f'if os.environ["RANK"] == "1": sys.argv += ["--task.data_dir", {str(labels)!r}]'
    run = bench.launch_yaml("cpu2", *bench.arguments("alone"), script=script_with(tmp_path, line))
    assert_refused(run, "the label is 'perhaps'", "on rank 1 of 2")


def script_with(folder: Path, line: str) -> Path:
    """launch/train.py with one line before it."""
    script = folder / "start.py"
    train = str(ROOT / "launch" / "train.py")
    script.write_text(f"import os, runpy, sys\n{line}\nrunpy.run_path({train!r}, run_name='__main__')\n")
    return script
