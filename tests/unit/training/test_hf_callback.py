"""The Trainer's callback in one process: the choices of a plain loop, stop and resume, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, get_linear_schedule_with_warmup

from srlora_dist import SRLoRACallback, SRLoRAConfig, Switcher
from srlora_dist.checkpoint.training_state import trained_parameters
from tests.ranks.hf_trainer import (
    ACCUMULATION,
    BATCH,
    CLIP,
    NUM_STEPS,
    OPTIONS,
    RATE,
    Judged,
    make_arguments,
    make_model,
    make_trainer,
    samples,
    switches,
)
from tests.unit.checkpoint.test_folder_lock import HOLD


class StopAt(TrainerCallback):
    """Somebody presses Ctrl-C."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def require_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def answers(model: nn.Module) -> torch.Tensor:
    model.eval()
    return model(torch.stack([sample["x"] for sample in samples(8)]))["logits"].detach()


def base() -> nn.Module:
    torch.manual_seed(0)
    return Judged()


def served(folder: Path) -> torch.Tensor:
    return answers(PeftModel.from_pretrained(base(), str(folder)))


@pytest.fixture(scope="module")
def by_loop(tmp_path_factory) -> dict:
    """What a plain loop with a Switcher makes of the same data."""
    model = make_model()
    switcher = Switcher(model, SRLoRAConfig(svd_cache=str(tmp_path_factory.mktemp("loop")), **OPTIONS), NUM_STEPS)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0, fused=True
    )
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, NUM_STEPS)
    switcher.bind(model, optimizer)
    slots = []
    for number, batch in enumerate(DataLoader(samples(), batch_size=BATCH)):
        (model(**batch)["loss"] / ACCUMULATION).backward()
        if (number + 1) % ACCUMULATION:
            continue
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        report = switcher.step()
        slots += [(report.step, site.site, site.slots) for site in report.sites] if report is not None else []
        optimizer.zero_grad()
    return {"state": everything(model), "slots": slots, "answers": answers(model)}


@pytest.mark.long
def test_the_trainer_makes_the_choices_of_a_plain_loop(by_loop: dict, tmp_path: Path) -> None:
    trainer, callback = make_trainer(tmp_path / "run")
    assert trainer.evaluate()["eval_loss"] > 0  # before training
    reports = []
    step = callback.switcher.step
    callback.switcher.step = lambda: reports.append(step()) or reports[-1]
    trainer.train()
    slots = [(r.step, site.site, site.slots) for r in reports if r is not None for site in r.sites]
    assert slots == by_loop["slots"]
    assert [step for step, site, _ in slots if site == "first"] == [4, 8]
    assert switches(trainer) == [0, 4, 8]
    require_equal(everything(trainer.model), by_loop["state"])
    torch.testing.assert_close(served(tmp_path / "run/adapter"), by_loop["answers"])


