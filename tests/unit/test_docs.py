"""The documentation quotes messages that the program has, names files that exist, and follows the code."""

from __future__ import annotations

import ast
import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest

from srlora_dist.config import SRLoRAConfig
from srlora_dist.storage.base import Storage
from srlora_dist.storage.replicated import ReplicatedStorage
from srlora_dist.storage.sharded import ShardedStorage

ROOT = Path(__file__).parents[2]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def literals() -> str:
    """All texts of the program, those with values in them as they are written between the quotes."""
    texts = []
    for path in (ROOT / "srlora_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (
                    part.value if isinstance(part, ast.Constant) else "{" + ast.unparse(part.value) + "}"
                    for part in node.values
                )
                texts.append("".join(parts))
    return "\n".join(texts)


@pytest.mark.long
def test_quoted_messages_are_those_of_the_program() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    quotes = [quote for cell in cells for quote in re.findall("`([^`]+ [^`]+)`", cell)]
    assert len(quotes) > 25
    texts = literals()
    assert [quote for quote in quotes if quote not in texts] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_what_is_generated_from_the_code_is_up_to_date() -> None:
    for path, text in runpy.run_path(str(ROOT / "docs" / "generate.py"))["generate"]().items():
        assert path.read_text() == text, f"{path.name} has fallen behind the code: run python docs/generate.py"


def test_every_option_of_the_method_is_in_the_table() -> None:
    page = (ROOT / "docs" / "loop.md").read_text()
    assert [each.name for each in fields(SRLoRAConfig) if f"\n| `{each.name}` | " not in page] == []


def test_the_page_on_storages_lists_what_a_subclass_answers() -> None:
    page = (ROOT / "docs" / "storage.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| ([^|]+) \|$", page, flags=re.MULTILINE)
    listed = [{name for name, *answers in rows if answers[column] == "yours"} for column in (0, 1)]
    assert {name for name, *_ in rows} == Storage.__abstractmethods__ | ShardedStorage.__abstractmethods__
    assert listed == [ReplicatedStorage.__abstractmethods__, ShardedStorage.__abstractmethods__]
    defaults = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| [^|]+ \|$", page, flags=re.MULTILINE)
    methods = {name for row in defaults for name in re.findall(r"\w+", row)}
    assert len(methods) > 8
    assert [name for name in methods if not hasattr(Storage, name)] == []


def test_architecture_names_every_module() -> None:
    page = ARCHITECTURE.read_text()
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "srlora_dist").rglob("*.py")]
    modules = [name for name in modules if not name.endswith("/__init__.py")]
    assert len(modules) > 80
    assert [name for name in modules if f"](../{name}) | " not in page] == []


def test_architecture_names_only_what_exists() -> None:
    page = ARCHITECTURE.read_text()
    files = re.findall(r"(?<!\[)`(\w+/[\w/.]+\.py)`", page)
    assert len(files) > 30
    assert [name for name in files if not find_source(name)] == []
    named = re.findall(r"`(\w+/[\w/.]+\.py)`: `([\w.]+)`", page)
    assert len(named) > 20
    assert [(file, name) for file, name in named if not defines(find_source(file), name.split("."))] == []


def find_source(name: str) -> Path | None:
    """A file that is named from the root of the repository, or from the package."""
    return next((path for path in (ROOT / name, ROOT / "srlora_dist" / name) if path.is_file()), None)


def defines(path: Path, names: list[str]) -> bool:
    body = ast.parse(path.read_text()).body
    for name in names:
        found = [node for node in body if getattr(node, "name", None) == name]
        if not found:
            return False
        body = found[0].body
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_of_the_repository_that_a_page_names_exist(page: Path) -> None:
    folders = "srlora_dist|tests|benchmarks|launch|examples|docs|ds_configs"
    named = re.findall(rf"`(?:\.venv/bin/pytest |python )?((?:{folders})/[\w./-]*(?:\.\w+|/))", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
