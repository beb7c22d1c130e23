"""Two launches never share an output folder, and a run that goes on with a full disk loses nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from srlora_dist.checkpoint.folder_lock import FolderLock
from tests.launch.conftest import Bench
from tests.launch.forks import OPTIONS, Forks, assert_same_results
from tests.unit.checkpoint.test_folder_lock import HOLD

RESTARTED = "import os; os.environ['SLURM_RESTART_COUNT'] = '1'"


@pytest.mark.timeout(200)
def test_a_second_launch_is_refused_on_every_rank_and_a_requeued_one_waits(
    bench: Bench, forks: Forks, undisturbed: dict[str, float]
) -> None:
    assert undisturbed
    folder = bench.run_folder("in use")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("of the first launch")
    arguments = bench.arguments("in use", **OPTIONS)
    with FolderLock(folder, "output_dir", "choose another"):
        ended = forks.start(yaml="cpu2", arguments=arguments)
        assert ended["statuses"] == {"0": 1, "1": 1}, ended["stderr"]
        assert ended["hung"] == []
        told = f"error: output_dir {folder} is in use by process {os.getpid()} on host "
        assert told in ended["stderr"][0]
        assert "or choose another --output_dir" in ended["stderr"][0]
        assert "Traceback" not in "".join(ended["stderr"])
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [
            ("metrics.jsonl", "of the first launch")
        ]
    (folder / "metrics.jsonl").unlink()
    # A restart waits for half of train.timeout at most, here 12.5 s, and the job before it needs 8 more.
    before = [sys.executable, "-c", HOLD.replace("sys.stdin.read()", "time.sleep(8)"), str(folder), ""]
    holder = subprocess.Popen(before, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    ended = forks.start(yaml="cpu2", arguments=arguments, code=RESTARTED)
    holder.communicate()
    assert ended["statuses"] == {"0": 0, "1": 0}, ended["stderr"]
    assert "waiting for its end, 0 of at most 12 s" in ended["stderr"][0]
    assert_same_results(bench.folder / "runs", "in use", "cpu2")


# What the run prints is a file of its own that has to stay below the limit, and so do the metrics.
FULL = """
import resource
import srlora_dist.training.trainer as module
step, limit = module.FineTuner._micro_step, resource.RLIM_INFINITY
def full_in_between(self, batch):
    most = 8000 if 3 <= self.progress.done < {until} else limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limit))
    return step(self, batch)
module.FineTuner._micro_step = full_in_between
"""


@pytest.mark.timeout(200)
def test_a_run_that_goes_on_with_a_full_disk_loses_nothing(
    bench: Bench, forks: Forks, undisturbed: dict[str, float]
) -> None:
    """From after step 3 to after step 10, and then to its very end."""
    assert undisturbed
    arguments = bench.arguments("full", **OPTIONS, checkpoint__if_disk_full="go_on")
    ended = forks.start(yaml="cpu2", arguments=arguments, figures=True, code=FULL.format(until=10))
    text = ended["stderr"][0]
    assert ended["statuses"] == {"0": 0, "1": 0}, text
    for what in ("with 1 entries of the ledger in memory", "with the files of", "without a checkpoint of step 6"):
        assert f"going on {what}" in text, text
    assert_same_results(bench.folder / "runs", "full", "cpu2")

    arguments = bench.arguments("full to the end", **OPTIONS, checkpoint__if_disk_full="go_on")
    ended = forks.start(yaml="cpu2", arguments=arguments, figures=True, code=FULL.format(until=99))
    assert ended["statuses"] == {"0": 1, "1": 1}, ended["stderr"]
    assert "adapter_last" in ended["stderr"][0].split("error: the disk is full")[1]
    assert not (bench.run_folder("full to the end") / "summary.json").exists()
    ended = forks.start(yaml="cpu2", arguments=arguments)
    assert ended["statuses"] == {"0": 0, "1": 0}, ended["stderr"]
    assert "resuming after step 2" in ended["stderr"][0]
    assert_same_results(bench.folder / "runs", "full to the end", "cpu2")
