"""W is edited and factored in full float32 whatever training allows itself, whose settings are left as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer
from transformers.utils import import_utils

from srlora_dist import SRLoRACallback, SRLoRAConfig
from srlora_dist.layers.matmul import exact_matmul
from srlora_dist.method.svd import compute_directions
from tests.ranks.engines import make_batch
from tests.ranks.hf_trainer import OPTIONS, make_arguments, make_model, samples, switches
from tests.unit.method.test_switcher import bound, take_steps

BY_BACKEND = hasattr(torch.backends, "fp32_precision")
enable_tf32 = import_utils.enable_tf32.__wrapped__  # it does nothing when it is called a second time
PRODUCTS = ("mm", "addmm", "addmm_", "addmv", "addmv_", "mv", "linalg_svd", "_linalg_svd", "linalg_qr", "linalg_eigh")


def _of_backends() -> list[object]:
    return [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul] if BY_BACKEND else []


def settings() -> list[str]:
    """What can be read; reading the older one raises where the newer ones contradict it."""
    try:
        of_all = torch.get_float32_matmul_precision()
    except RuntimeError:
        of_all = "contradicted"
    places = [torch.backends, *_of_backends(), torch.backends.cudnn.conv] if BY_BACKEND else []
    return [of_all, *(place.fp32_precision for place in places)]


def set_backend(name: str, value: str) -> None:
    getattr(torch.backends, name).matmul.fp32_precision = value


STATES: dict[str, Callable[[], None]] = {
    "as torch starts": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "the Trainer's tf32": lambda: enable_tf32(True),
    "the Trainer's tf32 off": lambda: enable_tf32(False),
}
if BY_BACKEND:
    STATES |= {
        "bf16": lambda: setattr(torch.backends, "fp32_precision", "bf16"),
        "tf32 of the GPU": lambda: set_backend("cuda", "tf32"),
        "bf16 of the CPU": lambda: set_backend("mkldnn", "bf16"),
        "medium, then tf32": lambda: (torch.set_float32_matmul_precision("medium"), enable_tf32(True)),
    }


@pytest.fixture
def restored() -> Iterator[None]:
    before = settings()
    yield
    if BY_BACKEND:
        torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    for place in _of_backends():
        place.fp32_precision = "none"
    assert settings() == before


class Products(TorchDispatchMode):
    """Notes in which precision matrices of float32 are multiplied and factored, and in which types."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in PRODUCTS and args[0].dtype != torch.float64:
            of_backends = [place.fp32_precision for place in _of_backends()]
            self.seen.add((args[0].dtype, settings()[0], *of_backends))
        return func(*args, **(kwargs or {}))


FULL = (torch.float32, "highest", *("ieee" for _ in _of_backends()))


@pytest.mark.parametrize("state", STATES)
def test_settings_are_full_inside_and_the_same_afterwards(state: str, restored) -> None:
    STATES[state]()
    before = settings()
    with exact_matmul(), Products() as products:
        torch.ones(3, 3) @ torch.ones(3, 3)
        with exact_matmul():  # one inside of another
            torch.linalg.svd(torch.ones(3, 3))
    assert products.seen == {FULL}
    assert settings() == before
    with pytest.raises(ZeroDivisionError), exact_matmul():
        _ = 1 / 0
    assert settings() == before


@pytest.mark.skipif(not BY_BACKEND, reason="torch has one setting for all backends")
def test_what_follows_another_setting_still_does(restored) -> None:
    enable_tf32(True)
    with exact_matmul():
        pass
    enable_tf32(False)
    assert [place.fp32_precision for place in _of_backends()] == ["ieee", "ieee"]
    enable_tf32(True)
    assert [place.fp32_precision for place in _of_backends()] == ["tf32", "tf32"]


@pytest.mark.parametrize("exhausted", ["stop", "renew"])
def test_switches_are_exact_in_a_training_in_tf32(exhausted: str, tmp_path: Path, restored) -> None:
    """Within autocast too: some loops call ``step()`` there."""
    enable_tf32(True)
    before = settings()
    with Products() as products:
        options = {"target_rank": 10 if exhausted == "stop" else 6, "exhausted": exhausted, "num_switches": 3}
        model, optimizer, switcher = bound(tmp_path, steps=4, **options)  # switches after each of the first three
    assert products.seen == {FULL}
    take_steps(model, optimizer, switcher, 1)
    x, y = make_batch(1)
    (model(x) - y).square().mean().backward()
    optimizer.step()
    with Products() as products, torch.autocast("cpu", dtype=torch.bfloat16):
        report = switcher.step()
    assert report.switch == 2
    assert products.seen == {FULL}
    assert settings() == before


def test_directions_are_exact_in_a_training_in_tf32(restored) -> None:
    enable_tf32(True)
    for shape in ((20, 30), (600, 700)):  # the whole decomposition, and the iteration
        with Products() as products, torch.autocast("cpu", dtype=torch.bfloat16):
            compute_directions(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 8)
        assert products.seen == {FULL}


@pytest.mark.long
def test_a_trainer_in_tf32_trains(tmp_path: Path, restored) -> None:
    """``TrainingArguments(tf32=True)`` and ``torch_compile=True`` do this on a GPU; without one they are refused."""
    enable_tf32(True)
    callback = SRLoRACallback(SRLoRAConfig(svd_cache=str(tmp_path / "svd"), **OPTIONS))
    args = make_arguments(tmp_path / "run")
    trainer = Trainer(model=make_model(), args=args, train_dataset=samples(), callbacks=[callback])
    trainer.train()
    assert switches(trainer) == [0, 4, 8]
    assert settings()[1:2] == ["tf32"] * BY_BACKEND


@pytest.mark.parametrize("state", ["as torch starts", "high", "medium", "allow_tf32"])
def test_before_torch_2_9_the_one_setting_is_put_back(state: str, restored, monkeypatch) -> None:
    """There only the older setting exists."""
    monkeypatch.setattr("srlora_dist.layers.matmul._backends", list)
    STATES[state]()
    before = torch.get_float32_matmul_precision()
    with exact_matmul():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before
