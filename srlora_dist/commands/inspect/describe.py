"""What a checkpoint says of its run: sites, schedule, sizes, and how the scores went; no weights are loaded."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from safetensors import SafetensorError

from srlora_dist.checkpoint.format import LEDGER, Checkpoint, find_checkpoint
from srlora_dist.checkpoint.ledger_files import read_metadata
from srlora_dist.errors import shorten_list


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint that a user means by a folder: it, the last good one in it, or that of the run in it.

    Raises:
        ValueError: There is none, or none that is good.
    """
    inner = folder / "checkpoints"
    checkpoint = find_checkpoint(inner if inner.is_dir() else folder)
    if checkpoint is None:
        raise ValueError(
            f"there is no checkpoint in {folder}: give a checkpoint, a folder of them, or the output folder of a run "
            "that wrote one"
        )
    return checkpoint


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, object]:
    """All that the command shows, as JSON can hold it.

    Returns:
        ``sites`` with their ranks, directions and slots; ``schedule`` of the switches; ``bytes`` by part; ``scores``, a
        row per switch; ``retired``, how often each slot of each site was.

    Raises:
        ValueError: The state lacks something.
    """
    state = checkpoint.state
    try:
        switches = _switches(checkpoint)
        retired = {site["name"]: [0] * site["rank"] for site in state["sites"]}
        for switch in switches:
            for site in switch["sites"]:
                for slot in site["slots"] if site["scores"] else ():
                    retired[site["site"]][slot] += 1
        return {
            "folder": str(checkpoint.folder),
            "step": checkpoint.step,
            "method": _options(state).get("method"),
            "made_on": {"storage": state["storage"], "world_size": state["world_size"]},
            "weights": state["weights"],
            "schedule": _schedule(state, switches),
            "bytes": _sizes(checkpoint),
            "sites": [_site(site, switches) for site in state["sites"]],
            "scores": [_scores(switch) for switch in switches if any(site["scores"] for site in switch["sites"])],
            "retired": retired,
        }
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{checkpoint.folder} is not the state of a run ({error!r})") from error


def describe_site(checkpoint: Checkpoint, name: str) -> dict[str, object]:
    """One site in detail: what its slots hold, and what each switch did there.

    Raises:
        ValueError: There is no such site.
    """
    whole = describe_checkpoint(checkpoint)
    names = [site["name"] for site in whole["sites"]]
    if name not in names:
        near = [known for known in names if name in known] or names
        raise ValueError(f"the checkpoint has no site {name!r}: choose one of {shorten_list(near)}")
    number = names.index(name)
    parts = [
        {"step": switch["step"], "switch": switch["switch"], **site}
        for switch in _switches(checkpoint)
        for site in switch["sites"]
        if site.pop("site") == name
    ]
    site = whole["sites"][number] | {"scale": checkpoint.state["sites"][number]["scale"]}
    return site | {"retired": whole["retired"][name], "switches": parts}


def _options(state: dict) -> dict:
    """The options of the trainer; a checkpoint of another loop has none."""
    return state.get("extra", {}).get("config", {})


def _switches(checkpoint: Checkpoint) -> list[dict]:
    """The report of each switch up to the checkpoint; [] in one of a version that did not keep them."""
    try:
        return [json.loads(read_metadata(path)["report"]) for path in checkpoint.ledger]
    except (SafetensorError, KeyError):
        return []


def _schedule(state: dict, switches: list[dict]) -> dict[str, object]:
    """Steps of the run, of the switches that were made (switch 0 is the start), and of those to come."""
    if "num_switches" not in state:
        return {"steps": None, "num_made": 0, "made": [], "to_come": []}
    due = state.get("due_steps")
    to_come = [step for step in due if step > state["num_steps"]] if due is not None else None
    made = [switch["step"] for switch in switches]
    steps = state["num_training_steps"]
    return {"steps": steps, "num_made": state["num_switches"], "made": made, "to_come": to_come}


def _sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of the files by what they hold."""
    sizes: Counter[str] = Counter()
    for name, count in checkpoint.sizes.items():
        path = Path(name)
        part = LEDGER if name.startswith(f"{LEDGER}/") else path.stem
        sizes[part if path.suffix == ".safetensors" else "state"] += count
    return dict(sizes.most_common())


def _site(site: dict, switches: list[dict]) -> dict[str, object]:
    last = next((part for switch in reversed(switches) for part in switch["sites"] if part["site"] == site["name"]), {})
    keys = ("name", "shape", "rank", "target_rank", "num_taken")
    held = site["held"] or [-1] * site["rank"]  # other methods take no directions
    num_first = min(site["rank"], site["target_rank"])
    fused = max(0, site["num_taken"] - num_first)
    return {**{key: site[key] for key in keys}, "held": held, "num_fused": fused, "last_slots": last.get("slots", [])}


def _scores(switch: dict) -> dict[str, object]:
    scores = [score for site in switch["sites"] for score in site["scores"]]
    figures = {"mean": sum(scores) / len(scores), "min": min(scores), "max": max(scores)}
    return {"switch": switch["switch"], "step": switch["step"], **figures}
