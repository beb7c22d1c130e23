"""A real SLURM for a test: munged, slurmctld and one slurmd on each host, all in one temporary folder."""

from __future__ import annotations

import secrets
import subprocess
import time
from pathlib import Path

from tests.cluster.hosts import Host

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={head}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Also how long a job that was requeued waits before it starts again; 120 s by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType={proctrack}
TaskPlugin=task/none
# Plain files that SLURM takes for eight GPUs.
GresTypes=gpu
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
# Between SIGTERM and SIGKILL; 30 s by default, which a busy machine may need for the way to the next step.
KillWait=120
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=240
PartitionName=high Nodes=ALL PriorityTier=2
"""


class Slurm:
    """A cluster of the given hosts; the controller is on the first.

    Args:
        hosts: The nodes.
        folder: For configuration, state and logs.
        proctrack: SLURM's way of finding the processes of a task. ``proctrack/pgid`` signals a task's process group
            alone, ``proctrack/linuxproc`` all its descendants, as cgroups do on most clusters.
        environment: Of all daemons and commands.
    """

    def __init__(self, hosts: list[Host], folder: Path, proctrack: str, environment: dict[str, str]) -> None:
        self.hosts, self.folder, self.proctrack = hosts, folder, proctrack.split("/")[1]
        self.daemons: list[subprocess.Popen] = []
        nodes = "\n".join(
            f"NodeName={host.name} NodeAddr={host.address} CPUs=2 Gres=gpu:8 State=UNKNOWN" for host in hosts
        )
        head = {"head": hosts[0].name, "address": hosts[0].address}
        text = CONFIGURATION.format(folder=folder, nodes=nodes, proctrack=proctrack, **head)
        (folder / "slurm.conf").write_text(text)
        # In a namespace /sys has no cgroups, which slurmd would look for to choose.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        for number in range(8):
            (folder / f"gpu{number}").touch()
        for name in ("state", *(f"spool-{host.name}" for host in hosts)):
            (folder / name).mkdir()
        self.environment = environment | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start the daemons and wait for the nodes.

        Raises:
            TimeoutError: The nodes did not come up; the message has what the daemons wrote.
        """
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("key-file", "pid-file", "seed-file")]
        # --force: it may run as root, in a folder of anyone.
        self._daemon(self.hosts[0], "munged", "--force", "--foreground", f"--socket={self.folder}/munge.socket", *files)
        self._wait_until(lambda: (self.folder / "munge.socket").exists(), 10)
        self._daemon(self.hosts[0], "slurmctld", "-D")
        for host in self.hosts:
            self._daemon(host, "slurmd", "-D")
        ready = {f"{host.name} idle" for host in self.hosts}
        self._wait_until(lambda: set(self.run("sinfo", "-hNo", "%N %T", check=False).splitlines()) == ready, 60)

    def stop(self) -> None:
        """End all jobs and daemons, which are all that runs on the hosts."""
        for host in self.hosts:
            host.clear()
        for daemon in self.daemons:
            daemon.wait(30)

    def run(self, *words: object, folder: Path | None = None, check: bool = True) -> str:
        """Call a program on the first node; gives what it prints on stdout."""
        command = self.hosts[0].command(*words)
        ended = subprocess.run(
            command, cwd=folder, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert ended.returncode == 0 or not check, f"{words}: {ended.stderr}"
        return ended.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        words = self.run("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _daemon(self, host: Host, *words: str) -> None:
        log = self.folder / f"{words[0]}-{host.name}.out"
        self.daemons.append(host.start(*words, log=log, environment=self.environment, folder=self.folder))

    def _wait_until(self, condition: object, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = [path for path in self.folder.glob("*") if path.suffix in (".out", ".log")]
                raise TimeoutError("\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in logs))
            time.sleep(0.3)
