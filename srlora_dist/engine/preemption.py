"""Being asked to stop: a cluster sends a signal to the processes of a job some time before it ends them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

from accelerate import Accelerator

from srlora_dist.engine.process import parent_is_gone

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class StopRequest:
    """Whether any rank was asked to stop by one of ``SIGNALS``, known to all ranks after the same step.

    Args:
        accelerator: Accelerator of the run.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._here = False

    def listen(self) -> None:
        """Note these signals from now on, instead of ending by them."""
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
            for name in SIGNALS:
                signal.signal(name, self._note)
            # With one process accelerate launch does not pass SIGTERM on, and a launcher that is killed never does: its
            # death counts as a SIGTERM.
            if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
                self._here = parent_is_gone()  # before this it would not have been noticed

    def _note(self, *_: object) -> None:
        self._here = True

    def anywhere(self) -> bool:
        """Whether any rank has got one. Collective: one all-reduce of a number."""
        if self._here:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()
