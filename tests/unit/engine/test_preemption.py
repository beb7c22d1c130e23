"""A run whose launcher ended while it was still loading is asked to stop: nobody would ask it later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from srlora_dist.engine import preemption

CHILD = """
import os, sys, time
from srlora_dist.engine.process import STARTED, parent_is_gone
with os.fdopen(int(sys.argv[1]), "w") as out:
    print(parent_is_gone(), file=out, flush=True)
    while os.getppid() == STARTED[1]:
        time.sleep(0.01)
    print(parent_is_gone(), file=out, flush=True)
    if os.fork() == 0:  # it has another parent from the beginning
        print(parent_is_gone(), file=out, flush=True)
        os._exit(0)
    os.wait()
"""
PARENT = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {CHILD!r}, sys.argv[1]], pass_fds=[int(sys.argv[1])])
input()
"""


def test_a_process_knows_that_its_parent_has_ended() -> None:
    read, write = os.pipe()
    command = [sys.executable, "-c", PARENT, str(write)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[write])
    os.close(write)
    with os.fdopen(read) as printed:
        assert printed.readline() == "False\n"
        parent.kill()
        parent.communicate()
        assert printed.read().split() == ["True", "False"]


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
@pytest.mark.parametrize("is_gone", [True, False])
def test_a_run_without_its_launcher_stops(is_gone: bool, monkeypatch) -> None:
    handlers = {name: signal.getsignal(name) for name in preemption.SIGNALS}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(preemption.ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *_: 0))
    monkeypatch.setattr(preemption, "parent_is_gone", lambda: is_gone)
    asked = []
    accelerator = SimpleNamespace(set_trigger=lambda: asked.append(True), check_trigger=lambda: bool(asked))
    request = preemption.StopRequest(accelerator)
    try:
        request.listen()
        assert request.anywhere() is is_gone
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
