"""The wheel holds every file of the package, its licence, and the extras that the documentation names."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXTRAS = {"deepspeed", "quant", "vision", "plot", "demo", "decoder", "dev"}


def test_a_wheel_is_complete(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves folders behind
    shutil.copytree(ROOT / "srlora_dist", source / "srlora_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    ended = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr.decode()[-2000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        info = next(name for name in names if name.endswith("/METADATA"))
        metadata = wheel.read(info).decode()
        entry = wheel.read(info.replace("METADATA", "entry_points.txt")).decode()
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "srlora_dist").rglob("*.py")}
    assert {name for name in names if name.startswith("srlora_dist/")} == files | {"srlora_dist/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    found = {line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Provides-Extra")}
    assert found >= EXTRAS
    assert "srlora = srlora_dist.commands.cli:main" in entry
