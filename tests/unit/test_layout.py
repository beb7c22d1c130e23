"""The shape of the house: rooms import one way, none in a circle, and only storage/ knows ranks and engines."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "srlora_dist"

ROOMS = {
    "commands": {"training", "tasks", "method", "checkpoint", "engine", "storage", "layers"},
    "training": {"tasks", "method", "checkpoint", "engine", "storage", "layers"},
    "method": {"checkpoint", "storage", "layers"},
    "checkpoint": {"storage", "layers"},
    "engine": {"storage", "layers"},
    "storage": {"layers"},
    "layers": set(),
    "tasks": set(),
    "config": set(),
}
"""What each room may import beside itself and the ground floor, ``config`` and ``errors``."""

GROUND = {"config", "errors"}
DOORS = {"__init__", "__main__"}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 300, 50


def room_of(module: str) -> str:
    return module.split(".")[0]


def read_modules(package: Path) -> dict[str, ast.Module]:
    """Every module by its name below the package; a package goes by its folder's."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and parts[1:] else parts)
        found[name] = ast.parse(path.read_text())
    return found


def imported_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def arrows(modules: dict[str, ast.Module]) -> dict[str, set[str]]:
    """For each module the other modules of the package that it imports, or out of which it imports a name."""
    found = {}
    for name, tree in modules.items():
        inner = {full.removeprefix("srlora_dist.") for full in imported_names(tree) if full.startswith("srlora_dist.")}
        found[name] = {each if each in modules else each.rpartition(".")[0] for each in inner} & modules.keys() - {name}
    return found


def wrong_arrows(modules: dict[str, ast.Module]) -> list[str]:
    wrong = []
    for name, others in arrows(modules).items():
        room = room_of(name)
        if room in DOORS:
            continue
        allowed = {room} | (GROUND | ROOMS[room] if room not in GROUND else set())
        wrong += [f"{name} imports {other}" for other in sorted(others) if room_of(other) not in allowed]
    return wrong


def find_circle(modules: dict[str, ast.Module]) -> list[str]:
    try:
        TopologicalSorter(arrows(modules)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_the_package_has_nine_rooms() -> None:
    there = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there == {*ROOMS, "errors.py", "__init__.py", "__main__.py"}


@pytest.mark.long
def test_rooms_import_one_way() -> None:
    assert wrong_arrows(read_modules(PACKAGE)) == []


@pytest.mark.long
def test_no_modules_import_each_other_in_a_circle() -> None:
    assert find_circle(read_modules(PACKAGE)) == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("layers.spans", "from srlora_dist.storage.base import Storage", "layers.spans imports storage.base"),
        ("tasks.text", "from srlora_dist.training import trainer", "tasks.text imports training.trainer"),
        ("config.run", "import srlora_dist.errors", "config.run imports errors"),
        (
            "engine.process",
            "def f():\n    from srlora_dist.method.svd import BLOCK",
            "engine.process imports method.svd",
        ),
    ],
)
def test_a_wrong_arrow_is_seen(module: str, line: str, complaint: str) -> None:
    modules = read_modules(PACKAGE)
    modules[module] = ast.parse(ast.unparse(modules[module]) + "\n" + line)
    assert [each for each in wrong_arrows(modules) if each == complaint]


@pytest.mark.long
def test_a_circle_inside_a_room_is_seen() -> None:
    modules = read_modules(PACKAGE)
    assert "layers.matmul" in arrows(modules)["layers.pairs"]
    modules["layers.matmul"] = ast.parse("from srlora_dist.layers.pairs import add_pairs_")
    assert {"layers.matmul", "layers.pairs"} <= set(find_circle(modules))


def test_unit_tests_mirror_the_rooms() -> None:
    """``tests/unit/ROOM/test_MODULE.py``, or ``test_MODULE_WHAT.py`` where a module has several."""
    modules = read_modules(PACKAGE)
    for path in Path(__file__).parent.glob("*/test_*.py"):
        room, name = path.parent.name, path.stem.removeprefix("test_")
        if room in ROOMS:
            of_room = {module.split(".")[1] for module in modules if module.startswith(f"{room}.")}
            assert any(name == module or name.startswith(f"{module}_") for module in of_room), f"{path} tests no module"


@pytest.mark.long
def test_only_the_seam_knows_ranks_and_engines() -> None:
    for name, tree in read_modules(PACKAGE).items():
        if room_of(name) != "storage":
            for imported in imported_names(tree):
                foreign = imported.split(".")[0] in ("deepspeed", "bitsandbytes")
                foreign |= imported.startswith("torch.distributed")
                assert not foreign, f"{name} imports {imported}"


def test_files_and_functions_are_short() -> None:
    for folder in (PACKAGE, PACKAGE.parent / "launch"):
        for path in folder.rglob("*.py"):
            lines = path.read_text().count("\n")
            assert lines <= MOST_LINES, f"{path} has {lines} lines"
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    length = node.end_lineno - node.lineno + 1
                    assert length <= MOST_LINES_OF_A_FUNCTION, f"{node.name} of {path} has {length} lines"
