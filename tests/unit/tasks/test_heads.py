"""A classifier whose checkpoint lacks more than the head: the adapter holds all that started at random."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
)

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.config.run import ModelOptions, RunConfig, TaskOptions
from srlora_dist.tasks.registry import load_task
from srlora_dist.training.adapter import adapt
from tests.launch.conftest import write_rte, write_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
DEBERTA = DebertaV2Config(**SIZES, pooler_hidden_size=64)
MODELS = {
    "deberta": lambda: DebertaV2Model(DEBERTA),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(dim=64, hidden_dim=64, n_layers=1, n_heads=2, vocab_size=20)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
}
NEW_PARTS = {"deberta": ("pooler",), "distilbert": ("pre_classifier",), "bert": ("bert.pooler",)}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", MODELS)
def test_what_starts_at_random_is_in_the_adapter(kind: str, quantization: str, tmp_path: Path) -> None:
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
        if kind == "bert":
            pytest.skip("which weights a quantised body lacks is not known before it is loaded")
    torch.manual_seed(0)
    MODELS[kind]().save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model", single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1")
    options = ModelOptions(str(tmp_path / "model"), dropout=0.0, quantization=quantization)
    config = RunConfig(model=options, task=TaskOptions("rte", str(write_rte(tmp_path / "glue")), max_length=16))
    task = load_task(config)
    assert task.heads == NEW_PARTS[kind]
    model = adapt(config, task.model, task.peft_type, task.heads)
    switcher = Switcher(model, SRLoRAConfig(target_rank=8), 10)
    assert not any(part in site.name for site in switcher.sites for part in task.heads)
    if quantization != "none":
        return
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(7)  # another load of the base draws other weights
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    tokens = {"input_ids": torch.tensor([[2, 7, 9, 3]])}
    with torch.no_grad():
        assert torch.equal(again(**tokens).logits, model.eval()(**tokens).logits)


def test_a_part_of_the_users_own_model_that_is_adapted_instead_of_saved_is_exported(tmp_path: Path) -> None:
    model = DebertaV2ForSequenceClassification(DEBERTA)
    model = get_peft_model(model, LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear"))
    switcher = Switcher(model, SRLoRAConfig(target_rank=4, svd_cache=str(tmp_path)), 20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.warns(UserWarning, match=r"the export will hold pooler\.dense"):
        switcher.bind(model, optimizer)
    switcher.export(tmp_path / "adapter")
    another = PeftModel.from_pretrained(DebertaV2ForSequenceClassification(DEBERTA), tmp_path / "adapter")
    ours, theirs = (m.base_model.model.pooler.dense.base_layer.weight for m in (model, another))
    assert torch.equal(ours, theirs)
