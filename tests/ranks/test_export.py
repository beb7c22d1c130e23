"""What is exported beside the pairs is whole, however an engine cuts it: embeddings, norms, W of a new output layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.checkpoint.export import export_checkpoint
from srlora_dist.checkpoint.format import find_checkpoint
from tests.ranks.engines import prepare
from tests.ranks.world import run_ranks

IDS = torch.randint(4, 40, (6, 5), generator=torch.Generator().manual_seed(3))
NUM_STEPS, ROWS = 6, 43


class Counting(nn.Module):
    """A decoder with a buffer that training moves."""

    def __init__(self, folder: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.decoder = LlamaForCausalLM.from_pretrained(folder)
        self.decoder.resize_token_embeddings(ROWS)
        self.config = self.decoder.config
        self.register_buffer("scale", torch.ones(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.scale.mul_(1.1)
        return self.decoder(input_ids=ids).logits * self.scale

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()


def make_model(folder: str, seed: int = 0) -> nn.Module:
    model = get_peft_model(Counting(folder, seed), LoraConfig(r=4, target_modules=["q_proj", "up_proj", "lm_head"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    return model


def train(rank: int, world_size: int, name: str, folder: str) -> dict:
    """A whole run, and one that resumes its checkpoint."""
    found = {}
    for resume_from in (None, f"{folder}/{name}/checkpoints"):
        model = make_model(f"{folder}/base")
        switcher = Switcher(model, SRLoRAConfig(target_rank=8, svd_cache=f"{folder}/svd"), NUM_STEPS)
        if name == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            mesh = torch.distributed.init_device_mesh("cpu", (world_size,))
            for part in (*model.base_model.model.decoder.model.layers, model):
                fully_shard(part, mesh=mesh)
        zero = {"stage3_param_persistence_threshold": 0} if name == "zero3" else {}
        engine = prepare("sharded" if name == "fsdp2" else name, model, 1e-2, 0, **zero)
        switcher.bind(engine.model, engine.optimizer, resume_from)
        assert switcher.storage.name == name, "another engine ran"
        if resume_from is None:
            engine.model.train()
            for _ in range(NUM_STEPS):
                engine.backward(engine.model(IDS).square().mean())
                engine.step()
                switcher.step()
            switcher.save_checkpoint(f"{folder}/{name}/checkpoints")
            switcher.export(f"{folder}/{name}/adapter")
        engine.model.eval()
        with torch.no_grad():
            found["whole" if resume_from is None else "resumed"] = engine.model(IDS)
    return found


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_what_an_engine_cuts_is_exported_whole(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 22, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=40)).save_pretrained(tmp_path / "base")
    for seen in run_ranks(train, 2, name, str(tmp_path), timeout=240, last=True):
        export_checkpoint(find_checkpoint(tmp_path / name / "checkpoints"), tmp_path / name / "later")
        torch.testing.assert_close(seen["resumed"], seen["whole"], rtol=1e-5, atol=1e-6)
        for folder in ("adapter", "later"):
            base = Counting(str(tmp_path / "base"), seed=5)  # other new rows
            loaded = PeftModel.from_pretrained(base, tmp_path / name / folder).eval()
            difference = (loaded(IDS) - seen["whole"]).norm() / seen["whole"].norm()
            assert difference < 1e-5, (folder, difference)
