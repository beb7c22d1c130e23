"""The state of all random number generators of a process, in a form that JSON can hold."""

from __future__ import annotations

import base64
import random

import numpy as np
import torch


def random_state() -> dict[str, object]:
    """The state of torch's generators on the CPU and on this process's device, of NumPy's and of Python's."""
    kind, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "torch": _encode(torch.get_rng_state().numpy()),
        "device": _encode(torch.cuda.get_rng_state().numpy()) if torch.cuda.is_available() else None,
        "numpy": [kind, _encode(keys), *rest],
        "python": [version, _encode(np.array(words, dtype=np.uint32)), gauss],
    }


def restore_random_state(state: dict[str, object]) -> None:
    """Put back what :func:`random_state` returned. The state of a GPU is skipped on a machine without one."""
    torch.set_rng_state(torch.from_numpy(_decode(state["torch"], np.uint8)))
    if state["device"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(_decode(state["device"], np.uint8)))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, _decode(keys, np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(_decode(words, np.uint32).tolist()), gauss))


def _encode(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.tobytes()).decode()


def _decode(text: str, kind: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=kind).copy()
