"""The state of all random number generators of a process, as JSON can hold it."""

from __future__ import annotations

import base64
import random

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, object]:
    """Of torch on the CPU and on this process's device, of NumPy and of Python."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": _encode(torch.get_rng_state()),
        "device": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
        "numpy": [kind, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, object]) -> None:
    """Put back what :func:`random_state` gave; that of a device that is not there is left out."""
    torch.set_rng_state(_decode(state["torch"]))
    if state["device"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["device"]))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
