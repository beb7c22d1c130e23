"""Do all engines make the same choices? Launches the same training on each and compares slots and losses.

    python benchmarks/engines_agree.py --output_dir runs/agree [-- any option of launch/train.py]

Every run sees the same global batches with the model's dropout off. The table says for each engine whether it fused the
same slots as one process at every switch, and how far its training losses are away. Exit code 1 where slots differ or a
loss differs by more than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
# Engine, processes, and what replaces the stage3_param_persistence_threshold of ds_configs/zero3.json.
CASES = {
    "plain": ("cpu1", 1, None),
    "ddp": ("cpu2", 2, None),
    "zero1": ("zero1_cpu", 2, None),
    "zero2": ("zero2_cpu", 2, None),
    "zero3": ("zero3_cpu", 2, None),
    "zero3-partitioned": ("zero3_cpu", 2, 0),
    "zero3-persistent": ("zero3_cpu", 2, 10_000_000),
    "zero3-3-processes": ("zero3_cpu", 3, 0),
}


def launch_file(name: str, threshold: int | None, folder: Path) -> Path:
    """The Accelerate file of a case, with its own DeepSpeed file where the threshold is replaced."""
    path = ROOT / "launch" / "accelerate" / f"{name}.yaml"
    if threshold is None:
        return path
    launch = yaml.safe_load(path.read_text())
    engine = json.loads((ROOT / launch["deepspeed_config"]["deepspeed_config_file"]).read_text())
    engine["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    (folder / "deepspeed.json").write_text(json.dumps(engine))
    launch["deepspeed_config"]["deepspeed_config_file"] = str(folder / "deepspeed.json")
    (folder / "launch.yaml").write_text(yaml.safe_dump(launch))
    return folder / "launch.yaml"


def run(case: str, folder: Path, options: list[str]) -> dict:
    """Train on one engine; gives its slots by switch and site, its losses by step, and its storage."""
    name, num_processes, threshold = CASES[case]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(launch_file(name, threshold, folder)), "--num_processes", str(num_processes)]
    command += ["launch/train.py", "--output_dir", str(folder), "--engine", case.split("-")[0]]
    command += ["--model.dropout", "0", "--train.log_every", "1", *options]
    with (folder / "log.txt").open("w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    switches = [json.loads(line) for line in (folder / "switches.jsonl").read_text().splitlines()]
    return {
        "losses": {line["step"]: line["loss"] for line in lines if line["split"] == "train"},
        "slots": {(line["switch"], line["site"]): line["slots"] for line in switches},
        "storage": json.loads((folder / "summary.json").read_text())["storage"],
    }


def compare(mine: dict, theirs: dict, num_steps: int) -> tuple[int, float]:
    """How many (switch, site) choices differ, and the largest difference of the first losses."""
    keys = mine["slots"].keys() | theirs["slots"].keys()
    differing = sum(mine["slots"].get(key) != theirs["slots"].get(key) for key in keys)
    steps = [step for step in theirs["losses"] if step <= num_steps]
    return differing, max(abs(mine["losses"][step] - theirs["losses"][step]) for step in steps)


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "agree")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[case for case in CASES if "3-proc" not in case])
    parser.add_argument("--first_steps", type=int, default=50, help="steps whose losses are compared")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("options", nargs="*", help="options of launch/train.py, after --")
    arguments = parser.parse_args()
    base = run("plain", arguments.output_dir.resolve() / "plain", arguments.options)
    num_switches = len({switch for switch, _ in base["slots"]}) - 1
    print(f"{'engine':20} {'storage':8} {'choices that differ':>20} {'largest loss difference':>24}")
    failed = False
    for case in arguments.cases:
        seen = base if case == "plain" else run(case, arguments.output_dir.resolve() / case, arguments.options)
        differing, gap = compare(seen, base, arguments.first_steps)
        total = f"{differing} of {len(base['slots'])}"
        print(f"{case:20} {seen['storage']:8} {total:>20} {gap:24.2e}", flush=True)
        failed |= bool(differing) or gap > arguments.tolerance or seen["storage"] != case.split("-")[0]
    print(f"{num_switches} switches after the initialisation; losses of the first {arguments.first_steps} steps")
    sys.exit(failed)


if __name__ == "__main__":
    main()
