"""A run that cannot work ends at once with one line that names the value, on any number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from srlora_dist.config.parse import parse
from tests.launch.bad_files import write_bad_files
from tests.launch.conftest import ROOT, Bench, Case, Ended, write_rte

LIMIT_SECONDS, LAUNCH_LIMIT_SECONDS = 30, 180
"""Far above what it takes, for machines are slow or busy; what hangs would take longer."""


def deepspeed(file: str, **more: str) -> dict[str, str]:
    """What a launch with a DeepSpeed file leaves in the environment."""
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": file, **more}


# What accelerate launch --cpu --num_processes 2 leaves in the environment.
LONELY = {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}
# What the command deepspeed leaves there.
DEEPSPEED = {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
DEEPSPEED |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
HSDP = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
HSDP |= {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_TP_SIZE": "2"}
OWN_CACHE = {"srlora__svd_cache": "null", "SRLORA_CACHE": "{file}"}
LM = {"task__name": "lm", "model__name_or_path": "{other_model}"}
STSB = {"task__name": "stsb"}
NF4_IN_PLACE = {"model__quantization": "nf4", "srlora__fusion": "in_place", "model__name_or_path": "{other_model}"}


# Options, or in capitals variables of the environment, and what the message must name.
CASES = {
    # the command line and its file
    "misspelt key": ({"train__batchsize": 8}, "train.batchsize"),
    "misspelt key in the file": ({"config": "{key.yaml}"}, "batchsize"),
    "misspelt section in the file": ({"config": "{section.yaml}"}, "trainer"),
    "missing file": ({"config": "no/such.yaml"}, "no/such.yaml"),
    "folder for a file": ({"config": "{folder}"}, "bad/folder cannot be read"),
    "binary file": ({"config": "{binary}"}, "bad/binary cannot be read"),
    "broken YAML": ({"config": "{broken.yaml}"}, "broken.yaml"),
    "YAML list": ({"config": "{list.yaml}"}, "list.yaml does not map options"),
    "YAML text": ({"config": "{text.yaml}"}, "text.yaml does not map options"),
    "YAML key twice": ({"config": "{twice.yaml}"}, "line 4: seed is given twice"),
    "YAML section without options": ({"config": "{null.yaml}"}, "line 1: train has no options"),
    "text for a number": ({"train__batch_size": "many"}, "train.batch_size"),
    "fraction for a count": ({"train__batch_size": 8.5}, "train.batch_size"),
    "yes for a count": ({"train__batch_size": "true"}, "train.batch_size"),
    "unknown method": ({"method": "srlore"}, "srlore"),
    "unknown engine": ({"engine": "zero4"}, "zero4"),
    "unknown reset": ({"srlora__optimizer_reset": "all"}, "srlora.optimizer_reset"),
    "negative seed": ({"seed": -1}, "seed is -1"),
    "seed too large": ({"seed": 2**32}, "seed is 4294967296"),
    "no output folder": ({"output_dir": ""}, "output_dir is ''"),
    "unwritable output folder": ({"output_dir": "{file}/below"}, "cannot be written"),
    # numbers
    "rate of 0": ({"train__learning_rate": 0}, "train.learning_rate is 0"),
    "negative rate": ({"train__learning_rate": -0.001}, "train.learning_rate is -0.001"),
    "rate nan": ({"train__learning_rate": ".nan"}, "train.learning_rate is nan: choose a positive number"),
    "rate inf": ({"train__learning_rate": ".inf"}, "train.learning_rate is inf"),
    "rate without end": ({"train__learning_rate": 1e30}, "train.learning_rate is 1e+30"),
    "negative decay": ({"train__weight_decay": -0.1}, "train.weight_decay is -0.1"),
    "decay nan": ({"train__weight_decay": ".nan"}, "train.weight_decay is nan"),
    "warmup above the run": ({"train__warmup_ratio": 1.5}, "train.warmup_ratio is 1.5"),
    "warmup nan": ({"train__warmup_ratio": ".nan"}, "train.warmup_ratio is nan"),
    "negative clipping": ({"train__max_grad_norm": -1}, "train.max_grad_norm is -1"),
    "clipping nan": ({"train__max_grad_norm": ".nan"}, "train.max_grad_norm is nan"),
    "epochs nan": ({"train__epochs": ".nan", "train__max_steps": "null"}, "train.epochs is nan"),
    "epochs inf": ({"train__epochs": ".inf", "train__max_steps": "null"}, "train.epochs is inf"),
    "epochs without end": ({"train__epochs": 1e300, "train__max_steps": "null"}, "train.epochs is 1e+300"),
    "steps without end": ({"train__max_steps": 10**20}, f"train.max_steps is {10**20}"),
    "no steps": ({"train__max_steps": 0}, "train.max_steps is 0"),
    "no batch": ({"train__batch_size": 0}, "train.batch_size is 0"),
    "no evaluation batch": ({"train__eval_batch_size": 0}, "train.eval_batch_size is 0"),
    "evaluation batch without end": ({"train__eval_batch_size": 10**30}, f"train.eval_batch_size is {10**30}"),
    "batch above the data": ({"train__batch_size": 64}, "fewer than train.batch_size 64"),
    "accumulation does not divide": ({"train__batch_size": 9}, "train.batch_size 9 is not a multiple"),
    "scale nan": ({"lora__alpha": ".nan"}, "lora.alpha is nan"),
    "scale inf": ({"lora__alpha": ".inf"}, "lora.alpha is inf"),
    "scale beyond float32": ({"lora__alpha": 1e300}, "lora.alpha is 1e+300"),
    "negative scale": ({"lora__alpha": -8}, "lora.alpha is -8"),
    "rank above every matrix": ({"lora__rank": 10**9, "srlora__target_rank": 10**9}, f"lora.rank is {10**9}"),
    "LoRA dropout": ({"lora__dropout": 0.1}, "LoRA dropout"),
    "LoRA dropout nan": ({"method": "lora", "lora__dropout": ".nan"}, "lora.dropout is nan"),
    "model dropout above 1": ({"model__dropout": 1.5}, "model.dropout is 1.5"),
    "no matching layers": ({"lora__target_modules": "foo,bar"}, "lora.target_modules is 'foo,bar'"),
    "one name misspelt": ({"lora__target_modules": "query,valve"}, "the model has no module 'valve'"),
    "no layers": ({"lora__target_modules": ""}, "lora.target_modules is ''"),
    "target below the rank": ({"srlora__target_rank": 2}, "srlora.target_rank 2 is below the LoRA rank"),
    "no pair to fuse": ({"srlora__fusion_ratio": 0}, "srlora.fusion_ratio is 0"),
    "share nan": ({"srlora__fusion_ratio": ".nan"}, "srlora.fusion_ratio is nan"),
    "average that never forgets": ({"srlora__beta1": 1}, "srlora.beta1 is 1"),
    "average nan": ({"srlora__beta2": ".nan"}, "srlora.beta2 is nan"),
    "second adapter too small": (
        {"srlora__fusion": "adapter", "srlora__fused_rank": 2},
        "srlora.fused_rank 2 is below",
    ),
    "in place in 4 bits": (NF4_IN_PLACE, "srlora.fusion is in_place, but"),
    "more switches than steps": ({"srlora__fusion_ratio": 0.1, "train__max_steps": 2}, "switches in 2 steps"),
    "AdaLoRA with another scale": ({"method": "adalora", "lora__use_rslora": True}, "lora.use_rslora has no meaning"),
    "AdaLoRA without a pair to prune": ({"method": "adalora", "lora__rank": 1}, "lora.rank is 1, but method adalora"),
    "AdaLoRA without steps": ({"method": "adalora", "train__max_steps": 2}, "this one has 2 steps"),
    "AdaLoRA on norms": ({"method": "adalora", "lora__target_modules": "LayerNorm"}, "lora.target_modules is 'LayerN"),
    "adapter without a name": ({"srlora__adapter_name": ""}, "srlora.adapter_name is ''"),
    "adapter with a dot": ({"srlora__adapter_name": "a.b"}, "srlora.adapter_name is 'a.b'"),
    "adapter named as ours": ({"srlora__adapter_name": "srlora_fused"}, "srlora.adapter_name is 'srlora_fused'"),
    # data
    "unknown task": ({"task__name": "nope"}, "task.name is 'nope'"),
    "missing folder": ({"task__data_dir": "/no/such/folder"}, "task.data_dir is '/no/such/folder'"),
    "empty name of a folder": ({"task__data_dir": ""}, "task.data_dir is ''"),
    "wrong columns": ({"task__data_dir": "{columns}"}, "needs the columns sentence1, sentence2, label"),
    "label outside the classes": ({"task__data_dir": "{labels}"}, "the label is 'perhaps'"),
    "empty table": ({"task__data_dir": "{no_bytes}"}, "train.tsv is empty"),
    "header alone": ({"task__data_dir": "{header_only}"}, "train.tsv has a header and no rows"),
    "no rows to evaluate": ({"task__data_dir": "{no_dev}"}, "dev.tsv has a header and no rows"),
    "one column too few": ({"task__data_dir": "{short_row}"}, "train.tsv, line 11: 4 columns wanted"),
    "table with NUL": ({"task__data_dir": "{nul}"}, "train.tsv has a NUL byte in line 3"),
    "table in Latin-1": ({"task__data_dir": "{latin}"}, "train.tsv is not UTF-8 at byte"),
    "score in words": (STSB | {"task__data_dir": "{words}"}, "the score is 'much', which is not a number"),
    "score nan": (STSB | {"task__data_dir": "{nan_score}"}, "the score is nan"),
    "missing text": (LM | {"task__data_dir": "{columns}"}, "columns/train.txt"),
    "empty text": (LM | {"task__data_dir": "{no_text}"}, "no document of two tokens"),
    "blank text": (LM | {"task__data_dir": "{blank_text}"}, "no document of two tokens"),
    "text in Latin-1": (LM | {"task__data_dir": "{latin_text}"}, "train.txt is not UTF-8 at byte 3"),
    "text with NUL": (LM | {"task__data_dir": "{nul_text}"}, "train.txt has a NUL byte in line 1"),
    "no samples": ({"task__max_train_samples": 0}, "task.max_train_samples is 0"),
    "no tokens": ({"task__max_length": 0}, "task.max_length is 0"),
    "one token": ({"task__max_length": 1}, "task.max_length is 1"),
    "beyond the positions": ({"task__max_length": 33}, "task.max_length is 33"),
    # the model
    "missing model": (
        {"model__name_or_path": "/no/such/model"},
        "model.name_or_path is '/no/such/model', which is no folder",
    ),
    "file for a model": ({"model__name_or_path": "{file}"}, "bad/file', which is no folder"),
    "empty name of a model": ({"model__name_or_path": ""}, "model.name_or_path is ''"),
    "model without its configuration": ({"model__name_or_path": "{no_config}"}, "whose config.json cannot be read"),
    "broken configuration": ({"model__name_or_path": "{broken_config}"}, "whose config.json cannot be read"),
    "configuration as a list": ({"model__name_or_path": "{list_config}"}, "whose config.json is not a JSON object"),
    "unknown architecture": ({"model__name_or_path": "{unknown_kind}"}, "model type `nopeformer`"),
    "heads that do not divide": ({"model__name_or_path": "{odd_sizes}"}, "bad/odd_sizes', whose"),
    "text for a size": ({"model__name_or_path": "{text_sizes}"}, "expected int, got str (value: 'large')"),
    "code of the model": ({"model__name_or_path": "{own_code}"}, "set model.trust_remote_code to true"),
    "no weights": ({"model__name_or_path": "{no_weights}"}, "has no weights in safetensors files"),
    "truncated weights": ({"model__name_or_path": "{truncated}"}, "whose model.safetensors is broken"),
    "pickled weights": ({"model__name_or_path": "{pickled}"}, "pickles, such as pytorch_model.bin, are not opened"),
    "pickle by another name": ({"model__name_or_path": "{pickle_named_safetensors}"}, "or no safetensors file"),
    "weights nan": ({"model__name_or_path": "{nan_weights}"}, "query: the weight holds NaN"),
    "no tokenizer": ({"model__name_or_path": "{no_tokenizer}"}, "whose tokenizer has no words"),
    "broken tokenizer": ({"model__name_or_path": "{broken_tokenizer}"}, "whose tokenizer cannot be read"),
    "truncated tokenizer": ({"model__name_or_path": "{cut_tokenizer}"}, "whose tokenizer cannot be read"),
    "tokenizer of another model": ({"model__name_or_path": "{long_tokenizer}"}, "gives token 1"),
    "no padding token": ({"model__name_or_path": "{no_padding}"}, "neither a padding nor an end token"),
    "encoder for the next token": ({"task__name": "lm", "task__data_dir": "{text}"}, "not a decoder"),
    "GGUF file of no folder": (
        {"model__name_or_path": "null", "model__gguf_file": "x.gguf"},
        "model.gguf_file is 'x.gguf' without a folder",
    ),
    "missing GGUF file": ({"model__gguf_file": "x.gguf"}, "x.gguf"),
    "garbage for GGUF": (
        {"model__name_or_path": "{garbage_gguf}", "model__gguf_file": "x.gguf"},
        "bad/garbage_gguf/x.gguf does not begin as one",
    ),
    "unknown type": ({"model__dtype": "float31"}, "model.dtype"),
    "fp16 without a GPU": ({"model__dtype": "float16"}, "model.dtype float16 needs a GPU on engine plain"),
    "unknown quantisation": ({"model__quantization": "nf5"}, "model.quantization"),
    "8 bits twice": ({"model__quantization": "int8", "model__double_quantization": True}, "model.quantization is int8"),
    # folders of SRLoRA
    "directions from nowhere": (
        {"srlora__directions_from": "/no/such"},
        "srlora.directions_from /no/such has no safetensors",
    ),
    "directions from an empty folder": ({"srlora__directions_from": "{folder}"}, "bad/folder has no safetensors"),
    "directions from another model": (
        {"srlora__directions_from": "{other_model}"},
        "srlora.directions_from has no weight bert",
    ),
    "directions from truncated weights": (
        {"srlora__directions_from": "{truncated}"},
        "truncated/model.safetensors, which cannot be read",
    ),
    "cache of directions in a file": ({"srlora__svd_cache": "{file}"}, "bad/file cannot be written"),
    "cache in a file": (OWN_CACHE, "set SRLORA_CACHE to a writable folder"),
    "ledger in a file": ({"srlora__ledger_dir": "{file}"}, "bad/file cannot be written"),
    "ledger of another run": ({"srlora__ledger_dir": "{ledger}"}, "holds the ledger of another run"),
    # the launch
    "engine that was not launched": ({"engine": "zero2"}, "asked for is zero2, but the launch asks for plain"),
    "processes that Accelerate does not start": (LONELY, "starts one alone on each node: use --config_file launch/acc"),
    "single.yaml for several": (LONELY | {"ACCELERATE_USE_CPU": "False"}, "or cpu2.yaml on the CPU"),
    "srun without a launcher": ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS is 8 in the environment"),
    "Kubeflow without torchrun": ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}, "PET_NNODES is 2 in the environment"),
    "a pod of an indexed Job": ({"JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETION_INDEX is 1 in the environment"),
    "bare PMIx": ({"PMIX_RANK": "1"}, "PMIX_RANK is 1 in the environment"),
    "ZeRO under PMI": (deepspeed("none") | {"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE is 2 in the environment"),
    "the command deepspeed": (DEEPSPEED, "command deepspeed has started these processes, but without a word to Acc"),
    "HSDP": (HSDP, "the launch asks for HSDP (copies of an FSDP2 model"),
    "tensor parallelism": (HSDP | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "1"}, "launch asks for tensor parallelism,"),
    "Megatron": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
    "number of processes in words": ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    "no processes": ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
    "port in words": ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    "rank in words": ({"WORLD_SIZE": "1", "RANK": "first"}, "RANK is 'first'"),
    "rank of another launch": ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2'"),
    "processes without an address": ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR, MASTER_PORT not set"),
    "accumulation of the launch": ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "train.accumulation_steps is 2"),
    "two precisions": ({"ACCELERATE_MIXED_PRECISION": "fp16", "model__dtype": "bfloat16"}, "mixed_precision fp16, but"),
    "fp8": ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision fp8, which is not supported"),
    "unknown precision": ({"ACCELERATE_MIXED_PRECISION": "half"}, "mixed_precision half, which is not supported"),
    "FSDP1": ({"ACCELERATE_USE_FSDP": "true"}, "set fsdp_version: 2"),
    "unknown FSDP": ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "new"}, "set fsdp_version: 2"),
    "missing DeepSpeed file": (deepspeed("no/such.json"), "no/such.json cannot be read"),
    "folder for a DeepSpeed file": (deepspeed("{folder}"), "bad/folder cannot be read"),
    "binary DeepSpeed file": (deepspeed("{binary}"), "bad/binary cannot be read"),
    "broken DeepSpeed file": (deepspeed("{broken.json}"), "broken.json cannot be read"),
    "DeepSpeed list": (deepspeed("{list.json}"), "list.json is not a JSON object"),
    "a stage that there is not": (deepspeed("{stage4.json}"), "ZeRO stage 4 is not supported"),
    "no stage": (deepspeed("{no_stage.json}"), "ZeRO stage None is not supported"),
    "NVMe without a folder": (deepspeed("{nvme.json}"), "names no folder: set ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME"),
    "NVMe nowhere": (
        {**deepspeed("{nvme.json}"), "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "/no/such"},
        "/no/such is no folder that can be written",
    ),
    "stage in words": (deepspeed("{stage.json}"), "ZeRO stage two is not supported"),
    "stage out of place": (deepspeed("{flat.json}"), "has zero_optimization 2, where"),
    "stage of the launch in words": (deepspeed("none", ACCELERATE_DEEPSPEED_ZERO_STAGE="x"), "ZeRO stage x"),
    "AdaLoRA on ZeRO": (deepspeed("none") | {"method": "adalora"}, "method adalora needs whole gradients"),
    "DeepSpeed in another precision": (deepspeed("{bf16.json}"), "bf16.enabled true, but model.dtype is float32"),
    "precision out of place": (deepspeed("{precision.json}"), "has bf16 true, where"),
    "DeepSpeed with another batch": (deepspeed("{batch.json}"), "train_batch_size 64, but train.batch_size is 8"),
    "DeepSpeed with another clipping": (deepspeed("{clip.json}"), "gradient_clipping 5.0, but train.max_grad_norm"),
}


@pytest.fixture(scope="module")
def ended(bench: Bench) -> dict[str, Ended]:
    places = {f"{{{name}}}": str(path) for name, path in write_bad_files(bench).items()}
    places["{text}"] = str(bench.folder / "text")
    cases = {}
    for name, (options, _) in CASES.items():
        filled = {key: _fill(value, places) for key, value in options.items()}
        environment = {key: filled.pop(key) for key in options if key.isupper()}
        cases[name] = Case(bench.arguments(f"bad {name}", **filled), environment)
    return bench.run_all(cases)


def _fill(value: object, places: dict[str, str]) -> object:
    """A value of the table with the path of the place in braces, which may go on below it."""
    for place, path in places.items():
        value = value.replace(place, path) if isinstance(value, str) else value
    return value


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
    assert run.seconds < LAUNCH_LIMIT_SECONDS
    assert len(run.errors) == 1, run.stderr
    for text in wanted:
        assert text in run.errors[0]
    assert 'commands/train.py", line' not in run.stderr


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


def test_weights_that_one_rank_cannot_read_stop_zero3(bench: Bench, tmp_path: Path) -> None:
    """There the ranks load together, and rank 0 would report that its neighbour has left."""
    shutil.copytree(bench.folder / "model", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-999])
    line = f'if os.environ["RANK"] == "1": sys.argv += ["--model.name_or_path", {str(tmp_path / "cut")!r}]'
    run = bench.launch_yaml("zero3_cpu", *bench.arguments("cut"), script=script_with(tmp_path, line))
    assert_refused(run, "whose model.safetensors is broken", "on rank 1 of 2")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--method=lora", "--srlora.beta1=0.5", "--srlora.ledger_dir=x"], "srlora.beta1, srlora.ledger_dir"),
        (["--method=pissa", "--srlora.target_rank=8", "--srlora.svd_cache=x"], "method pissa: srlora.target_rank$"),
        (["--train.max_steps=5", "--train.epochs=3"], "train.epochs .train.max_steps is 5."),
    ],
)
def test_options_without_effect_are_named(arguments: list[str], names: str) -> None:
    with pytest.warns(UserWarning, match=names):
        parse(arguments)


def script_with(folder: Path, line: str) -> Path:
    """launch/train.py with one line before it."""
    script = folder / "start.py"
    train = str(ROOT / "launch" / "train.py")
    script.write_text(f"import os, runpy, sys\n{line}\nrunpy.run_path({train!r}, run_name='__main__')\n")
    return script
