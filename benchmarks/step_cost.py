"""What does it cost a training step to follow importance? SRLoRA beside plain PEFT LoRA on the demo.

    python benchmarks/step_cost.py [--quick] [--batch-size 8] [--max-length 64] [--model FOLDER]

The same encoder, batch, optimizer and clipping; no switch falls into what is timed. One row for a step that is
observed, and one for the mean over a whole interval between switches, of which only ``importance_window: auto`` is.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from side_by_side import Row, alternate, arguments, device, medians, ratios, report, tiny_run
from torch import Tensor

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.config.run import ModelOptions, RunConfig, TaskOptions
from srlora_dist.method.budget import window_length
from srlora_dist.tasks.registry import load_task

INTERVAL = 500
"""Steps between switches; the paper's runs have hundreds to thousands."""


def make_batch(config: RunConfig, size: int) -> dict[str, Tensor]:
    """The first sentences of the demo."""
    task = load_task(config)
    return {name: tensor.to(device()) for name, tensor in task.collate([task.train[i] for i in range(size)]).items()}


def make_step(
    config: RunConfig, batch: dict[str, Tensor], window: int | str | None, cache: str
) -> tuple[Callable[[], None], Switcher | None]:
    """A training step of LoRA, or of SRLoRA with this ``importance_window``, and its switcher."""
    torch.manual_seed(0)
    task = load_task(config)
    lora = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type=task.peft_type)
    model = get_peft_model(task.model, lora).to(device())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    switcher = None
    if window is not None:
        # One switch, which is not reached.
        options = SRLoRAConfig(target_rank=16, importance_window=window, fusion_ratio=0.5, svd_cache=cache)
        switcher = Switcher(model, options, num_training_steps=10**6)
        switcher.bind(model, optimizer)
    model.train()

    def step() -> None:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if switcher is not None:
            switcher.step()

    return step, switcher


def main() -> None:
    """Time the three kinds of step in turn, and report."""
    options = arguments(
        *(__doc__,),
        batch_size={"type": int, "default": 8},
        max_length={"type": int, "default": 64},
        model={"default": None, "help": "folder of another encoder"},
    )
    torch.set_num_threads(1)
    task, model = TaskOptions(max_length=options.max_length), ModelOptions(name_or_path=options.model, dropout=0.0)
    with tempfile.TemporaryDirectory() as cache:
        if options.tiny:
            tiny_run(Path(cache))
            task, model = (
                TaskOptions("lm", cache, max_length=16, max_train_samples=8, max_eval_samples=4),
                ModelOptions(name_or_path=cache, dropout=0.0),
            )
        config = RunConfig(task=task, model=model)
        batch = make_batch(config, options.batch_size)
        steps = {"LoRA": None, "observed": "all", "not observed": 1}
        made = {name: make_step(config, batch, window, cache) for name, window in steps.items()}
        rounds, warm_up = 2 if options.tiny else 40 if options.quick else 300, 3
        seconds = alternate({name: step for name, (step, _) in made.items()}, rounds, warm_up)
    added = made["observed"][1].tracking_seconds / (rounds + warm_up)
    length = window_length("auto", 0.85, 0.85)
    observed, outside = (ratios(seconds[name], seconds["LoRA"]) for name in ("observed", "not observed"))
    share = length / INTERVAL
    case = f"demo encoder, batch {options.batch_size} x {batch['input_ids'].shape[1]} tokens, rank 8"
    common = {"peer": "plain PEFT LoRA", "seconds": medians(seconds)}
    rows = [
        Row("a step that is observed", "SRLoRA, window all", case=case, ratios=observed, target=1.02, **common),
        Row(
            *("a step that is observed, by the seconds that are added", "SRLoRA, window all"),
            case=case,
            ratios=[1 + added / each for each in seconds["LoRA"]],
            target=1.02,
            more={"seconds added": added},
            **common,
        ),
        Row(
            *("a step, mean over an interval", f"SRLoRA, window auto ({length} of {INTERVAL} steps)"),
            case=case,
            ratios=[share * a + (1 - share) * b for a, b in zip(observed, outside, strict=True)],
            target=1.01,
            more={"outside of the window": statistics.median(outside)},
            **common,
        ),
    ]
    report("step_cost", rows, options)


if __name__ == "__main__":
    main()
