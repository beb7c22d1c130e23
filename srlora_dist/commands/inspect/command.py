"""``srlora inspect`` shows a checkpoint: sites, ranks, directions taken, score history; no model, no GPU."""

from __future__ import annotations

import json
from pathlib import Path

from srlora_dist.commands.arguments import Arguments
from srlora_dist.engine.process import prepare_process


def run(argv: list[str]) -> None:
    """Print it.

    Raises:
        ValueError: There is no good checkpoint, or no such site in it.
    """
    parser = Arguments("inspect", "Show what a checkpoint holds and how its run went.")
    parser.add_argument("folder", type=Path, help="a checkpoint, a folder of them, or the output folder of a run")
    parser.add_argument("--site", help="one site in detail, by its name")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse(argv)
    prepare_process()
    from srlora_dist.commands.inspect.describe import describe_checkpoint, describe_site, open_checkpoint

    checkpoint = open_checkpoint(options.folder)
    if options.site is not None:
        what, show = describe_site(checkpoint, options.site), _site_text
    else:
        what, show = describe_checkpoint(checkpoint), _text
    print(json.dumps(what, indent=1) if options.json else show(what))


def _text(what: dict) -> str:
    made_on, sizes = what["made_on"], what["bytes"]
    lines = [
        f"{what['folder']}: step {what['step']}, {what['method'] or 'a loop of your own'}, made on "
        f"{made_on['world_size']} x {made_on['storage']}, every file as its manifest says",
        f"pretrained weights: {what['weights']}",
        *_schedule_lines(what["schedule"]),
        f"{sum(sizes.values()) / 1e6:.2f} MB: " + ", ".join(f"{k} {v / 1e6:.2f}" for k, v in sizes.items()),
        "",
        *_site_table(what["sites"]),
    ]
    if what["scores"]:
        lines += ["", f"{'switch':>6}{'step':>8}{'mean score':>14}{'lowest':>12}{'highest':>12}"]
        lines += [
            f"{row['switch']:>6}{row['step']:>8}{row['mean']:>14.3e}{row['min']:>12.2e}{row['max']:>12.2e}"
            for row in what["scores"]
        ]
        lines += ["", _retired_line(what["retired"])]
    return "\n".join(lines)


def _schedule_lines(schedule: dict) -> list[str]:
    if schedule["steps"] is None:
        return ["no switches: the method makes none"]
    came = ", ".join(map(str, schedule["made"])) or "not noted"
    if schedule["to_come"] is None:
        rest = "the checkpoint does not say which are to come"
    else:
        rest = f"to come: {', '.join(map(str, schedule['to_come'])) or 'none'}"
    return [f"{schedule['steps']} steps, {schedule['num_made']} switches made, after steps {came}; {rest}"]


def _site_table(sites: list[dict]) -> list[str]:
    width = max(len(site["name"]) for site in sites)
    lines = [f"{'site':{width}}{'shape':>14}{'rank':>6}{'target':>8}{'taken':>7}{'fused':>7}  last slots"]
    for site in sites:
        shape = " x ".join(map(str, site["shape"]))
        numbers = f"{site['rank']:>6}{site['target_rank']:>8}{site['num_taken']:>7}{site['num_fused']:>7}"
        lines.append(f"{site['name']:{width}}{shape:>14}{numbers}  {' '.join(map(str, site['last_slots']))}")
    return lines


def _retired_line(retired: dict[str, list[int]]) -> str:
    times = {(site, slot): count for site, counts in retired.items() for slot, count in enumerate(counts)}

    def tell(count: int) -> str:
        (site, slot), *others = [place for place, each in times.items() if each == count]
        return f"{count} x slot {slot} of {site}" + (f" and {len(others)} more" if others else "")

    return f"retired most often: {tell(max(times.values()))}; least often: {tell(min(times.values()))}"


def _site_text(site: dict) -> str:
    shape = " x ".join(map(str, site["shape"]))
    lines = [
        f"{site['name']}: {shape}, rank {site['rank']}, scale {site['scale']:g}, {site['num_taken']} of "
        f"{site['target_rank']} directions taken, {site['num_fused']} pairs fused",
        "",
        f"{'slot':>4}{'direction':>11}{'retired':>9}{'last score':>13}",
    ]
    scores = next((part["scores"] for part in reversed(site["switches"]) if part["scores"]), [])
    for slot, (direction, count) in enumerate(zip(site["held"], site["retired"], strict=True)):
        score = f"{scores[slot]:>13.3e}" if scores else f"{'-':>13}"
        lines.append(f"{slot:>4}{direction if direction >= 0 else '-':>11}{count:>9}{score}")
    for part in site["switches"]:
        slots, old, new = (" ".join(map(str, part[key])) for key in ("slots", "directions", "new_directions"))
        lines += [""] * (part is site["switches"][0])
        lines.append(
            f"step {part['step']}, switch {part['switch']}: slots {slots}; directions {old or '-'} -> {new or '-'}"
        )
    return "\n".join(lines)
