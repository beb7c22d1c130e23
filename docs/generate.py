"""Writes what the documentation takes from the code: the rooms, the table of files, the table of options.

``python docs/generate.py`` rewrites the marked parts of architecture.md and loop.md, and figures/rooms.svg. A test
compares them with what this script would write, so run it after a change of modules, of imports or of SRLoRAConfig.
"""

from __future__ import annotations

import ast
import math
import re
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, DOCS = ROOT / "srlora_dist", ROOT / "docs"

ROOMS = ["commands", "training", "method", "checkpoint", "storage", "layers", "engine", "tasks", "config"]
"""In the order of the page."""

GROUND = ["config", "errors"]
"""Every room may import these, so the picture leaves their arrows out."""

PLACES = {
    "commands": (0, 1),
    "training": (1, 1),
    "tasks": (2, 0),
    "method": (2, 1),
    "engine": (2, 2),
    "checkpoint": (3, 1),
    "storage": (4, 1),
    "layers": (5, 1),
}
"""Row and column of each room in the picture."""

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 270, 80, 34, 34, 16


def sentence_of(path: Path) -> str:
    """The first paragraph of a module's docstring, as Markdown on one line."""
    text = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    return as_markdown(text)


def as_markdown(text: str) -> str:
    """A piece of a docstring on one line, with Markdown's backticks."""
    text = re.sub(r":\w+:`~?\.*([^`]+)`", r"`\1`", " ".join(text.split()))
    return text.replace("``", "`").replace("|", r"\|")


def imported_rooms(path: Path) -> set[str]:
    """The rooms out of which a module imports."""
    tree = ast.walk(ast.parse(path.read_text()))
    modules = [node.module for node in tree if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[1] for name in modules if name.startswith("srlora_dist.")}


def arrows() -> dict[str, set[str]]:
    """For each room, the rooms that its modules import."""
    return {
        room: set().union(*(imported_rooms(path) for path in (PACKAGE / room).rglob("*.py"))) - {room} for room in ROOMS
    }


def shortest_arrows() -> list[tuple[str, str]]:
    """The arrows that do not follow from others, in the order of the page; without those to the ground floor."""
    found = {room: others - set(GROUND) for room, others in arrows().items()}

    def reaches(start: str, end: str) -> bool:
        return any(other == end or reaches(other, end) for other in found[start])

    return [
        (room, other)
        for room in ROOMS
        for other in ROOMS
        if other in found[room] and not any(reaches(between, other) for between in found[room] - {other})
    ]


