"""Settings of real engines beside the matrix: loss scaling, DeepSpeed's own Adam, gradient checkpointing, memory."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.layers.digest import digest_span
from tests.processor import require_deepspeed_type
from tests.ranks.engines import make_batch, make_odd_base, make_odd_net, prepare
from tests.ranks.test_agreement import Traffic
from tests.ranks.world import run_ranks

PARTITIONED = {"stage3_param_persistence_threshold": 0}


def train_in_fp16(rank: int, world_size: int, stage: str, zero: dict, cache: str) -> dict:
    """DeepSpeed's dynamic loss scale starts so high that the first steps overflow."""
    model = make_odd_net()
    switcher = Switcher(model, SRLoRAConfig(target_rank=7, svd_cache=cache), 12)
    scaling = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1, "loss_scale_window": 1000}
    engine = prepare(stage, model, 1e-2, 0.5, 1, {"fp16": scaling}, **zero)
    switcher.bind(engine.model, engine.optimizer)
    seen = {"skipped": 0, "changes": [], "taken": 0}
    probe = torch.randn(6, 13, generator=torch.Generator().manual_seed(5)).half()
    for step in range(24):
        x, y = (t.chunk(world_size)[rank] for t in make_batch(step))
        engine.backward((engine.model(x.half()).float() - y).square().mean())
        engine.step()
        overflowed = bool(engine.optimizer.overflow)
        with torch.no_grad():
            before = engine.model(probe).float()
        taken = switcher.num_steps
        report = switcher.step()
        assert switcher.num_steps == taken + (not overflowed)  # a step that did not happen is not counted
        seen["skipped"] += overflowed
        if report is not None:
            assert not overflowed
            with torch.no_grad():
                seen["changes"].append(float((engine.model(probe).float() - before).norm() / before.norm()))
        if switcher.num_steps == 12:
            break
    assert switcher.storage.sites[0].weight.dtype == torch.float16
    with torch.no_grad():
        seen["final"] = engine.model(probe).float()
    switcher.export(f"{cache}/adapter")
    return seen


@pytest.mark.parametrize(("stage", "zero"), [("zero2", {}), ("zero3", PARTITIONED)])
def test_fp16_with_overflows(stage: str, zero: dict, tmp_path) -> None:
    require_deepspeed_type("float16")
    seen = run_ranks(train_in_fp16, 2, stage, zero, str(tmp_path))[0]
    assert seen["skipped"] >= 3
    assert len(seen["changes"]) >= 3
    assert max(seen["changes"]) < 2e-3
    exported = PeftModel.from_pretrained(make_odd_base().half(), tmp_path / "adapter")
    probe = torch.randn(6, 13, generator=torch.Generator().manual_seed(5)).half()
    assert (exported(probe).float() - seen["final"]).norm() < 5e-3 * seen["final"].norm()


