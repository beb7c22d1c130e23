"""The options of a run: their list is frozen, so that a new one is a decision, and each says what it means."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from srlora_dist.config import LoRAOptions, RunConfig, SRLoRAConfig, TaskOptions, TrainOptions
from srlora_dist.config.option import flatten, free_on_resume, unnamed, walk_options
from srlora_dist.config.parse import parse, to_yaml

OPTIONS = """
method output_dir seed engine
model.name_or_path model.gguf_file model.dropout model.dtype model.quantization model.double_quantization
model.trust_remote_code
task.name task.data_dir task.max_length task.completion_only task.packing task.max_train_samples task.max_eval_samples
lora.rank lora.alpha lora.dropout lora.target_modules lora.use_rslora
srlora.target_rank srlora.fusion_ratio srlora.beta1 srlora.beta2 srlora.importance_window srlora.start srlora.score
srlora.choose srlora.grace srlora.switch_until srlora.num_switches srlora.switch_when srlora.exhausted
srlora.score_reset srlora.optimizer_reset srlora.fusion srlora.fused_rank srlora.residual_device
srlora.directions_from srlora.check_switch srlora.switch_tolerance srlora.agreement_every srlora.adapter_name
srlora.svd_cache srlora.svd_distribute srlora.ledger_dir
train.epochs train.max_steps train.batch_size train.eval_batch_size train.accumulation_steps train.optimizer
train.momentum train.learning_rate train.schedule train.warmup_ratio train.weight_decay train.max_grad_norm
train.eval_every train.log_every train.max_bad_steps train.timeout
checkpoint.every checkpoint.keep checkpoint.resume checkpoint.if_disk_full
"""

FREE_ON_RESUME = """
output_dir engine model.name_or_path model.gguf_file model.trust_remote_code task.data_dir
srlora.residual_device srlora.check_switch srlora.switch_tolerance srlora.agreement_every srlora.svd_cache
srlora.svd_distribute srlora.ledger_dir
train.eval_batch_size train.accumulation_steps train.eval_every train.log_every train.max_bad_steps train.timeout
checkpoint.every checkpoint.keep checkpoint.resume checkpoint.if_disk_full
"""

UNNAMED = """
output_dir engine task.data_dir srlora.svd_cache srlora.ledger_dir train.timeout
checkpoint.every checkpoint.keep checkpoint.resume checkpoint.if_disk_full
"""


def test_a_new_option_is_a_decision() -> None:
    """Each is a promise: add one here only with a reason to keep it, and say below what it means."""
    assert sorted(name for name, _ in walk_options(RunConfig)) == sorted(OPTIONS.split())
    assert sorted(flatten(asdict(RunConfig()))) == sorted(OPTIONS.split())


def test_what_may_change_on_a_resume_and_what_names_a_run() -> None:
    assert free_on_resume(RunConfig) == set(FREE_ON_RESUME.split())
    assert unnamed(RunConfig, "figure") == set(UNNAMED.split())
    assert unnamed(RunConfig, "grid") == {*UNNAMED.split(), "train.eval_batch_size", "train.log_every"}
    prefixed = {name.removeprefix("srlora.") for name in FREE_ON_RESUME.split() if name.startswith("srlora.")}
    assert free_on_resume(SRLoRAConfig) == prefixed
    assert unnamed(RunConfig, "grid") <= free_on_resume(RunConfig)  # where things lie may change


def test_an_option_that_another_one_governs_names_one_that_is_there() -> None:
    defaults = flatten(asdict(RunConfig()))
    for name, each in walk_options(RunConfig):
        other, values = each.metadata.get("only_with") or (name, (None,))
        assert other in defaults, name
        assert values


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (RunConfig(), []),
        (RunConfig(srlora=SRLoRAConfig(beta1=0.5, score="change")), ["srlora.beta1 (srlora.score is change)"]),
        (RunConfig("lora", srlora=SRLoRAConfig(beta1=0.5, adapter_name="mine")), ["srlora.beta1"]),
        (RunConfig("pissa", srlora=SRLoRAConfig(num_switches=3, svd_cache="x")), ["srlora.num_switches"]),
        (RunConfig(train=TrainOptions(epochs=3, max_steps=5)), ["train.epochs (train.max_steps is 5)"]),
        (RunConfig(task=TaskOptions("mine/task.py", packing=True)), []),
        (RunConfig(task=TaskOptions("lm", completion_only=False)), ["task.completion_only (task.name is lm)"]),
    ],
)
def test_options_that_do_nothing_are_named(config: RunConfig, names: list[str]) -> None:
    assert config.without_effect() == names


def test_checkpoints_of_adalora_are_without_effect() -> None:
    config = RunConfig("adalora")
    config.checkpoint.every = 5
    assert config.without_effect() == ["checkpoint.every"]


def test_the_resolved_options_make_the_same_run(tmp_path: Path) -> None:
    config = RunConfig("pissa", seed=3, lora=LoRAOptions(4, 8.0), task=TaskOptions("rte", max_length=64))
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert parse(["--config", str(file)]) == config
    assert parse(["--config", str(file), "--lora.rank=2"]).lora.rank == 2
