"""Runs in 16, 8 and 4 bits, and on plain text: stored as asked for, evaluated without harm, judged by the same loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.launch.conftest import Bench, Case, Ended
from tests.launch.forks import Forks
from tests.launch.test_engines import losses
from tests.processor import require_deepspeed_type


def decoder(bench: Bench, name: str, **options: object) -> list[str]:
    """A short run on plain text."""
    chosen = {"task__name": "lm", "task__data_dir": bench.folder / "text", "train__accumulation_steps": 1}
    chosen |= {"model__name_or_path": bench.folder / "decoder", "train__eval_batch_size": 4, "train__max_grad_norm": 0}
    return bench.arguments(name, **chosen | options)


FORMATS = {
    "fp32": {},
    "bf16": {"model__dtype": "bfloat16"},
    "nf4": {"model__dtype": "bfloat16", "model__quantization": "nf4"},
    "fp4": {"model__quantization": "fp4", "model__double_quantization": True},
    "int8": {"model__dtype": "bfloat16", "model__quantization": "int8"},
}


@pytest.fixture(scope="module")
def ended(bench: Bench) -> dict[str, Ended]:
    """Each format in one process, evaluated after each step and again at the end alone."""
    cases = {}
    for name, options in FORMATS.items():
        for when, every in (("often", 1), ("once", 6)):
            run = f"{name} {when}"
            cases[run] = Case(decoder(bench, run, train__eval_every=every, **options))
    return bench.run_all(cases)


@pytest.mark.parametrize("name", FORMATS)
def test_evaluations_do_not_change_training(name: str, bench: Bench, ended: dict[str, Ended]) -> None:
    """In 4 bits on a CPU an evaluation in evaluation mode would repack the weights, and training goes wrong."""
    for when in ("often", "once"):
        assert ended[f"{name} {when}"].returncode == 0, ended[f"{name} {when}"].stderr[-3000:]
    often, once = (losses(bench.run_folder(f"{name} {when}"), "train") for when in ("often", "once"))
    assert torch.equal(often, once)
    assert often[-1] < often[0]
    assert losses(bench.run_folder(f"{name} often"), "eval")[-1] == losses(bench.run_folder(f"{name} once"), "eval")[-1]


@pytest.mark.parametrize("name", FORMATS)
def test_formats_learn_alike(name: str, bench: Bench, ended: dict[str, Ended]) -> None:
    reference = losses(bench.run_folder("fp32 once"), "train")[0]
    first = losses(bench.run_folder(f"{name} once"), "train")[0]
    assert first == pytest.approx(float(reference), rel=0.05)
    assert bool(first == reference) is (name == "fp32"), "it was not stored in another format"


# Engine file, options, and the relative difference from the plain loss that its rounding explains.
ENGINES = {
    "ddp nf4": ("cpu2", FORMATS["nf4"], 0.02),
    "ddp fp32": ("cpu2", {}, 1e-5),
    "zero2 fp16": ("zero2_cpu", {"model__dtype": "float16"}, 0.02),
    "zero3 bf16": ("zero3_cpu", FORMATS["bf16"], 0.02),
    "zero3 nf4": ("zero3_cpu", FORMATS["nf4"], 0.05),
}


@pytest.mark.parametrize("name", ENGINES)
def test_two_ranks_judge_by_the_mean_over_all_tokens(name: str, bench: Bench, forks: Forks) -> None:
    yaml, options, tolerance = ENGINES[name]
    require_deepspeed_type(options.get("model__dtype", "float32"))
    run = forks.start(yaml=yaml, arguments=decoder(bench, name, **options))
    assert run["statuses"] == {"0": 0, "1": 0}, run["stderr"][0][-3000:]
    folder = bench.run_folder(name)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["storage"], summary["world_size"]) == (name.split()[0], 2)
    final = summary["final"]
    assert final["perplexity"] == pytest.approx(math.exp(final["loss"]))
    if "nf4" not in name:
        assert token_mean(bench, folder / "adapter_last") == pytest.approx(final["loss"], rel=tolerance)


def test_one_process_judges_by_the_mean_over_all_tokens(bench: Bench, ended: dict[str, Ended]) -> None:
    folder = bench.run_folder("fp32 once")
    assert ended["fp32 once"].returncode == 0
    final = json.loads((folder / "summary.json").read_text())["final"]["loss"]
    assert token_mean(bench, folder / "adapter_last") == pytest.approx(final, rel=1e-5)


@torch.no_grad()
def token_mean(bench: Bench, adapter: Path) -> float:
    """Validation loss of an exported adapter on the untouched base, one document at a time and without padding."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bench.folder / "decoder")
    base = AutoModelForCausalLM.from_pretrained(bench.folder / "decoder")
    model = PeftModel.from_pretrained(base, adapter).eval()
    total, count = 0.0, 0
    for document in (bench.folder / "text" / "validation.txt").read_text().splitlines():
        tokens = tokenizer(document, return_tensors="pt")["input_ids"]
        logits = model(input_ids=tokens).logits[0, :-1]
        total += nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
        count += tokens.shape[1] - 1
    return total / count


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_new_head_trains_with_16_bit_weights_under_zero3(dtype: str, bench: Bench, forks: Forks) -> None:
    """DeepSpeed wants all that is trained in one type, and PEFT holds the pairs in another than the head."""
    require_deepspeed_type(dtype)
    options = bench.arguments(dtype, model__dtype=dtype, train__max_steps=4, srlora__target_rank=8)
    run = forks.start(yaml="zero3_cpu", arguments=options)
    assert run["statuses"] == {"0": 0, "1": 0}, run["stderr"][0][-3000:]
    summary = json.loads((bench.run_folder(dtype) / "summary.json").read_text())
    assert (summary["storage"], summary["weights"]) == ("zero3", dtype)
    assert summary["extra_memory_bytes"]["residual"] > 0
    assert f"weights in **{dtype}**" in (bench.run_folder(dtype) / "adapter" / "README.md").read_text()
    assert "this rank holds" in run["stderr"][0]


NO_FLOAT16 = """
from deepspeed.accelerator import get_accelerator
get_accelerator().is_fp16_supported = lambda: None
import srlora_dist.training.run as run
def load_task(config):
    raise RuntimeError("the model is loaded")
run.load_task = load_task
"""
"""On every machine as on a processor without AVX512-FP16, where DeepSpeed gives None."""


def test_a_type_that_the_processor_lacks_is_refused_before_the_model_is_loaded(bench: Bench, forks: Forks) -> None:
    arguments = bench.arguments("no float16", model__dtype="float16")
    run = forks.start(yaml="zero2_cpu", arguments=arguments, code=NO_FLOAT16)
    assert run["statuses"] == {"0": 1, "1": 1}
    for stderr in run["stderr"]:
        assert "srlora_dist: error: model.dtype is float16, in which DeepSpeed does not train on this" in stderr
        assert "choose bfloat16 or float32" in stderr
        assert "Traceback" not in stderr
