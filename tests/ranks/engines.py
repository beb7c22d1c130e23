"""One small odd-shaped model, one data stream, and the real engines to train it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

ENGINES = ("plain", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")
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
        self.shift = nn.Parameter(torch.zeros(13))  # ZeRO-3 takes its type from a model's first parameter

    def forward(self, x: Tensor) -> Tensor:
        return self.tiny(super().forward(x + self.shift))


SHAPES = {"first": (17, 13), "second": (11, 17), "tiny": (3, 3)}
RANKS = {"first": 4, "second": 2, "tiny": 1}


def make_net(
    rank: int = 4,
    alpha: float = 6,
    seed: int = 0,
    base: type[nn.Module] = Net,
    adapter_name: str = "default",
    **lora: object,
) -> nn.Module:
    """The PEFT model, the same in every process; its scale is not 1."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["first", "second"], modules_to_save=["head"], **lora)
    return get_peft_model(base(), config, adapter_name=adapter_name)


def make_odd_base(precision: str = "fp32") -> nn.Module:
    """The pretrained model, the same in every process, in one of ``PRECISIONS``."""
    torch.manual_seed(0)
    base = OddNet()
    if precision == "bf16":
        return base.bfloat16()
    if precision != "fp32":
        for name in SHAPES:
            setattr(base, name, quantised(getattr(base, name), precision))
        base.is_loaded_in_8bit = precision == "int8"  # as transformers marks a model, so that PEFT takes its own layers
        base.is_loaded_in_4bit = precision != "int8"
    return base


PRECISIONS = ("fp32", "bf16", "nf4", "nf4-double", "fp4", "int8")


def quantised(linear: nn.Linear, precision: str) -> nn.Module:
    """The same layer as bitsandbytes holds it on the CPU; it computes in float32."""
    import bitsandbytes as bnb

    m, n = linear.weight.shape
    if precision == "int8":
        layer = bnb.nn.Linear8bitLt(n, m, has_fp16_weights=False, threshold=0.0)
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False)
    else:
        kind, _, double = precision.partition("-")
        layer = bnb.nn.Linear4bit(n, m, compute_dtype=torch.float32, compress_statistics=bool(double), quant_type=kind)
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=bool(double), quant_type=kind, module=layer
        )
    layer.bias = linear.bias
    return layer.to("cpu")  # quantises


def dequantised(layer: nn.Module, precision: str) -> Tensor:
    """The weight that a quantised layer stands for, (m, n)."""
    import bitsandbytes as bnb

    if precision == "int8":
        return bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).float()
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def make_odd_net(precision: str = "fp32") -> nn.Module:
    """The PEFT model, with a rank and a scale of its own for each site."""
    base = make_odd_base(precision)
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={"second": 2, "tiny": 1},
        alpha_pattern={"tiny": 1.5},
        target_modules=list(SHAPES),
        modules_to_save=["head"],
    )
    return get_peft_model(base, config)


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
    name: str,
    model: nn.Module,
    learning_rate: float,
    clip: float,
    accumulation: int = 1,
    settings: dict | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **zero: object,
) -> Engine:
    """Prepare with torch alone, DDP, FSDP2 or a real DeepSpeed engine.

    ``settings`` are added to DeepSpeed's configuration, and ``zero`` to its zero_optimization.
    """
    if name.startswith("fsdp2"):
        shard_(model)
    columns = [p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name]
    others = [p for name, p in model.named_parameters() if p.requires_grad and "lora_B" not in name]
    groups = [{"params": others}, {"params": columns}]
    optimizer = optimizer or torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0)
    if name.startswith("zero"):
        return _deepspeed(int(name[4:]), model, optimizer, clip, accumulation, zero, settings or {})
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


def shard_(model: nn.Module) -> None:
    """FSDP2 in groups of one type; the third site is in the root's, which stays gathered after a forward."""
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for name in ("first", "second", "head"):
        fully_shard(model.get_submodule(f"base_model.model.{name}"), mesh=mesh)
    fully_shard(model, mesh=mesh)


def _deepspeed(
    stage: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    clip: float,
    accumulation: int,
    zero: dict,
    settings: dict,
) -> Engine:
    import deepspeed

    world = torch.distributed.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": BATCH // world // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_force_ds_cpu_optimizer": False,  # torch AdamW under optimizer offload
        "zero_optimization": {"stage": stage, **zero},
        **settings,
    }
    engine, wrapped, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return Engine(engine, wrapped, engine.backward, engine.step)
