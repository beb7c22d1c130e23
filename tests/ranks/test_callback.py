"""The Trainer's callback on real engines: the choices of one process, and a stop and resume in the middle."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer

from srlora_dist import SRLoRACallback, SRLoRAConfig
from srlora_dist.checkpoint.training_state import trained_parameters
from srlora_dist.layers.discovery import keep_payloads_
from tests.ranks.hf_trainer import ACCUMULATION, BATCH, CLIP, Judged, make_arguments, make_trainer, samples, switches
from tests.ranks.world import run_ranks


def train(rank: int, world_size: int, engine: str, folder: str) -> dict:
    """A whole run that saves after step 6, and one that resumes there."""
    results = [_run(engine, world_size, Path(folder), resume_from) for resume_from in (None, f"{folder}/checkpoint-6")]
    return {"whole": results[0], "resumed": results[1]}


def _run(engine: str, world_size: int, folder: Path, resume_from: str | None) -> dict:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    changes = {"save_strategy": "steps", "save_steps": 6, "per_device_train_batch_size": BATCH // world_size}
    changes |= {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 5, **on_engine(engine)}
    trainer, callback = make_trainer(folder, **changes)
    try:
        trainer.train(resume_from_checkpoint=resume_from)
    finally:
        for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
            os.environ.pop(variable, None)
    storage = callback.switcher.storage
    assert storage.name == engine, "another engine ran"
    storage.to_rest_layout_()
    named = trained_parameters(trainer.model)
    x = torch.stack([sample["x"] for sample in samples(8)])
    trainer.model.eval()
    return {
        "switches": switches(trainer),
        "slots": [site.state.held for site in storage.sites],
        "weights": [storage.digest_weight(number) for number in range(len(storage.sites))],
        "trained": [whole.float().clone() for whole in storage.gather_parameters(list(named.values()))],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "starts": [entry["srlora_run"] for entry in trainer.state.log_history if "srlora_run" in entry],
        "answers": trainer.model_wrapped(x)["logits"].detach().float(),
    }


def on_engine(engine: str) -> dict:
    """Arguments of the Trainer for an engine without a GPU."""
    if engine == "ddp":
        return {"ddp_backend": "gloo"}
    if engine == "fsdp2":
        PartialState(cpu=True, backend="gloo")
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # Accelerate drops FSDP on CPUs
        about = {"version": 2, "auto_wrap_policy": "NO_WRAP"}
        return {"fsdp": True, "fsdp_config": about, "accelerator_config": {"use_configured_state": True}}
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    stage = {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        "zero_optimization": stage,
        "zero_force_ds_cpu_optimizer": False,
    }
    return {"deepspeed": config, "accelerator_config": {"use_configured_state": True}, "use_cpu": False}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """One process, the same data: what the engines are compared with."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    trainer, callback = make_trainer(folder)
    trainer.train()
    return {
        "switches": switches(trainer),
        "slots": [site.state.held for site in callback.switcher.storage.sites],
        "trained": [parameter.detach().clone() for parameter in trained_parameters(trainer.model).values()],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


@pytest.mark.timeout(200)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero0", "zero2", "zero3"])
def test_the_choices_of_one_process_and_a_resume_that_changes_nothing(engine: str, alone: dict, tmp_path: Path) -> None:
    ranks = run_ranks(train, 2, engine, str(tmp_path / "run"), timeout=180)
    for result in ranks:
        for run in result.values():
            assert run["switches"] == alone["switches"] == [0, 4, 8]
            assert run["slots"] == alone["slots"]
            for theirs, ours in zip(run["trained"], alone["trained"], strict=True):
                torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(run["losses"], alone["losses"], rtol=1e-3, atol=1e-4)
    whole, resumed = ranks[0]["whole"], ranks[0]["resumed"]
    assert len(resumed["starts"]) == 2
    assert ranks[1]["resumed"]["starts"] == resumed["starts"]  # it may save the Trainer's state too
    if engine != "ddp":  # which adds gradients in another order after its first two passes
        assert resumed["weights"] == whole["weights"]
        assert all(torch.equal(a, b) for a, b in zip(resumed["trained"], whole["trained"], strict=True))
    torch.manual_seed(0)
    served = PeftModel.from_pretrained(Judged(), tmp_path / "run/adapter").eval()
    x = torch.stack([sample["x"] for sample in samples(8)])
    torch.testing.assert_close(served(x)["logits"], resumed["answers"], rtol=1e-4, atol=1e-5)


def go_wrong(rank: int, world_size: int, folder: str) -> dict:
    """What two misused Trainers say."""
    messages = {}
    for what in ("dropped", "evaluated"):
        # Accelerate drops FSDP on CPUs.
        changes = {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "NO_WRAP"}} if what == "dropped" else {}
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        trainer, _ = make_trainer(Path(folder), **changes, ddp_backend="gloo")
        try:
            if what == "evaluated":
                trainer.evaluate()
            trainer.train()
        except ValueError as error:
            messages[what] = str(error)
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    return messages


