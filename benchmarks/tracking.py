"""How long does it take to follow the importance of every pair? Ours beside PEFT's AdaLoRA on the same layers.

    python benchmarks/tracking.py [--quick] [--hidden 768] [--layers 12] [--rank 8]

Both keep two moving averages an element of A and B. PEFT's ``RankAllocator.update_ipt`` does all of it on every rank;
here a rank follows the sites that were dealt to it. Under DDP, on 1 and 2 processes of one thread each, with the window
wide open: between windows ours does nothing at all. On a GPU it runs in one process.
"""

from __future__ import annotations

import tempfile
from functools import partial

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from side_by_side import Row, alternate, arguments, device, medians, ratios, report
from torch import nn
from transformers import BertConfig, BertModel

from srlora_dist import SRLoRAConfig, Switcher
from tests.ranks.world import run_ranks

TARGETS = {1: 3.0, 2: 5.0}


def adapted(config: LoraConfig, hidden: int, layers: int) -> nn.Module:
    """An encoder with random weights under an adapter, its trained parameters with random gradients."""
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 12}
    model = get_peft_model(BertModel(BertConfig(**shape, intermediate_size=4 * hidden)), config).to(device())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    return model


def measure(rank: int, world_size: int, rounds: int, hidden: int, layers: int, pairs: int, cache: str) -> dict:  # noqa: ARG001
    """Seconds of each contender on this rank, and the bytes of its moving averages."""
    common = {"lora_alpha": pairs, "target_modules": "all-linear"}
    peer = adapted(AdaLoraConfig(init_r=pairs, target_r=pairs // 2, total_step=1000, **common), hidden, layers)
    allocator = peer.base_model.rankallocator
    model = adapted(LoraConfig(r=pairs, **common), hidden, layers)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = SRLoRAConfig(target_rank=2 * pairs, importance_window="all", svd_cache=cache)
    switcher = Switcher(model, options, num_training_steps=100)
    switcher.bind(model, torch.optim.AdamW(trained))
    contenders = {
        "ours": partial(switcher.statistics.observe_, trained),
        "AdaLoRA": partial(allocator.update_ipt, peer),
    }
    theirs = sum(p.nbytes for name, p in peer.named_parameters() if "lora_" in name)
    bytes_held = {"ours_bytes": switcher.statistics.num_bytes, "peer_bytes": 3 * theirs}
    return alternate(contenders, rounds) | bytes_held


def speed(num_ranks: int, seen: list[dict], case: str) -> Row:
    """The slowest rank of each round counts."""
    names = ("ours", "AdaLoRA")
    slowest = {name: [max(times) for times in zip(*(each[name] for each in seen), strict=True)] for name in names}
    held = max(each["ours_bytes"] for each in seen) / 2**20, seen[0]["peer_bytes"] / 2**20
    return Row(
        question=f"tracking alone, {num_ranks} rank(s)",
        ours="moving averages of a rank's own runs",
        peer="PEFT AdaLoRA's update_ipt",
        case=case,
        ratios=ratios(slowest["AdaLoRA"], slowest["ours"]),
        bound="at least",
        target=TARGETS[num_ranks],
        seconds=medians(slowest),
        more=dict(zip(("MiB a rank", "MiB a rank of AdaLoRA"), held, strict=True)),
    )


def memory(alone: dict, seen: list[dict], case: str) -> Row:
    """Of the fullest rank, times the number of ranks, over that of one rank alone."""
    share = max(each["ours_bytes"] for each in seen) * len(seen) / alone["ours_bytes"]
    question = "memory of a rank for tracking, of 1 / N"
    return Row(question, f"{len(seen)} ranks", "1 rank", f"ddp, {len(seen)} ranks, {case}", [share], target=1.05)


def main() -> None:
    """Run on one and two ranks, and report."""
    options = arguments(
        *(__doc__,),
        hidden={"type": int, "default": 768},
        layers={"type": int, "default": 12},
        rank={"type": int, "default": 8},
    )
    hidden, layers = (48, 1) if options.tiny else (384, 6) if options.quick else (options.hidden, options.layers)
    case = f"one thread, {layers} layers of {hidden}, rank {options.rank}"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        work = (2 if options.tiny else 50 if options.quick else 200, hidden, layers, options.rank, cache)
        alone = measure(0, 1, *work)
        rows = [speed(1, [alone], case)]
        if device().type == "cpu":
            seen = run_ranks(measure, 2, *work, timeout=600, last=True)
            rows += [speed(2, seen, case), memory(alone, seen, case)]
    report("tracking", rows, options)


if __name__ == "__main__":
    main()
