"""All tests run with one OpenMP thread, as ``make test`` does: on many threads sums differ in their last bits."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
