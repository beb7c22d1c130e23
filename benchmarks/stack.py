"""What the benchmarks on ranks train: a stack of square linear layers with LoRA, on the engines of the tests."""

from __future__ import annotations

import logging

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.method import directions
from tests.ranks.engines import Engine, prepare

PARTITIONED = {"stage3_param_persistence_threshold": 0}
NUM_STEPS = 1000


def make_stack(num_layers: int, width: int, rank: int) -> nn.Module:
    """The PEFT model, the same in every process; its scale is 1."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(num_layers)))
    names = [str(number) for number in range(num_layers)]
    return get_peft_model(layers, LoraConfig(r=rank, lora_alpha=rank, target_modules=names))


def make_switcher(model: nn.Module, target_rank: int, cache: str) -> Switcher:
    """A switcher on random directions: the time and the bytes of a switch do not depend on what they are."""
    directions.compute_directions = random_directions
    logging.getLogger("srlora_dist").setLevel(logging.ERROR)  # switches without steps between them find even scores
    return Switcher(model, SRLoRAConfig(target_rank=target_rank, svd_cache=cache), NUM_STEPS)


def random_directions(weight: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """In place of singular triplets; shapes as :func:`srlora_dist.method.svd.compute_directions` gives them."""
    m, n = weight.shape
    return torch.randn(m, count) / m**0.5, torch.full((count,), 0.01), torch.randn(count, n) / n**0.5


def prepare_stack(name: str, model: nn.Module) -> Engine:
    """Prepare on one of the engines; ZeRO-3 cuts all weights, and FSDP2 those of one layer together."""
    if name != "fsdp2":
        return prepare(name, model, 1e-3, 0.5, **(PARTITIONED if name == "zero3" else {}))
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.base_model.model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return prepare("plain", model, 1e-3, 0.5)


def train_step(engine: Engine, width: int) -> None:
    """One optimizer step on four rows of noise a rank."""
    engine.backward(engine.model(torch.randn(4, width)).square().mean())
    engine.step()
