"""The callback in TRL's SFTTrainer, which makes the adapter itself, on a base in 4 bits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from srlora_dist import SRLoRACallback, SRLoRAConfig
from srlora_dist.layers.discovery import keep_payloads_

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

WORDS = ["the", "a", "small", "large", "dog", "cat", "sees", "hears", "old", "young", "bird", "tree"]


def make_decoder(folder: Path) -> str:
    torch.manual_seed(0)
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), pad_token_id=0, eos_token_id=1, **sizes)).save_pretrained(
        folder
    )
    return str(folder)


def in_four_bits() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def make_trainer(tmp_path: Path, decoder: str) -> trl.SFTTrainer:
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(len(WORDS), (24, 6), generator=generator).tolist()
    data = datasets.Dataset.from_dict({"text": [" ".join(WORDS[i] for i in row) for row in words]})
    return trl.SFTTrainer(
        model=decoder,
        args=trl.SFTConfig(
            str(tmp_path / "run"),
            max_steps=6,
            save_steps=3,
            eval_strategy="steps",
            eval_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            max_length=16,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        quantization_config=in_four_bits(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules="all-linear"),
        callbacks=[SRLoRACallback(SRLoRAConfig(target_rank=10, svd_cache=str(tmp_path / "svd")))],
    )


@pytest.mark.long
def test_sft_on_four_bits_switches_resumes_and_exports(tmp_path: Path) -> None:
    decoder = make_decoder(tmp_path / "decoder")
    trainer = make_trainer(tmp_path, decoder)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    whole = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
    assert [entry["step"] for entry in trainer.state.log_history if "srlora_switch" in entry] == [0, 2, 4]
    assert any("srlora_fused" in name for name in whole)

    trainer = make_trainer(tmp_path, decoder)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name

    base = AutoModelForCausalLM.from_pretrained(decoder, quantization_config=in_four_bits())
    served = PeftModel.from_pretrained(base, str(tmp_path / "run/adapter"))
    keep_payloads_(served)
    tokens = torch.tensor([[2, 3, 4, 5, 6]])
    live = trainer.model.eval()(tokens).logits.detach()
    # TRL keeps the pairs of a quantised model in bfloat16, in which two adapters round otherwise than one.
    torch.testing.assert_close(served.eval()(tokens).logits.detach().float(), live.float(), rtol=3e-2, atol=3e-2)


def adapted(decoder: str) -> PeftModel:
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules="all-linear")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(decoder), lora)


REFERENCES = {
    "DPOConfig": "adapter, which never writes them$",  # beta 0 would be no training
    "GRPOConfig": "adapter, which never writes them, or beta=0",
    "SDFTConfig": "adapter, which never writes them, or teacher_model_kind='live'",
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_that_would_be_edited_is_refused(name: str, tmp_path: Path) -> None:
    kind = getattr(trl, name, None) or getattr(pytest.importorskip("trl.experimental.sdft"), name)
    more = {"beta": 0.1} if name == "GRPOConfig" else {}
    arguments = kind(str(tmp_path), use_cpu=True, bf16=False, report_to=[], **more)
    model = adapted(make_decoder(tmp_path))
    with pytest.raises(ValueError, match=f"{name} compares with the model without its adapter.*{REFERENCES[name]}"):
        SRLoRACallback(SRLoRAConfig(target_rank=8)).on_init_end(arguments, None, None, model)


def make_dpo_trainer(tmp_path: Path, model: object, peft_config: LoraConfig | None) -> trl.DPOTrainer:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(len(WORDS), (24, 3, 4), generator=generator).tolist()
    texts = [[" ".join(WORDS[i] for i in part) for part in row] for row in rows]
    columns = zip(("prompt", "chosen", "rejected"), zip(*texts, strict=True), strict=True)
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 16}
    options |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "save_strategy": "no"}
    srlora = SRLoRAConfig(target_rank=10, fusion="adapter", svd_cache=str(tmp_path / "svd"))
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(str(tmp_path / "run"), logging_steps=1, **options),
        train_dataset=datasets.Dataset.from_dict({name: list(column) for name, column in columns}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(tmp_path / "decoder"),
        peft_config=peft_config,
        callbacks=[SRLoRACallback(srlora)],
    )


@pytest.mark.long
def test_dpo_with_a_second_adapter_keeps_its_reference(tmp_path: Path) -> None:
    decoder = make_decoder(tmp_path / "decoder")
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules="all-linear")
    trainer = make_dpo_trainer(tmp_path, AutoModelForCausalLM.from_pretrained(decoder), lora)
    batch = next(iter(trainer.get_train_dataloader()))
    before = torch.stack(trainer.compute_ref_log_probs(trainer.model, batch))
    trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "srlora_switch" in entry] == [0, 2, 4]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the model is its reference still
    assert abs(losses[-1] - losses[0]) > 1e-3
    after = torch.stack(trainer.compute_ref_log_probs(trainer.model, batch))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(decoder), tmp_path / "run/adapter")
    tokens = torch.tensor([[2, 3, 4, 5, 6]])
    live = trainer.model.eval()(tokens).logits.detach()
    torch.testing.assert_close(served.eval()(tokens).logits.detach(), live, rtol=1e-5, atol=1e-5)


def test_dpo_that_switches_between_adapters_is_refused(tmp_path: Path) -> None:
    decoder = make_decoder(tmp_path / "decoder")
    with pytest.raises(ValueError, match="leaves out what was fused: give the trainer the plain model and peft_config"):
        make_dpo_trainer(tmp_path, adapted(decoder), None)