def draw_rooms() -> str:
    """The picture of the rooms, as SVG."""
    width = 3 * WIDTH + 2 * GAP_X + 2 * MARGIN
    rows = 1 + max(row for row, _ in PLACES.values())
    height = (rows + 1) * HEIGHT + rows * GAP_Y + 2 * MARGIN

    def corner(room: str) -> tuple[int, int]:
        row, column = PLACES[room]
        return MARGIN + column * (WIDTH + GAP_X), MARGIN + row * (HEIGHT + GAP_Y)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12.5" fill="#1f2328">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for start, end in shortest_arrows():
        (x, y), (to_x, to_y) = corner(start), corner(end)
        way = [(x + WIDTH // 2, y + HEIGHT), (to_x + WIDTH // 2, to_y)]
        if PLACES[end][0] != PLACES[start][0] + 1:  # around the rooms that lie between
            side, middle = to_x + WIDTH if x > to_x else to_x, to_y + HEIGHT // 2
            way = [way[0], (way[0][0], middle), (side, middle)]
        lines += draw_arrow(way)
    for room in PLACES:
        lines += draw_box(room, sentence_of(PACKAGE / room / "__init__.py"), *corner(room), WIDTH)
    bottom = height - MARGIN - HEIGHT
    sentence = (
        f"{sentence_of(PACKAGE / 'config' / '__init__.py')} {sentence_of(PACKAGE / 'errors.py')} "
        "Every room above may import these two; they import nothing of ours."
    )
    lines += draw_box("config, errors", sentence, MARGIN, bottom, width - 2 * MARGIN)
    return "\n".join([*lines, "</svg>", ""])


def draw_arrow(way: list[tuple[int, int]]) -> list[str]:
    """A line through these points, with a tip at the last one."""
    (before_x, before_y), (x, y) = way[-2:]
    angle = round(math.degrees(math.atan2(y - before_y, x - before_x)))
    points = " ".join(f"{x},{y}" for x, y in way)
    return [
        f'<polyline points="{points}" fill="none" stroke="#57606a" stroke-width="1.5"/>',
        f'<path d="M0 0 L-9 -4 L-9 4 z" fill="#57606a" transform="translate({x} {y}) rotate({angle})"/>',
    ]


def draw_box(name: str, sentence: str, x: int, y: int, width: int) -> list[str]:
    """A room: its name, and what it is for on at most three lines."""
    texts = textwrap.wrap(sentence.replace("`", ""), width // 6)
    lines = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{HEIGHT}" rx="7" fill="#ddf4ff" stroke="#0969da"/>',
        f'<text x="{x + 12}" y="{y + 20}" font-weight="bold" font-size="14">{name}</text>',
    ]
    return lines + [f'<text x="{x + 12}" y="{y + 38 + 16 * k}">{escape(text)}</text>' for k, text in enumerate(texts)]


def rooms_as_text() -> str:
    """The picture for readers without pictures, and one line per room."""
    found = arrows()
    order = [*ROOMS, *(name for name in GROUND if name not in ROOMS)]
    lines = ["| room | what it is for | imports |", "|---|---|---|"]
    for room in ROOMS:
        others = ", ".join(name for name in order if name in found[room]) or "nothing of ours"
        lines.append(f"| `{room}/` | {sentence_of(PACKAGE / room / '__init__.py')} | {others} |")
    return "\n".join(lines)


def files_as_text() -> str:
    """One line per module, room by room, out of the first paragraphs of their docstrings."""
    doors = [PACKAGE / name for name in ("__init__.py", "__main__.py", "errors.py")]
    parts = [("The ground floor", "", doors)]
    for room in ROOMS:
        modules = [path for path in sorted((PACKAGE / room).rglob("*.py")) if path.name != "__init__.py"]
        parts.append((f"{room}/", sentence_of(PACKAGE / room / "__init__.py"), modules))
    lines = []
    for title, sentence, modules in [*parts[1:], parts[0]]:
        lines += [f"### {title}", "", *([sentence, ""] if sentence else []), "| file | what it is for |", "|---|---|"]
        for path in modules:
            name = path.relative_to(PACKAGE).as_posix()
            shown = name.removeprefix(title)
            lines.append(f"| [`{shown}`](../srlora_dist/{name}) | {sentence_of(path)} |")
        lines.append("")
    return "\n".join(lines).strip()


def options_as_text() -> str:
    """The table of SRLoRAConfig's options: its docstring, with the defaults."""
    sys.path.insert(0, str(ROOT))
    from srlora_dist.config.method import SRLoRAConfig

    defaults = {each.name: each.default for each in fields(SRLoRAConfig)}
    lines = ["| option of `SRLoRAConfig` | default | what it means |", "|---|---|---|"]
    for name, what in read_arguments(SRLoRAConfig.__doc__).items():
        value = defaults[name]
        shown = "`None`" if value is None else f"`{value}`"
        lines.append(f"| `{name}` | {shown} | {as_markdown(what)} |")
    return "\n".join(lines).replace("`null`", "`None`")


def read_arguments(docstring: str) -> dict[str, str]:
    """The section ``Args`` of a docstring: each name, and what is said of it."""
    section = docstring.split("Args:\n", 1)[1]
    first = re.match(r" *", section).group()
    section = re.split(rf"\n(?!{first}|\n)", section)[0]
    found = re.findall(rf"^{first}(\w+): (.*?)(?=^{first}\w+: |\Z)", section, flags=re.DOTALL | re.MULTILINE)
    return {name: what.strip() for name, what in found}


def put_between(page: str, name: str, text: str) -> str:
    """A page with other text between its marks of that name."""
    marks = rf"(<!-- {name}: written by docs/generate.py -->\n\n).*?(\n\n<!-- end of {name} -->)"
    assert re.search(marks, page, flags=re.DOTALL), f"the page has no marks of {name}"
    return re.sub(marks, lambda found: found[1] + text + found[2], page, flags=re.DOTALL)


def generate() -> dict[Path, str]:
    """Each file that this script writes, and what should be in it."""
    architecture, loop = (DOCS / name for name in ("architecture.md", "loop.md"))
    rooms = put_between(architecture.read_text(), "rooms", rooms_as_text())
    return {
        DOCS / "figures" / "rooms.svg": draw_rooms(),
        architecture: put_between(rooms, "files", files_as_text()),
        loop: put_between(loop.read_text(), "options", options_as_text()),
    }


if __name__ == "__main__":
    for path, text in generate().items():
        path.write_text(text)
