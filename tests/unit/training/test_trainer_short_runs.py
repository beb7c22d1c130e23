"""A run too short for the switches of the default target rank makes as many as fit; one that was set is an error."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import Trainer

from benchmarks.reproduce.grid import digest
from srlora_dist import SRLoRACallback, SRLoRAConfig
from srlora_dist.commands.cli import main
from srlora_dist.config.parse import parse, to_yaml
from srlora_dist.config.run import RunConfig
from srlora_dist.training.resume import first_difference
from tests.ranks.engines import Net, make_batch
from tests.ranks.hf_trainer import make_arguments, make_model, samples, switches
from tests.unit.checkpoint.test_save import resume
from tests.unit.method.test_switcher import bound, take_steps

FEWER = "asks for {} switches in {} steps, and as many as fit are made: {}"
CLAMPED = "ignore:srlora.target_rank 32 is more than these matrices hold"


@pytest.mark.filterwarnings(CLAMPED)
def test_a_loop_makes_as_many_switches_as_fit(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=FEWER.format(5, 3, 2)):
        model, optimizer, switcher = bound(tmp_path, steps=3)
    assert switcher.due_steps == [1, 2]
    assert [report.step for report in take_steps(model, optimizer, switcher, 3)] == [1, 2]
    switcher.export(tmp_path / "adapter")
    x, _ = make_batch(0)
    torch.manual_seed(0)  # as make_net
    exported = PeftModel.from_pretrained(Net(), tmp_path / "adapter")
    torch.testing.assert_close(exported(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings(CLAMPED)
def test_a_loop_that_asked_for_more_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="srlora.target_rank asks for 5 switches in 3 steps: train longer, lower"):
        bound(tmp_path, steps=3, target_rank=32)
    with pytest.raises(ValueError, match="srlora.num_switches asks for 4 switches in 3 steps"):
        bound(tmp_path, steps=3, num_switches=4)


@pytest.mark.filterwarnings(CLAMPED)
def test_a_short_loop_is_resumed(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=FEWER.format(5, 3, 2)):
        model, optimizer, switcher = bound(tmp_path, steps=3)
    take_steps(model, optimizer, switcher, 1)
    switcher.save_checkpoint(tmp_path / "checkpoints")
    with pytest.warns(UserWarning, match=FEWER.format(5, 3, 2)):
        again = resume(tmp_path, tmp_path / "checkpoints", steps=3, target_rank=None)
    assert (again.num_steps, again.num_switches, again.due_steps) == (1, 2, [1, 2])
    with pytest.raises(ValueError, match="srlora.target_rank asks for 5 switches in 3 steps"):
        resume(tmp_path, tmp_path / "checkpoints", steps=3, target_rank=32)


@pytest.mark.filterwarnings(CLAMPED)
def test_the_default_said_and_unsaid_are_one_when_a_run_is_resumed(tmp_path: Path) -> None:
    """A checkpoint of before, or one of a run whose options were written out."""
    model, optimizer, switcher = bound(tmp_path, steps=20, target_rank=32)
    take_steps(model, optimizer, switcher, 1)
    switcher.save_checkpoint(tmp_path / "checkpoints")
    assert resume(tmp_path, tmp_path / "checkpoints", target_rank=None).num_steps == 1
    unsaid, said = RunConfig(), RunConfig(srlora=SRLoRAConfig(target_rank=32))
    assert first_difference(asdict(said), unsaid) is None
    assert first_difference(asdict(unsaid), said) is None
    assert digest(asdict(said), "no") == digest(asdict(unsaid), "no")
    assert first_difference(asdict(RunConfig(srlora=SRLoRAConfig(target_rank=16))), unsaid)[1:] == (16, 32)


@pytest.mark.long
def test_a_trainer_makes_as_many_switches_as_fit(tmp_path: Path) -> None:
    callback = SRLoRACallback(SRLoRAConfig(svd_cache=str(tmp_path / "svd")))
    args = make_arguments(tmp_path / "run", max_steps=2)
    with pytest.warns(UserWarning, match="more than these matrices hold"):
        trainer = Trainer(model=make_model(), args=args, train_dataset=samples(), callbacks=[callback])
    with pytest.warns(UserWarning, match="in 2 steps, and as many as fit are made: 1"):
        trainer.train()
    assert switches(trainer) == [0, 1]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.long
def test_a_file_of_options_keeps_what_was_not_set(tmp_path: Path) -> None:
    config = parse([])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["srlora"]["target_rank"] is None
    again = parse(["--config", str(tmp_path / "config.yaml")])
    assert (again.srlora.target_rank, again.srlora.num_directions) == (None, 32)
    assert parse(["--srlora.target_rank", "32"]).srlora.target_rank == 32
    assert RunConfig(method="pissa").without_effect() == []


@pytest.mark.long
def test_a_plan_of_a_short_run_says_the_same(capsys) -> None:
    short = ["plan", "--model=llama-7b", "--engine=zero2", "--world-size=2", "--steps=2", "--json"]
    with pytest.warns(UserWarning, match=FEWER.format(6, 2, 1)):
        assert main(short) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["switch_steps"] == [1]
    assert plan["run"].endswith("r=8, target 32")
    assert main([*short, "--target-rank=32"]) == 2
    assert "srlora.target_rank asks for 6 switches in 2 steps" in capsys.readouterr().err
