"""``--train.max_steps 2`` on the default target rank: the run ends, with a warning and the switches that fit."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from tests.launch.conftest import Bench, Case
from tests.launch.forks import lines


def test_a_run_of_a_few_steps_ends_and_is_resumed(bench: Bench) -> None:
    short = {"srlora__target_rank": "null", "checkpoint__every": 1, "checkpoint__keep": 3}
    middle = bench.run_folder("few 3") / "checkpoints" / "step-1"
    cases = {
        "few 1": Case(bench.arguments("few 1", train__max_steps=1, **short)),
        "few 3": Case(bench.arguments("few 3", train__max_steps=3, **short)),
        "few rest": Case(bench.arguments("few rest", train__max_steps=3, checkpoint__resume=middle, **short)),
        "few asked": Case(bench.arguments("few asked", train__max_steps=3, **short | {"srlora__target_rank": 32})),
    }
    ended = bench.run_all(cases)
    asked = ended.pop("few asked")
    assert asked.returncode == 1
    assert "srlora.target_rank asks for 14 switches in 3 steps: train longer, lower target_rank" in asked.errors[0]
    for name, switches in (("few 1", []), ("few 3", [1, 2]), ("few rest", [2])):
        assert ended[name].returncode == 0, ended[name].stderr[-3000:]
        num_steps = 1 if name == "few 1" else 3
        fewer = f"asks for 14 switches in {num_steps} steps, and as many as fit are made: {num_steps - 1}"
        assert fewer in ended[name].stderr
        made = {line["step"] for line in lines(bench.run_folder(name) / "switches.jsonl")}
        assert sorted(made - {0}) == switches
        assert json.loads((bench.run_folder(name) / "summary.json").read_text())["steps"] == num_steps
    whole, rest = (
        load_file(bench.run_folder(name) / "adapter_last" / "adapter_model.safetensors")
        for name in ("few 3", "few rest")
    )
    assert all(torch.equal(rest[key], whole[key]) for key in whole)
