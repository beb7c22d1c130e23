"""One small odd-shaped model, one data stream, and the real engines to train it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

ENGINES = ("plain", "ddp", "zero1", "zero2", "zero3")
BATCH = 12  # divides by 1, 2, 3 and 4 ranks


class Net(nn.Module):
    """Two linear layers of odd shapes and a head; nothing divides evenly by 2, 3 or 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(13, 17), nn.Linear(17, 11), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class OddNet(Net):
    """With a third site so small that on 4 ranks some hold nothing of it (9, 3 and 3 elements under ZeRO-3)."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.tiny(super().forward(x))


SHAPES = {"first": (17, 13), "second": (11, 17), "tiny": (3, 3)}
RANKS = {"first": 4, "second": 2, "tiny": 1}


def make_net(rank: int = 4, alpha: float = 6, seed: int = 0, **lora: object) -> nn.Module:
    """The PEFT model, the same in every process; its scale is not 1."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["first", "second"], modules_to_save=["head"], **lora)
    return get_peft_model(Net(), config)


def make_odd_net() -> nn.Module:
    """The same with the tiny site, and a rank and a scale of its own for each site."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={"second": 2, "tiny": 1},
        alpha_pattern={"tiny": 1.5},
        target_modules=list(SHAPES),
        modules_to_save=["head"],
    )
    return get_peft_model(OddNet(), config)


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step: inputs (BATCH, 13), targets (BATCH, 3)."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(BATCH, 13, generator=generator)
    return x, torch.sin(x[:, :3] * 2) + x[:, 3:6]


@dataclass
class Engine:
    """A prepared model with its optimizer and one way to take a step."""

    model: nn.Module
    optimizer: object
    backward: Callable[[Tensor], None]
    step: Callable[[], None]


def prepare(
    name: str, model: nn.Module, learning_rate: float, clip: float, accumulation: int = 1, **zero: object
) -> Engine:
    """Prepare with torch alone, DDP, or a real DeepSpeed engine; ``zero`` is added to its zero_optimization."""
    columns = [p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name]
    others = [p for name, p in model.named_parameters() if p.requires_grad and "lora_B" not in name]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": columns}], lr=learning_rate, weight_decay=0)
    if name.startswith("zero"):
        return _deepspeed(int(name[4:]), model, optimizer, clip, accumulation, zero)
    wrapped = nn.parallel.DistributedDataParallel(model) if name == "ddp" else model

    def step() -> None:
        if step.calls % accumulation == 0:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        step.calls += 1

    step.calls = 1
    return Engine(wrapped, optimizer, lambda loss: (loss / accumulation).backward(), step)


def _deepspeed(
    stage: int, model: nn.Module, optimizer: torch.optim.Optimizer, clip: float, accumulation: int, zero: dict
) -> Engine:
    import deepspeed

    world = torch.distributed.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": BATCH // world // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_force_ds_cpu_optimizer": False,  # torch AdamW under optimizer offload
        "zero_optimization": {"stage": stage, **zero},
    }
    engine, wrapped, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return Engine(engine, wrapped, engine.backward, engine.step)
