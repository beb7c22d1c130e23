"""The shape of the code base: imports point one way, and only storage/ knows about ranks and engines."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "srlora_dist"

# A room may import from its own line and from the lines below it.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["commands"],
    ["reproduce"],
    ["trainer", "callback"],
    ["keeper", "best_adapter"],
    ["forecast"],
    ["inspection", "merging", "health"],
    ["figures", "runlog", "methods", "engine", "plan", "tasks", "precision", "resuming", "preemption", "earlier"]
    + ["evaluation", "summary", "outcome", "optimizers", "token_mean", "deepspeed_file"]
    + ["launched"],
    ["switcher"],
    ["first_batch"],
    ["first_switch"],
    ["memory", "diagnostics", "exchange", "output_check", "saving", "observer"],
    ["watch", "agreement", "rehearsal"],
    ["export"],
    ["agenda"],
    ["targets"],
    ["svd", "importance", "changes", "pair_steps", "fused", "training_state", "checkpoint"]
    + ["export_parts", "adapter_files"],
    ["tracked"],
    ["ledger", "postponed", "schedule", "original", "krylov", "settling", "direction_file", "base_label", "base_parts"],
    ["storage"],
    ["pairs", "sites", "digest", "spans"],
    ["bypassed", "random_state"],
    ["adapters"],
    ["config"],
    ["srlora_config"],
    ["options_file", "ranges", "safefiles", "cache", "errors", "compiling", "paper", "process", "arguments"]
    + ["live_pairs", "trainer_arguments", "matmul", "folder_lock", "alone"],
]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_point_one_way() -> None:
    level = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        if room == "__init__":
            continue
        assert room in level, f"{room} has no place in LAYERS"
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "srlora_dist" and len(parts) > 1 and parts[1] in level and parts[1] != room:
                assert level[parts[1]] >= level[room], f"{room} imports {parts[1]}, against the order"


def test_only_the_seam_knows_ranks_and_engines() -> None:
    for path in PACKAGE.rglob("*.py"):
        if room_of(path) != "storage":
            for name in imports(path):
                foreign = name.split(".")[0] in ("deepspeed", "bitsandbytes") or name.startswith("torch.distributed")
                assert not foreign, f"{path.name} imports {name}"