def train_with_cpu_adam(rank: int, world_size: int, stage: str, kernel: bool, cache: str) -> dict:
    """The optimizer on the CPU, stepped by torch's AdamW or by DeepSpeed's own kernel."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    model = make_odd_net()
    switcher = Switcher(model, SRLoRAConfig(target_rank=7, svd_cache=cache), 12)
    trainable = [p for p in model.parameters() if p.requires_grad]
    kind = DeepSpeedCPUAdam if kernel else torch.optim.AdamW
    optimizer = kind(trainable, lr=1e-2, weight_decay=0)
    engine = prepare(stage, model, 1e-2, 0.5, optimizer=optimizer, offload_optimizer={"device": "cpu"})
    switcher.bind(engine.model, engine.optimizer)
    parts = []
    for step in range(12):
        x, y = (t.chunk(world_size)[rank] for t in make_batch(step))
        engine.backward((engine.model(x) - y).square().mean())
        engine.step()
        report = switcher.step()
        parts += [[part.slots, part.new_directions] for part in report.sites] if report else []
    moments = [
        run.of(state["exp_avg"]).clone()
        for run in switcher.storage.held
        if (state := switcher.storage.optimizer.state[run.owner])
    ]
    weight = switcher.storage.gather_weight(0)
    return {"parts": parts, "moments": moments, "weight": weight, "kind": type(switcher.storage.optimizer).__name__}


@pytest.mark.timeout(400)  # DeepSpeed compiles its kernel when it is first used
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed_s_own_adam_switches_like_torch_s(stage: str, tmp_path) -> None:
    ours, torchs = (
        run_ranks(train_with_cpu_adam, 2, stage, kernel, str(tmp_path), timeout=350)[0] for kernel in (True, False)
    )
    assert (ours["kind"], torchs["kind"]) == ("DeepSpeedCPUAdam", "AdamW")
    assert ours["parts"] == torchs["parts"]
    assert len(ours["parts"]) >= 5
    torch.testing.assert_close(ours["weight"], torchs["weight"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["moments"], torchs["moments"], rtol=1e-3, atol=1e-6)


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50))
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))


def train_llama(rank: int, world_size: int, checkpointing: bool, zero: dict, cache: str) -> dict:
    model = llama()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    switcher = Switcher(model, SRLoRAConfig(target_rank=8, svd_cache=cache), 8)
    engine = prepare("zero3", model, 1e-2, 0.5, **zero)
    switcher.bind(engine.model, engine.optimizer)
    slots = []
    for step in range(8):
        tokens = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(step)).chunk(world_size)[rank]
        engine.backward(engine.model(tokens, labels=tokens).loss)
        engine.step()
        report = switcher.step()
        slots += [part.slots for part in report.sites] if report else []
    return {
        "slots": slots,
        "weight": switcher.storage.gather_weight(0) if rank == 0 else switcher.storage.gather_weight(0) is None,
        "checkpointed": model.base_model.model.model.gradient_checkpointing,
    }


def test_gradient_checkpointing_changes_nothing(tmp_path) -> None:
    with_it, without = (run_ranks(train_llama, 2, on, PARTITIONED, str(tmp_path))[0] for on in (True, False))
    assert (with_it["checkpointed"], without["checkpointed"]) == (True, False)
    assert with_it["slots"] == without["slots"]
    assert len(with_it["slots"]) == 14
    torch.testing.assert_close(with_it["weight"], without["weight"])


def train_on_nvme(rank: int, world_size: int, device: str, precision: str, folder: str) -> dict:
    """A weight whose runs are over 1 MiB, which is when DeepSpeed swaps them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1024, 1100), nn.Tanh(), nn.Linear(1100, 3))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = get_peft_model(net, LoraConfig(r=4, lora_alpha=6, target_modules=["0"]))
    switcher = Switcher(model, SRLoRAConfig(target_rank=8, svd_cache=folder), 8)
    place = {"device": device, "nvme_path": folder, "buffer_count": 5, "buffer_size": 2_000_000}
    zero = {**PARTITIONED, "stage3_prefetch_bucket_size": 0, "offload_param": place}
    settings = {"bf16": {"enabled": precision == "bf16"}}
    engine = prepare("zero3", model, 1e-2, 0.5, 1, settings, **zero, offload_optimizer={"device": "cpu"})
    switcher.bind(engine.model, engine.optimizer)
    changes, slots = [], []
    probe = torch.randn(6, 1024, generator=torch.Generator().manual_seed(5)).to(dtype)
    for step in range(8):
        x = torch.randn(8, 1024, generator=torch.Generator().manual_seed(step)).to(dtype).chunk(world_size)[rank]
        engine.backward(engine.model(x).float().square().mean())
        engine.step()
        with torch.no_grad():
            before = engine.model(probe).float()
        report = switcher.step()
        if report is not None:
            with torch.no_grad():
                changes.append(float((engine.model(probe).float() - before).norm() / before.norm()))
            slots.append(report.sites[0].slots)
    away = switcher.storage.sites[0].weight.ds_tensor.status.name == "NOT_AVAILABLE"
    with torch.no_grad():
        final = engine.model(probe).float()
    return {"away": away, "changes": changes, "slots": slots, "final": final}


