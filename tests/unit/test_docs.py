"""The documentation quotes messages that the program has, and links to files that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
