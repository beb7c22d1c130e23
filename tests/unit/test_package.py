"""The wheel is complete, and the door is light."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import srlora_dist

ROOT = Path(__file__).parents[2]
EXTRAS = {"all", "train", "plot", "cli", "deepspeed", "quant", "trl", "demo", "decoder", "dev"}


@pytest.mark.long
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
        about = wheel.read(info).decode()
        entry = wheel.read(info.replace("METADATA", "entry_points.txt")).decode()
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "srlora_dist").rglob("*.py")}
    assert {name for name in names if name.startswith("srlora_dist/")} == files | {"srlora_dist/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert f"\nVersion: {srlora_dist.__version__}\n" in about
    assert "License-Expression: Apache-2.0" in about
    found = {line.split(": ")[1] for line in about.splitlines() if line.startswith("Provides-Extra")}
    assert found == EXTRAS
    assert "srlora = srlora_dist.commands.cli:main" in entry


DOOR = """
import sys
import accelerate, peft, torch, transformers  # what these load is theirs

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ImportError(f"{name} is not for the door")

there = set(sys.modules)
REFUSED = set("jsonargparse yaml matplotlib datasets sklearn tensorboard PIL deepspeed pandas".split())
for name in [name for name in sys.modules if name.split(".")[0] in REFUSED]:
    sys.modules.pop(name)
sys.meta_path.insert(0, Refuse())
from srlora_dist import RunStoppedError, SRLoRAConfig, SiteSwitch, SwitchReport, Switcher, __version__
import srlora_dist.config
print(__version__, *sorted(name for name in sys.modules if name.startswith("srlora_dist.")))
"""


def test_the_door_is_light() -> None:
    """It loads no parser, no yaml, no plots, no data sets, and no room that the Switcher does not need."""
    ended = subprocess.run([sys.executable, "-c", DOOR], capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    version, *loaded = ended.stdout.split()
    assert version == srlora_dist.__version__
    assert "srlora_dist.method.switcher" in loaded
    rooms = {name.split(".")[1] for name in loaded}
    assert rooms == {"checkpoint", "config", "errors", "layers", "method", "storage"}
    assert "srlora_dist.config.parse" not in loaded


def test_options_load_no_torch() -> None:
    code = "import sys; from srlora_dist.config import RunConfig, SRLoRAConfig; RunConfig(); print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert not {"torch", "yaml", "jsonargparse", "transformers"} & set(ended.stdout.split())


def test_a_command_without_its_extra_says_how_to_install_it() -> None:
    code = "import sys; from srlora_dist.commands.cli import main; sys.modules['jsonargparse'] = None; "
    code += "sys.exit(main(['train']))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 2
    assert "jsonargparse" in ended.stderr
    assert "pip install 'srlora-dist[all]'" in ended.stderr
