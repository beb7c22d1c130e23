"""Puts a plan together, as numbers and as Markdown tables."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

from srlora_dist.commands.plan.blueprint import build_blueprint
from srlora_dist.commands.plan.communication import Message, start_up, switches
from srlora_dist.commands.plan.memory import Forecast
from srlora_dist.commands.plan.roofline import DEVICES, estimate
from srlora_dist.config.run import RunConfig


def make_plan(config: RunConfig, world_size: int, persistence_threshold: int | None, device: str) -> dict[str, object]:
    """All that ``srlora plan`` prints, in bytes and seconds.

    Args:
        config: The options of the run; the engine must be named.
        world_size: Number of ranks.
        persistence_threshold: See ``PlanOptions``.
        device: One of ``DEVICES``.

    Raises:
        ValueError: The model is not known, or an option does not fit it.
    """
    blueprint = build_blueprint(config, world_size, persistence_threshold)
    forecast = Forecast(blueprint)
    sent = switches(blueprint)
    largest, model_bytes = forecast.largest_rank(), forecast.model_bytes()
    later = max(sent[1:], key=lambda messages: sum(message.num_bytes for message in messages), default=[])
    where = f"{config.model.name_or_path} in {config.model.stored_as} on {config.engine}, {world_size} ranks"
    return {
        "run": f"{where}, r={config.lora.rank}, target {config.srlora.num_directions}",
        "optimizer": config.train.optimizer,
        "sites": len(blueprint.sites),
        "trained_parameters": sum(parameter.numel() for parameter in forecast.trained),
        "model_bytes": model_bytes,
        "switch_steps": blueprint.due_steps,
        "held": {f"rank {number}": _held(forecast, number) for number in dict.fromkeys((0, largest))},
        "largest_rank": largest,
        "on_disk": {
            "last checkpoint": forecast.checkpoint_bytes(len(sent) - 1),
            "largest checkpoint": forecast.largest_checkpoint(),
            "file of directions": forecast.directions_bytes(),
        },
        "wire": {
            "start-up, cold": _counted(start_up(blueprint, cold=True)),
            "start-up, directions on disk": _counted(start_up(blueprint, cold=False)),
            "switch 0": _counted(sent[0]),
            "a later switch": _counted(later),
        },
        "device": device,
        "seconds": asdict(estimate(forecast, DEVICES[device])),
    }


def _held(forecast: Forecast, rank: int) -> dict[str, int]:
    held = forecast.held(rank)
    return asdict(held) | {"device_total": held.device_total}


def _counted(messages: list[Message]) -> list[dict[str, object]]:
    """Messages of one kind and purpose together, in the order of the first."""
    totals: Counter[tuple[str, str]] = Counter()
    for message in messages:
        totals[message.kind, message.what] += message.num_bytes
    counts = Counter((message.kind, message.what) for message in messages)
    return [
        {"kind": kind, "what": what, "count": counts[kind, what], "bytes": size}
        for (kind, what), size in totals.items()
    ]


def as_tables(plan: dict[str, object]) -> str:
    """For a terminal, and for a Markdown file."""
    steps = ", ".join(map(str, plan["switch_steps"])) or "none"
    lines = [
        f"{plan['run']}: {plan['sites']} sites, {plan['trained_parameters']:,} trained parameters, pretrained model "
        f"{_size(plan['model_bytes'])}. Switches after steps: {steps}.",
        "",
        *_held_table(plan),
        "",
        *_wire_table(plan["wire"]),
        "",
        *_seconds_table(plan),
    ]
    return "\n".join(lines)


def _held_table(plan: dict[str, object]) -> list[str]:
    ranks = plan["held"]
    titles = [f"{name}, the largest" if name == f"rank {plan['largest_rank']}" else name for name in ranks]
    lines = [f"| bytes held | {' | '.join(titles)} |", "|---|" + "---:|" * len(ranks)]
    notes = {
        "optimizer_state": f" ({plan['optimizer']})",
        "moving_averages": " (SRLoRA)",
        "residual": " (SRLoRA, second 16-bit term)",
        "second_adapter": " (SRLoRA, for quantised weights)",
        "during_switch": " (SRLoRA, directions and factors)",
        "ledger": " (SRLoRA, host memory, 0 with srlora.ledger_dir)",
    }
    first = next(iter(ranks.values()))
    order = [name for name in first if name not in ("ledger", "device_total")]
    for name in (*order, "device_total", "ledger"):
        label = name.replace("_", " ") + notes.get(name, "")
        cells = [_size(held[name]) for held in ranks.values()]
        lines.append(f"| {_bold(label, *cells) if name == 'device_total' else ' | '.join((label, *cells))} |")
    for name, size in plan["on_disk"].items():
        share = f"{_size(size)} ({size / plan['model_bytes']:.1%} of the model)"
        cells = [share if rank == "rank 0" else "" for rank in ranks]
        lines.append(f"| {name}, on disk | {' | '.join(cells)} |")
    return lines


def _wire_table(phases: dict[str, list[dict[str, object]]]) -> list[str]:
    lines = ["| bytes that a rank hands to collectives | collectives | bytes |", "|---|---|---:|"]
    for phase, messages in phases.items():
        total = sum(message["bytes"] for message in messages)
        count = sum(message["count"] for message in messages)
        lines.append(f"| {_bold(phase, f'{count} in all', _size(total))} |")
        for message in messages:
            if message["bytes"] * 100 >= total:  # what counts
                how_often = f"{message['count']} x {message['kind']}"
                lines.append(f"| {message['what']} | {how_often} | {_size(message['bytes'])} |")
    return [*lines, f"| {_bold('between switches, beyond what LoRA sends', '0 in all', '0 B')} |"]


def _seconds_table(plan: dict[str, object]) -> list[str]:
    labels = {
        "digests": "digests of W, at each start",
        "directions": "SVD on rank 0, only before the first run on a model",
        "start_up_wire": "messages of a cold start-up",
        "first_switch": "switch 0",
        "later_switch": "a later switch",
    }
    lines = [f"| estimate, not measured | {plan['device']} |", "|---|---:|"]
    return lines + [f"| {label} | {_time(plan['seconds'][name])} |" for name, label in labels.items()]


def _bold(*cells: str) -> str:
    return " | ".join(f"**{cell}**" for cell in cells)


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes} B"


def _time(seconds: float) -> str:
    if seconds >= 120:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