@pytest.mark.timeout(200)
def test_a_trainer_without_its_engine_is_noticed_on_every_rank(tmp_path: Path) -> None:
    for messages in run_ranks(go_wrong, 2, str(tmp_path / "run"), timeout=180, last=True):
        assert "asks for FSDP, but the Trainer runs on ddp" in messages["dropped"]
        assert "eval_on_start=True instead" in messages["evaluated"]


def train_in_4_bits(rank: int, world_size: int, folder: str) -> dict:
    """The Trainer on FSDP2 with bitsandbytes' default storage, which is refused, and with the one that is offered."""
    results = {}
    for storage in (None, torch.bfloat16):
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        base = load_in_4_bits(folder, storage)
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        tokens = torch.randint(4, 60, (16, 8), generator=torch.Generator().manual_seed(1))
        callback = SRLoRACallback(SRLoRAConfig(target_rank=8, svd_cache=f"{folder}/svd"))
        args = make_arguments(Path(folder) / "run", max_steps=3, label_names=None, **on_engine("fsdp2"))
        try:
            samples = [{"input_ids": row, "labels": row} for row in tokens]
            trainer = Trainer(model=model, args=args, train_dataset=samples, callbacks=[callback])
        except ValueError as error:
            results["message"] = str(error)
            continue
        finally:
            os.environ.pop("ACCELERATE_USE_FSDP", None)
        trainer.train()
        results |= {"storage": callback.switcher.storage.name, "switches": switches(trainer)}
        trainer.model.eval()
        with torch.no_grad():
            results["logits"] = trainer.model_wrapped(tokens[:4]).logits.float()
    return results


def load_in_4_bits(folder: str, storage: torch.dtype | None) -> nn.Module:
    more = {} if storage is None else {"bnb_4bit_quant_storage": storage}
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **more)
    return LlamaForCausalLM.from_pretrained(f"{folder}/base", quantization_config=options, dtype=torch.bfloat16)


@pytest.mark.timeout(200)
def test_a_4_bit_payload_that_fsdp_would_leave_out_is_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "base")
    for result in run_ranks(train_in_4_bits, 2, str(tmp_path), timeout=180):
        assert "stored as torch.uint8, which Accelerate leaves out of FSDP2" in result["message"]
        assert "BitsAndBytesConfig(bnb_4bit_quant_storage=torch.bfloat16" in result["message"]
        assert (result["storage"], result["switches"]) == ("fsdp2", [0, 1])
    tokens = torch.randint(4, 60, (16, 8), generator=torch.Generator().manual_seed(1))[:4]
    base = keep_payloads_in(load_in_4_bits(str(tmp_path), None))
    served = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    with torch.no_grad():
        difference = (served(tokens).logits.float() - result["logits"]).norm() / result["logits"].norm()
    assert difference < 0.02  # roundings of bfloat16


def keep_payloads_in(model: nn.Module) -> nn.Module:
    """bitsandbytes would repack them on some processors."""
    keep_payloads_(model)
    return model
