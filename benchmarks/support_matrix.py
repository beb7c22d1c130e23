"""Write docs/support.md's matrix of engines and precisions from the results of the tests that compare them.

Runs ``tests/ranks/test_engines.py`` and puts a table between the two marks in that page: each cell is a test that
passed, failed, or was skipped with its reason; an empty one has no test.

    python benchmarks/support_matrix.py [--only "fsdp2 and fp32"]

``--only`` takes the cells that pytest's -k chooses, and prints the table alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree  # a file that pytest has just written
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS, TEST = "tests/ranks/test_engines.py", "test_engine_equals_the_reference"
MARKS = "<!-- matrix: written by benchmarks/support_matrix.py -->", "<!-- end of matrix -->"


def run_tests(only: str = "") -> dict[tuple[str, str], str]:
    """Each (engine, precision) with ``yes``, ``FAILS``, or the reason why it was skipped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", TESTS, f"--junitxml={path}", "-k", only]
        subprocess.run(command, cwd=ROOT, check=False)
        cases = ElementTree.parse(path).getroot().iter("testcase")
        return dict(map(_result, (case for case in cases if case.get("name").startswith(f"{TEST}["))))


def _result(case: ElementTree.Element) -> tuple[tuple[str, str], str]:
    engine, _, precision = case.get("name").split("[")[1].rstrip("]").partition(" | ")
    skipped = case.find("skipped")
    if skipped is not None:
        return (engine, precision), skipped.get("message")
    failed = case.find("failure") is not None or case.find("error") is not None
    return (engine, precision), "FAILS" if failed else "yes"


def make_table(cells: dict[tuple[str, str], str]) -> str:
    """Markdown: a row an engine, a column a precision."""
    engines, precisions = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    lines = ["| engine | " + " | ".join(precisions) + " |", "|---" * (len(precisions) + 1) + "|"]
    lines += [
        f"| {engine} | " + " | ".join(cells.get((engine, precision), "") for precision in precisions) + " |"
        for engine in engines
    ]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "peft", "bitsandbytes"))
    passed, failed = (sum(cell == kind for cell in cells.values()) for kind in ("yes", "FAILS"))
    counts = f"{passed} cells pass, {failed} fail: CPU ranks with gloo, {packages}, {date.today().isoformat()}."
    return "\n".join([*lines, "", counts])


def main() -> None:
    """Run the tests and rewrite the page; the exit status is 1 where a cell fails or there is none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cells, as pytest -k takes them; the page stays as it is")
    only = parser.parse_args().only
    cells = run_tests(only)
    if not cells:
        sys.exit(f"no cell is chosen by {only!r}")
    table = make_table(cells)
    if only:
        print(table)
        sys.exit("FAILS" in cells.values())
    page = ROOT / "docs" / "support.md"
    before, _, rest = page.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    page.write_text(f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{after}")
    print(table)
    sys.exit("FAILS" in cells.values())


if __name__ == "__main__":
    main()
