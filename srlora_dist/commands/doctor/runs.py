"""Three steps of a tiny model through the real trainer on an engine, with a switch in them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from srlora_dist.commands.doctor.found import Found
from srlora_dist.commands.doctor.launch_file import num_launched
from srlora_dist.tasks.loading import quiet

LIMIT_SECONDS = 240
"""For one run; the first one on DeepSpeed compiles."""
END_SECONDS = 10
"""For the ranks of a run that is stopped."""
WORDS = ["the", "cat", "dog", "sat", "ran", "on", "a", "mat", "it", "was", "good", "bad", "not", "very", "we", "saw"]


def write_files(folder: Path) -> None:
    """A Llama of one layer with its tokenizer, and a text to train it on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special).save_pretrained(folder)
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes))
    with quiet():
        model.save_pretrained(folder)
    draw = random.Random(0)
    for name, count in (("train", 1024), ("validation", 8)):
        lines = (" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) for _ in range(count))
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def write_launch_file(folder: Path, engine: str, num_processes: int) -> Path:
    """An Accelerate file, and for DeepSpeed its own beside it, for the GPUs or, where there are none, the CPU."""
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED" if engine.startswith("zero") else "MULTI_GPU" if num_processes > 1 else "NO",
        "use_cpu": False,
        "num_machines": 1,
        "num_processes": num_processes,
        "main_process_port": 0,
    }
    if engine.startswith("zero"):
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        auto = dict.fromkeys((*sizes, "gradient_clipping"), "auto")
        zero, launch = {"stage": int(engine[4:])}, {}
        if engine == "zero3":
            # Small parameters would be kept whole, so that the cutting would not be tried.
            zero, launch = zero | {"stage3_param_persistence_threshold": 0}, {"zero3_init_flag": True}
        path = folder / f"{engine}.json"
        path.write_text(json.dumps({**auto, "zero_optimization": zero}))
        settings["deepspeed_config"] = {"deepspeed_config_file": str(path), **launch}
    if not torch.accelerator.is_available() and num_processes > 1:
        settings["gpu_ids"] = ",".join(["-1"] * num_processes)
    file = folder / f"{engine}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def try_run(folder: Path, file: Path, engine: str | None, limit: float = LIMIT_SECONDS) -> Found:
    """Three steps, of which the first is followed by a switch.

    Args:
        folder: With what :func:`write_files` wrote.
        file: File of Accelerate.
        engine: What has to run; None takes what the file gives.
        limit: Seconds.
    """
    num_processes = num_launched(file)
    output = folder / f"run-{file.stem}"
    options = {
        "task.name": "lm",
        "task.data_dir": folder,
        "task.max_length": 16,
        "model.name_or_path": folder,
        "lora.rank": 2,
        "lora.alpha": 2,
        "srlora.target_rank": 4,
        "srlora.svd_cache": folder / "svd",
        "train.max_steps": 3,
        "train.batch_size": 2 * num_processes,
        "train.eval_batch_size": 2 * num_processes,
        "train.eval_every": 3,
        "train.log_every": 1,
        "train.timeout": int(limit),
        "output_dir": output,
    } | ({"engine": engine} if engine else {})
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "-m", "srlora_dist"]
    began = time.perf_counter()
    status, text = _start([*command, "train", *(f"--{name}={value}" for name, value in options.items())], limit)
    seconds, name = time.perf_counter() - began, engine or file.name
    if status != 0:
        late = f"not done after {limit:.0f} s: " if status is None else ""
        remedy = "see what it waits for" if late else "fix that first"
        return Found("failed", f"{name}: {late}{_reason(text)}", f"{remedy}; SRLORA_DEBUG=1 shows all that it printed")
    summary = json.loads((output / "summary.json").read_text())
    switches = {json.loads(line)["switch"] for line in (output / "switches.jsonl").read_text().splitlines()}
    text = f"{summary['world_size']} x {summary['storage']}: 3 steps, {len(switches) - 1} switch, {seconds:.0f} s"
    if summary["world_size"] != num_processes or switches != {0, 1}:
        return Found("failed", f"{text}, where {num_processes} processes and 1 switch were asked for", "report this")
    return Found("ok", text)


def _start(command: list[str], limit: float) -> tuple[int | None, str]:
    """Exit status, None where the time was not enough, and all that was printed."""
    package = str(Path(__file__).parents[2])  # it may not be installed
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(END_SECONDS)
    with tempfile.TemporaryFile("w+") as printed:  # a pipe would stay open as long as any rank
        # A group of its own, for a launcher of one process leaves it behind when it ends.
        pipes = {"stdout": printed, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, env=environment, **pipes)
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
        printed.seek(0)
        text = printed.read()
    if status != 0 and os.environ.get("SRLORA_DEBUG"):
        sys.stderr.write(text)
    return status, text


def _end(process: subprocess.Popen) -> None:
    """End a launcher with its ranks, whatever it is doing."""
    if process.poll() is None:
        process.terminate()  # the launcher ends its ranks
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3 * END_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(text: str) -> str:
    """Our own line if there is one, else the first that looks like an error, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line.partition("srlora_dist: error: ")[2] for line in lines if "srlora_dist: error: " in line]
    errors = [line for line in lines if "Error" in line]
    return (ours or errors or lines[-1:] or ["it printed nothing"])[0]
