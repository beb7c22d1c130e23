"""What does SRLoRA cost a whole fine-tune, and how large are its checkpoints? Beside PiSSA in the same trainer.

    python benchmarks/fine_tune.py [--quick] [--rounds 5] [-- any option of launch/train.py]

PiSSA is SRLoRA without switches: the same directions, data, steps and seed. What is compared is initialisation
(singular value decompositions with an empty cache) and training with what SRLoRA adds: moving averages and switches.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from side_by_side import Row, arguments, medians, ratios, report, tiny_run

from srlora_dist.commands.plan.command import PlanOptions
from srlora_dist.commands.plan.report import make_plan
from srlora_dist.config.parse import parse
from srlora_dist.config.run import RunConfig
from srlora_dist.training.run import train

QUICK = {"train.max_steps": 60, "train.batch_size": 8, "task.max_length": 32, "task.max_eval_samples": 32}
REASON = "short steps, few of them for 5 switches: 160 steps of 32 samples gain 0.8% by the seconds of `make demo`"


def run(method: str, folder: Path, options: list[str]) -> dict[str, object]:
    """Train from nothing, with a cache that is empty, and give the summary."""
    shutil.rmtree(folder, ignore_errors=True)
    places = ["--output_dir", str(folder), "--srlora.svd_cache", str(folder / "svd")]
    config: RunConfig = parse(["--method", method, "--checkpoint.resume", "never", *places, *options])
    return train(config)


def main() -> None:
    """Train with both methods in turn, and report."""
    extra = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    del sys.argv[len(sys.argv) - len(extra) - bool(extra) :]
    options = arguments(__doc__, rounds={"type": int, "default": 5})
    rounds = 1 if options.tiny else 2 if options.quick else options.rounds
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"srlora": [], "pissa": []}
    with tempfile.TemporaryDirectory() as folder:
        sizes = tiny_run(Path(folder) / "files") if options.tiny else QUICK if options.quick else {}
        extra = [*(f"--{name}={value}" for name, value in sizes.items()), *extra]
        run("srlora", Path(folder) / "warm-up", [*extra, "--train.max_steps=6"])
        for number in range(rounds):
            for method in ("srlora", "pissa") if number % 2 else ("pissa", "srlora"):
                summary = run(method, Path(folder) / method, extra)
                seconds[method].append(summary["train_seconds"] + summary["svd_seconds"])
                if method == "srlora":
                    ours = summary
    case = f"task {ours['task']}, {ours['steps']} steps"
    parts = {f"{name} seconds": ours[f"{name}_seconds"] for name in ("svd", "switch", "tracking")}
    rows = [
        Row(
            question="whole fine-tune",
            ours="SRLoRA: directions, moving averages, switches",
            peer="PiSSA in the same trainer",
            case=case,
            ratios=ratios(seconds["srlora"], seconds["pissa"]),
            target=1.03,
            seconds=medians(seconds),
            more=parts,
            reason=REASON,
        ),
        Row(
            question="whole fine-tune, by the seconds that are added",
            ours="SRLoRA: moving averages, switches",
            peer="PiSSA in the same trainer",
            case=case,
            ratios=[1 + (parts["switch seconds"] + parts["tracking seconds"]) / each for each in seconds["pissa"]],
            target=1.03,
            more=parts,
            reason=REASON,
        ),
        Row(
            question="bytes of a checkpoint",
            ours="adapter, moments, averages and ledger",
            peer="the pretrained model",
            case=f"{case}, rank 8, 28 directions taken",
            ratios=[ours["checkpoint_bytes"] / ours["model_bytes"]],
            target=0.03,
            reason="the share falls with the width of the model, and this one is 384 wide (see srlora plan)",
        ),
    ]
    report("fine_tune", [*rows, planned(8, 32), planned(16, 64)], options)


def planned(rank: int, target_rank: int) -> Row:
    """The largest checkpoint of a large model, counted and not written."""
    options = PlanOptions(model="llama-70b", engine="zero3", world_size=64, rank=rank, target_rank=target_rank)
    plan = make_plan(options.run_config(), options.world_size, options.persistence_threshold, options.device)
    return Row(
        question="bytes of a checkpoint",
        ours="adapter, moments, averages and ledger",
        peer="the pretrained model",
        case=f"planned: 70 billion parameters in {options.dtype}, rank {options.rank}, target {options.target_rank}",
        ratios=[plan["on_disk"]["largest checkpoint"] / plan["model_bytes"]],
        target=0.03,
        reason="it grows with the rank and the directions taken, and 16-bit models are half as large",
    )


if __name__ == "__main__":
    main()
