"""Multiplies float32 matrices in full float32, because what is added to W has to be what the ledger says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Multiply float32 in float32, whatever faster precision the training allows itself, autocast too.

    Afterwards every setting is what it was. From torch 2.9 on each backend has a setting of its own. The older common
    setting cannot even be read while the backends contradict it, as they do after ``TrainingArguments(tf32=True)``. So
    the settings of the backends are changed first.
    """
    of_backends = [(backend, backend.fp32_precision) for backend in _backends()]
    for backend, _ in of_backends:
        backend.fp32_precision = "ieee"
    of_all = torch.get_float32_matmul_precision()
    if of_all != "highest":  # torch warns of the older setting where it is written
        torch.set_float32_matmul_precision("highest")
    try:
        with _without_autocast():
            yield
    finally:
        if of_all != "highest":
            torch.set_float32_matmul_precision(of_all)
        for backend, precision in of_backends:
            backend.fp32_precision = "none"  # it follows torch.backends.fp32_precision, as it may have done before
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def _backends() -> list[object]:
    """The backends with their own precision for products in float32; none before torch 2.9."""
    places = (getattr(getattr(torch.backends, name, None), "matmul", None) for name in ("cuda", "mkldnn"))
    return [place for place in places if hasattr(place, "fp32_precision")]


@contextmanager
def _without_autocast() -> Iterator[None]:
    devices = {"cpu"}
    if torch.accelerator.is_available():
        devices.add(torch.accelerator.current_accelerator().type)
    with ExitStack() as stack:
        for device in devices:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
