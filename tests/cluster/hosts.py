"""Two hosts on one machine: network namespaces with addresses, host names and a cable between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

NETWORK = "10.231.0"
"""Of the cable; nobody outside sees it."""
INTERFACE = "hsn0"
"""Both ends of the cable, called as on a Slingshot network."""


class Host:
    """A network namespace with a host name of its own, which all hosts can resolve.

    Args:
        number: From 1; the name is ``node1``, the address ends with it.
    """

    def __init__(self, number: int) -> None:
        self.name, self.address = f"node{number}", f"{NETWORK}.{number}"
        self.namespace = f"srlora-{os.getpid()}-{number}"
        self.files = Path("/etc/netns") / self.namespace  # "ip netns exec" puts them in place of those in /etc

    def add(self, num_hosts: int) -> None:
        """Make the namespace, still without a cable."""
        ip("netns", "add", self.namespace)
        ip("-n", self.namespace, "link", "set", "lo", "up")
        self.files.mkdir(parents=True)
        names = [f"{NETWORK}.{number} node{number}" for number in range(1, num_hosts + 1)]
        (self.files / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")

    def plug(self) -> None:
        """Give this end of the cable the address."""
        ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", INTERFACE)
        ip("-n", self.namespace, "link", "set", INTERFACE, "up")

    def command(self, *words: object) -> list[str]:
        """The words as a command on this host."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', self.name]
        return ["ip", "netns", "exec", self.namespace, *named, *map(str, words)]

    def start(self, *words: object, log: Path, environment: dict[str, str], folder: Path) -> subprocess.Popen:
        """Start it on this host; what it prints goes to the end of ``log``."""
        with log.open("a") as file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            return subprocess.Popen(self.command(*words), cwd=folder, env=environment, **streams)

    def clear(self) -> None:
        """End all that runs on this host."""
        for _ in range(50):
            pids = ip("netns", "pids", self.namespace, check=False).split()
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.1)

    def remove(self) -> None:
        """End all that runs on this host, and remove it."""
        self.clear()
        ip("netns", "delete", self.namespace, check=False)
        shutil.rmtree(self.files, ignore_errors=True)


def connect(hosts: list[Host]) -> None:
    """Make two hosts and lay a cable between them.

    Raises:
        OSError: This machine does not allow it; the message is that of ``ip``.
    """
    for host in hosts:
        host.add(len(hosts))
    first, second = (host.namespace for host in hosts)
    ip("link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
    for host in hosts:
        host.plug()


def ip(*words: str, check: bool = True) -> str:
    """Call ``ip``; gives what it prints."""
    ended = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if check and ended.returncode:
        raise OSError(f"ip {' '.join(words)}: {ended.stderr.strip()}")
    return ended.stdout
