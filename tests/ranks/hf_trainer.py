"""A small model, data and arguments for transformers' Trainer, the same in every process."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, Trainer, TrainingArguments

from srlora_dist import SRLoRACallback, SRLoRAConfig
from tests.ranks.engines import Net, make_net

NUM_STEPS, ACCUMULATION, RATE, CLIP = 12, 2, 1e-2, 0.5
BATCH = 4  # of a micro-step, over all ranks
OPTIONS = {"target_rank": 10, "fusion_ratio": 0.5, "beta1": 0.8, "beta2": 0.6}  # switches after steps 4 and 8


class Judged(Net):
    """``Net`` as the Trainer wants a model: it computes its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PreTrainedConfig()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        answers = super().forward(x)
        return (
            {"logits": answers} if labels is None else {"loss": (answers - labels).square().mean(), "logits": answers}
        )


def make_model(**lora: object) -> nn.Module:
    return make_net(**{"base": Judged, **lora})


def samples(count: int = NUM_STEPS * ACCUMULATION * BATCH) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, 13, generator=generator)
    labels = torch.sin(x[:, :3] * 2) + x[:, 3:6]
    return [{"x": one, "labels": label} for one, label in zip(x, labels, strict=True)]


def make_arguments(folder: Path, **changes: object) -> TrainingArguments:
    options = {
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "num_train_epochs": 1,
        "max_grad_norm": CLIP,
        "learning_rate": RATE,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "label_names": ["labels"],
    }
    return TrainingArguments(str(folder), **{**options, **changes})


def make_trainer(
    folder: Path,
    model: nn.Module | None = None,
    *,
    options: dict | None = None,
    callbacks: tuple = (),
    **changes: object,
) -> tuple[Trainer, SRLoRACallback]:
    """A Trainer with the callback; ``options`` are added to those of SRLoRA, ``changes`` to the arguments."""
    callback = SRLoRACallback(SRLoRAConfig(svd_cache=str(folder.parent / "svd"), **OPTIONS, **(options or {})))
    trainer = Trainer(
        model=model or make_model(),
        args=make_arguments(folder, **changes),
        train_dataset=samples(),
        eval_dataset=samples(8),
        callbacks=[callback, *callbacks],
    )
    return trainer, callback


def switches(trainer: Trainer) -> list[int]:
    """The steps after which the Trainer's log has a switch."""
    return [entry["step"] for entry in trainer.state.log_history if "srlora_switch" in entry]