@pytest.mark.timeout(1500)
@pytest.mark.skipif("SRLORA_TEST_NVME" not in os.environ, reason="needs libaio-dev, and compiles: SRLORA_TEST_NVME=1")
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_parameters_on_nvme_train_like_those_in_memory(precision: str, most: float, tmp_path) -> None:
    on_nvme, in_memory = (
        run_ranks(train_on_nvme, 2, device, precision, str(tmp_path), timeout=1400, last=True)[0]
        for device in ("nvme", "cpu")
    )
    assert (on_nvme["away"], in_memory["away"]) == (True, False)
    assert len(on_nvme["changes"]) == 1
    assert max(on_nvme["changes"]) < most
    assert on_nvme["slots"] == in_memory["slots"]
    torch.testing.assert_close(on_nvme["final"], in_memory["final"], rtol=most, atol=most)


class Allocations(TorchDispatchMode):
    """Notes the storages that are made while it is on; what is still alive at the end is what is held."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                reference = StorageWeakRef(tensor.untyped_storage())
                self.made[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        return result

    def num_bytes(self) -> int:
        gc.collect()
        return sum(size for reference, size in self.made.values() if not reference.expired())


def hold(
    rank: int, world_size: int, engine_name: str, precision: str, zero: dict, ledger: str | None, cache: str
) -> dict:
    """Bytes that the switcher's calls have left behind at the end of a run, and those that it announced."""
    model, dtype = make_odd_net(precision), torch.bfloat16 if precision == "bf16" else torch.float32
    config = SRLoRAConfig(target_rank=7, svd_cache=cache, ledger_dir=ledger if rank == 0 else None)
    switcher = Switcher(model, config, 12)
    engine = prepare(engine_name, model, 1e-2, 0.5, 1, {"bf16": {"enabled": precision == "bf16"}}, **zero)
    digest_span(torch.ones(1), 0)  # keeps a table for the whole process
    allocations, traffic = Allocations(), Traffic()
    with traffic, allocations:
        switcher.bind(engine.model, engine.optimizer)
    for step in range(12):
        x, y = (t.chunk(world_size)[rank] for t in make_batch(step))
        engine.backward((engine.model(x.to(dtype)).float() - y).square().mean())
        engine.step()
        with traffic, allocations:
            switcher.step()
    second = 0
    for site in switcher.storage.sites:
        for factor in (site.fused_a, site.fused_b) if site.fused_a is not None else ():
            part = factor.ds_tensor.nbytes if hasattr(factor, "ds_tensor") else 0
            second += part + (factor.to_local() if hasattr(factor, "to_local") else factor.data).nbytes
    memory = switcher.extra_memory
    return {
        "held": allocations.num_bytes() + second,
        "announced": memory.tracking + memory.residual + memory.second_adapter + memory.ledger + memory.samples,
        "parts": [memory.tracking, memory.residual, memory.second_adapter, memory.ledger],
        "directions": memory.directions,
        "broadcast": max((size for name, size in traffic.sent if name == "broadcast_"), default=0),
        "gathered": max((size for name, size in traffic.sent if name == "allreduce_"), default=0),
    }


@pytest.mark.parametrize(
    ("engine", "world_size", "precision", "zero"),
    [
        ("plain", 1, "fp32", {}),
        ("ddp", 2, "bf16", {}),
        ("zero2", 2, "nf4", {}),
        ("zero3", 2, "bf16", PARTITIONED),
        ("zero3", 2, "nf4", {}),
        ("fsdp2", 2, "bf16", {}),
    ],
)
@pytest.mark.parametrize("in_memory", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_memory_that_is_announced_is_what_is_held(
    engine: str, world_size: int, precision: str, zero: dict, in_memory: bool, tmp_path
) -> None:
    ledger = None if in_memory else str(tmp_path / "ledger")
    for seen in run_ranks(hold, world_size, engine, precision, zero, ledger, str(tmp_path)):
        assert seen["announced"] > 500
        assert abs(seen["announced"] - seen["held"]) <= 0.1 * seen["held"], seen
        if world_size > 1:  # what a switch holds is what it receives: directions, and of cut factors the rest
            received = seen["broadcast"] + seen["gathered"] * (engine in ("zero3", "fsdp2"))
            assert abs(seen["directions"] - received) <= 0.1 * received, seen
