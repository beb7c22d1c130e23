"""``srlora doctor --quick``, and what it says of packages and of a machine that lack something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from srlora_dist.commands.cli import main
from srlora_dist.commands.doctor.machine import check_compiler, check_deepspeed_types, check_disks, check_quantisation
from srlora_dist.commands.doctor.packages import check_packages
from srlora_dist.storage.capabilities import quantised_error

METADATA = """Metadata-Version: 2.1
Name: srlora-dist
Version: 9.9
Requires-Dist: torch>=2
Requires-Dist: scipy>=999
Requires-Dist: no-such-package>=3
Requires-Dist: no-such-extra; extra == "quant"
Requires-Dist: no-such-tool; extra == "dev"
"""


def test_packages_are_compared_with_what_is_asked_for(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "srlora_dist-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(tmp_path)
    found = {line.what.split()[0]: line for line in check_packages()}
    assert found["scipy"].status == "failed"
    assert found["scipy"].remedy == "pip install 'scipy>=999'"
    assert "not installed, asked for is >=3" in found["no-such-package"].what
    assert found["no-such-extra"].status == "warning"
    assert found["no-such-extra"].remedy == "pip install 'srlora-dist[quant]'"
    assert "no-such-tool" not in found
    assert f"srlora-dist 9.9, torch {torch.__version__}" in found["python"].what


def test_a_machine_without_a_compiler_is_told_so(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("SRLORA_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    status = main(["doctor", "--quick"])
    healthy = capsys.readouterr().out
    assert (status, "0 failed" in healthy) == (0, True), healthy
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["doctor", "--quick"]) == 1
    text = capsys.readouterr().out
    assert "failed   ninja is not on the PATH\n         -> activate the environment" in text
    assert "2 failed" in text


def test_a_compiler_behind_another_command_is_found(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("deepspeed")
    compiler = tmp_path / "mine++"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "ccache mine++")
    assert [line.status for line in check_compiler()] == ["ok", "failed"]  # ninja is not there
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert [line.status for line in check_compiler()] == ["ok", "warning"]  # a GPU does without


BROKEN = """
import sys
from srlora_dist.commands.cli import main
sys.modules[sys.argv[1]] = None  # its import fails
sys.exit(main(["doctor", "--quick"]))
"""


@pytest.mark.long
@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_package_that_cannot_be_imported_is_a_finding(package: str, tmp_path: Path) -> None:
    environment = os.environ | {"SRLORA_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", BROKEN, package]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    first, *rest = ended.stdout.splitlines()
    assert first.startswith("ok       python")
    assert f"import of {package}" in ended.stdout
    assert rest[-1].endswith(" failed")


def test_a_check_that_raises_has_failed(tmp_path: Path, monkeypatch, capsys) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("srlora_dist.commands.doctor.machine.check_disks", full)
    assert main(["doctor", "--quick"]) == 1
    text = capsys.readouterr().out
    assert "failed   disks: OSError: [Errno 28] No space left on device" in text
    assert text.index("disks") < text.index("bitsandbytes nf4")  # the others are tried all the same


@pytest.mark.parametrize("supports", [True, None])
def test_the_types_that_deepspeed_trains_in_are_named(supports: bool | None, monkeypatch) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: supports)
    first, *rest = check_deepspeed_types()
    assert first.what == f"DeepSpeed trains in float32, {'float16, ' if supports else ''}bfloat16"
    expected = [] if supports else [("warning", "use --model.dtype bfloat16 or float32")]
    assert [(found.status, found.remedy) for found in rest] == expected


def test_a_file_for_several_machines_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "nodes.yaml").write_text("num_machines: 2\nnum_processes: 16\n")
    assert main(["doctor", "--config_file", str(tmp_path / "nodes.yaml")]) == 2
    assert "is for 2 machines" in capsys.readouterr().err


def test_a_damaged_file_of_directions_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SRLORA_CACHE", str(tmp_path))
    (tmp_path / "svd").mkdir()
    (tmp_path / "svd" / "abc.safetensors").write_bytes(b"cut")
    found = list(check_disks(tmp_path))
    named = [line for line in found if line.status == "warning" and "abc" in line.what]
    assert len(named) == 1
    assert "remove it" in named[0].remedy
    assert not any("files of directions" in line.what for line in found)  # it is not counted as good


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SRLORA_CACHE", str(tmp_path / "file"))
    found = {line.status: line for line in check_disks(tmp_path / "file" / "runs") if line.status != "ok"}
    assert str(tmp_path / "file") in found["failed"].what
    assert "cannot be written" in found["warning"].what


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_are_really_quantised(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    stored, forward = quantised_error(kind)
    low, high = {"nf4": (0.05, 0.15), "int8": (0.002, 0.02)}[kind]
    assert low < stored < high
    assert forward < 0.02
    assert {line.status for line in check_quantisation()} == {"ok"}