@pytest.mark.long
def test_stopped_and_resumed_is_never_stopped(by_loop: dict, tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}
    trainer, _ = make_trainer(tmp_path / "run", callbacks=(StopAt(7),), **saves)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-6"]  # and nothing of ours elsewhere
    with pytest.raises(ValueError, match="train.. was called before.*load the model anew"):
        trainer.train(resume_from_checkpoint=True)
    trainer, callback = make_trainer(tmp_path / "run", **saves)
    trainer.train(resume_from_checkpoint=True)
    assert callback.switcher.resumed["step"] == 6
    assert switches(trainer) == [0, 4, 8]
    require_equal(everything(trainer.model), by_loop["state"])
    torch.testing.assert_close(served(tmp_path / "run/adapter"), by_loop["answers"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The output folder of a run with checkpoints 6 and 12, of which the loss calls one the best."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    best = {"eval_strategy": "steps", "eval_steps": 6, "metric_for_best_model": "eval_loss"}
    trainer, _ = make_trainer(folder, save_strategy="steps", save_steps=6, **best)
    trainer.train()
    trainer.save_model(str(folder / "by_hand"))
    return folder


@pytest.mark.long
def test_the_best_checkpoint_is_exported(saved: Path) -> None:
    state = json.loads((saved / "checkpoint-12/trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"]).name
    losses = {f"checkpoint-{e['step']}": e["eval_loss"] for e in state["log_history"] if "eval_loss" in e}
    assert best == min(losses, key=losses.get)
    labels = torch.stack([sample["labels"] for sample in samples(8)])
    loss = (served(saved / "adapter_best") - labels).square().mean()
    assert float(loss) == pytest.approx(losses[best], rel=1e-4)


@pytest.mark.parametrize("folder", ["checkpoint-6", "by_hand"])
def test_the_live_pairs_alone_do_not_load(folder: str, saved: Path) -> None:
    with pytest.raises(ValueError, match="adapter_config.json"):
        PeftModel.from_pretrained(base(), str(saved / folder))
    assert "srlora export" in (saved / folder / "LIVE_PAIRS.md").read_text()


def copy_of(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.mark.long
def test_a_checkpoint_without_its_state_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    shutil.rmtree(folder / "checkpoint-12/srlora")
    trainer, _ = make_trainer(folder)
    with pytest.raises(ValueError, match="no srlora/step-12.*take .*checkpoint-6; or name the folder"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.long
def test_a_checkpoint_that_lies_elsewhere_is_resumed_if_it_is_named(saved: Path, tmp_path: Path) -> None:
    there = str(saved / "checkpoint-6")
    trainer, _ = make_trainer(tmp_path / "run")
    with pytest.raises(ValueError, match="resume_from"):
        trainer.train(resume_from_checkpoint=there)
    trainer, callback = make_trainer(tmp_path / "run")
    callback.resume_from = there
    trainer.train(resume_from_checkpoint=there)
    assert switches(trainer) == [0, 4, 8]


@pytest.mark.long
def test_the_checkpoint_of_another_run_is_not_taken_for_it(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    state = folder / "checkpoint-6/srlora/step-6/state.json"
    other = tmp_path / "other"
    trainer, _ = make_trainer(other, save_strategy="steps", save_steps=6)
    trainer.train()
    assert json.loads(state.read_text())["extra"]["run"]
    trainer, _ = make_trainer(folder)
    with pytest.raises(ValueError, match="another run.*resume_from"):
        trainer.train(resume_from_checkpoint=str(other / "checkpoint-6"))


@pytest.mark.long
def test_two_starts_from_one_checkpoint_are_not_mixed_up(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    trainer, _ = make_trainer(folder, save_strategy="steps", save_steps=6)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"))  # writes another checkpoint-12
    trainer, _ = make_trainer(folder)
    with pytest.raises(ValueError, match="another run.*resume_from"):
        trainer.train(resume_from_checkpoint=str(saved / "checkpoint-12"))


@pytest.mark.long
def test_an_adapter_of_another_name_resumes_with_its_second_adapter(tmp_path: Path) -> None:
    about = {"options": {"adapter_name": "mine", "fusion": "adapter"}, "save_strategy": "steps", "save_steps": 6}
    trainers = [make_trainer(tmp_path / "run", make_model(adapter_name="mine"), **about)[0] for _ in range(2)]
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-6"))
    require_equal(*(everything(trainer.model) for trainer in trainers))
    torch.testing.assert_close(served(tmp_path / "run/adapter"), answers(trainers[0].model))


@pytest.mark.long
def test_a_checkpoint_without_the_learning_rate_is_refused(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 6}
    with pytest.raises(ValueError, match="save_only_model leaves out the learning rate.*set it to False"):
        make_trainer(tmp_path / "run", save_only_model=True, **saves)
    make_trainer(tmp_path / "run", **saves)[0].train()
    (tmp_path / "run/checkpoint-6/scheduler.pt").unlink()
    trainer, _ = make_trainer(tmp_path / "run", **saves)
    with pytest.raises(ValueError, match="checkpoint-6 was saved with save_only_model.*learning rate"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-6"))


@pytest.mark.long
def test_a_named_checkpoint_that_the_trainer_does_not_resume_is_noticed(saved: Path, tmp_path: Path) -> None:
    trainer, callback = make_trainer(tmp_path / "run")
    callback.resume_from = saved / "checkpoint-6"
    with pytest.raises(ValueError, match="checkpoint-6, but the Trainer begins anew.*resume_from_checkpoint"):
        trainer.train()


@pytest.mark.long
def test_the_best_checkpoint_of_another_run_is_not_exported(saved: Path, tmp_path: Path, caplog) -> None:
    folder = copy_of(saved, tmp_path)
    shutil.rmtree(folder / "adapter_best")
    # The step with the larger loss is called the best, is not saved, and was by the run before.
    best = {"eval_strategy": "steps", "eval_steps": 6, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer, _ = make_trainer(folder, save_strategy="steps", save_steps=12, **best)
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-6"
    assert "checkpoint-6, which the Trainer calls the best checkpoint, is not of this run" in caplog.text
    assert not (folder / "adapter_best").exists()


def test_a_single_checkpoint_is_warned_of(tmp_path: Path, caplog) -> None:
    make_trainer(tmp_path / "run", save_strategy="steps", save_total_limit=1)
    assert "save_total_limit 1 removes the old checkpoint before" in caplog.text


ARGUMENTS = {
    "load_best_model_at_end": ({"eval_strategy": "steps", "save_strategy": "steps"}, True, "adapter_best"),
    "auto_find_batch_size": ({}, True, "per_device_train_batch_size"),
    "enable_jit_checkpoint": ({}, True, "save_steps"),
    "optim": ({"save_strategy": "steps"}, "adamw_bnb_8bit", "adamw_torch.*save_strategy"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_that_would_lose_something_is_refused_at_once(name: str, tmp_path: Path) -> None:
    more, value, remedy = ARGUMENTS[name]
    with pytest.raises(ValueError, match=f"{name}.*{remedy}"):
        make_trainer(tmp_path / "run", **{name: value, **more})


def test_a_fused_optimizer_with_a_loss_scaler_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adamw_torch_fused unscales.*optim='adamw_torch'"):
        SRLoRACallback().on_init_end(make_arguments(tmp_path, fp16=True), None, None)


@pytest.mark.parametrize(
    ("fp16", "settings"), [(True, {"fp16": {"enabled": "auto"}}), (False, {"fp16": {"enabled": True}}), (True, {})]
)
def test_a_type_that_deepspeed_lacks_on_this_device_is_refused_at_once(
    fp16: bool, settings: dict, tmp_path: Path, monkeypatch
) -> None:
    pytest.importorskip("deepspeed")
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: None)
    args = make_arguments(tmp_path)
    sizes = dict.fromkeys(("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config={**sizes, "zero_optimization": {"stage": 2}, **settings})
    args.fp16 = fp16
    with pytest.raises(ValueError, match="the type of the training is float16, in which DeepSpeed does not train on"):
        SRLoRACallback().on_init_end(args, None, None, model=make_model())


@pytest.mark.parametrize(
    ("lora", "message"), [({"lora_dropout": 0.1}, "lora_dropout=0"), ({"rank": 11}, "target_rank 10 is below")]
)
def test_a_model_that_cannot_be_worked_on_is_refused_at_once(lora: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run", make_model(**lora))


def test_a_model_without_an_adapter_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no LoRA layers.*get_peft_model"):
        make_trainer(tmp_path / "run", Judged())


@pytest.mark.long
def test_an_optimizer_without_the_pairs_is_refused(tmp_path: Path) -> None:
    model = make_model()
    head = [parameter for name, parameter in trained_parameters(model).items() if "head" in name]
    trainer, _ = make_trainer(tmp_path / "run", model)
    trainer.optimizer = torch.optim.AdamW(head)
    with pytest.raises(ValueError, match="does not hold the LoRA parameters of first"):
        trainer.train()


@pytest.mark.long
def test_another_model_or_a_late_callback_is_refused(tmp_path: Path) -> None:
    about = {"args": make_arguments(tmp_path / "run"), "train_dataset": samples()}
    trainer = Trainer(model_init=lambda: make_model(), callbacks=[SRLoRACallback(SRLoRAConfig(**OPTIONS))], **about)
    with pytest.raises(ValueError, match="model_init"):
        trainer.train()
    trainer = Trainer(model=make_model(), **about)
    callback = SRLoRACallback(SRLoRAConfig(**OPTIONS))
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match=r"Trainer\(..., callbacks="):
        trainer.train()
    with pytest.raises(RuntimeError, match="trainer.train"):
        callback.export(tmp_path / "adapter")


@pytest.mark.long
def test_too_few_steps_for_the_switches_are_refused(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path / "run", max_steps=2)
    with pytest.raises(ValueError, match="3 switches in 2 steps"):
        trainer.train()


@pytest.mark.long
def test_max_steps_beyond_an_epoch_set_the_pace(tmp_path: Path) -> None:
    trainer, callback = make_trainer(tmp_path / "run", max_steps=18)
    trainer.train()
    assert switches(trainer) == [0, *callback.switcher.due_steps] == [0, 6, 12]


@pytest.mark.long
def test_two_trainers_never_train_into_one_folder(tmp_path: Path) -> None:
    program = [sys.executable, "-c", HOLD, str(tmp_path / "run"), ""]
    other = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    trainer, _ = make_trainer(tmp_path / "run")
    before = everything(trainer.model)
    with pytest.raises(ValueError, match=f"run is in use by process {other.pid} on host .* choose another output_dir"):
        trainer.train()
    require_equal(everything(trainer.model), before)
    other.communicate()
    trainer, _ = make_trainer(tmp_path / "run", callbacks=(StopAt(2),))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer, _ = make_trainer(tmp_path / "run")  # in the same process, and then others may have it
    trainer.train()
    assert subprocess.run(program, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0
    assert not list(tmp_path.rglob("*.srlora_lock"))
