"""What this processor cannot do, so that a test of it is skipped with the reason and the rest of the suite passes."""

from __future__ import annotations

import os
from functools import cache

import pytest

from srlora_dist.storage.capabilities import deepspeed_types


@cache
def _types() -> set[str]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the ranks of the tests run on the CPU
    return deepspeed_types()


def require_deepspeed_type(dtype: str) -> None:
    """Skip the test that calls this where DeepSpeed's CPU accelerator does not train in ``dtype``.

    Args:
        dtype: As ``model.dtype`` names it.
    """
    if dtype == "float16" and dtype not in _types():  # it has the others everywhere, and to ask takes seconds
        pytest.skip("DeepSpeed does not train in float16 on this processor: is_fp16_supported() is false")
