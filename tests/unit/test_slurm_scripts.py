"""What can be said of launch/slurm without a SLURM; tests/cluster runs it on one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "launch" / "slurm"
VARIANTS = sorted(path for path in SLURM.glob("*.sbatch") if path.name != "train.sbatch")


def directives(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith("#SBATCH")]


def call(*words: object, **environment: object) -> subprocess.CompletedProcess:
    variables = os.environ | {name: str(value) for name, value in environment.items()}
    return subprocess.run(
        ["bash", *map(str, words)], env=variables, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize("path", sorted(SLURM.iterdir()), ids=lambda path: path.name)
def test_bash_understands_each_file(path: Path) -> None:
    ended = call("-n", path)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.name)
def test_a_variant_adds_to_the_common_script(path: Path) -> None:
    """SLURM reads the directives of the submitted file alone, so each has to repeat them."""
    assert set(directives(SLURM / "train.sbatch")) <= set(directives(path))
    assert path.read_text().splitlines()[-1] == 'source "$SLURM_SUBMIT_DIR/launch/slurm/train.sbatch"'
    assert "Not measured on" in path.read_text()


def test_a_job_from_elsewhere_is_told_where_to_start(tmp_path: Path) -> None:
    ended = call(SLURM / "train.sbatch", SLURM_SUBMIT_DIR=tmp_path)
    assert ended.returncode == 2
    assert "submit from the root of the repository" in ended.stderr


@pytest.mark.skipif(shutil.which("taskset") is None, reason="taskset is missing: apt install util-linux")
def test_each_process_gets_the_mask_of_its_local_rank() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    chosen = allowed[-1]
    masks = f"{1 << allowed[0]:x},{1 << chosen:x}"
    program = ("-c", "import os; print(os.sched_getaffinity(0))")
    ended = call(SLURM / "bind.sh", *program, CPU_MASKS=masks, LOCAL_RANK=1)
    assert ended.stdout.strip() == f"{{{chosen}}}", ended.stderr
    ended = call(SLURM / "bind.sh", *program, CPU_MASKS=masks, LOCAL_RANK=2)
    assert ended.returncode == 2
    assert "CPU_MASKS has 2 masks and none for local rank 2" in ended.stderr
