"""What a plan says of each rank against what real engines hold and send."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.commands.plan.blueprint import Blueprint, draw_from
from srlora_dist.commands.plan.communication import start_up, switches
from srlora_dist.commands.plan.memory import Forecast
from srlora_dist.config.run import ModelOptions, RunConfig, TrainOptions
from srlora_dist.engine.precision import cast_trainable_
from srlora_dist.layers.site import FUSED
from tests.ranks.engines import Engine, make_batch, make_odd_net, prepare
from tests.ranks.test_agreement import Traffic
from tests.ranks.world import run_ranks

NUM_STEPS, TARGET = 12, 7
KINDS = {
    "allreduce_": "all-reduce",
    "broadcast_": "broadcast",
    "gather_": "gather",
    "_allgather_base_": "all-gather",
}


class Handed(Traffic):
    """Notes what this rank hands over: the second argument of a gather, whose first one is the result."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            tensors = [leaf for leaf in tree_leaves(args["gather" in name]) if isinstance(leaf, Tensor)]
            self.sent.append((KINDS.get(name, name), sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def held(tensors: Iterable[Tensor], counted: set[int]) -> int:
    """Bytes of the memory behind tensors, each piece once and none that was counted before."""
    total = 0
    for tensor in tensors:
        tensor = tensor.detach()
        memory = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage()
        if memory.nbytes() and memory.data_ptr() not in counted:
            counted.add(memory.data_ptr())
            total += memory.nbytes()
    return total


def parts_of(parameter: nn.Parameter) -> list[Tensor]:
    """What a rank has of a parameter: under ZeRO-3 its run, and the whole one where that is kept."""
    if not hasattr(parameter, "ds_tensor"):
        return [parameter]
    return [parameter.ds_tensor, *([parameter] if parameter.ds_status.name == "AVAILABLE" else [])]


def scales_of(model: nn.Module) -> list[Tensor]:
    """Of bitsandbytes layers."""
    found = []
    for layer in (module for module in model.modules() if type(module).__name__ == "Linear8bitLt"):
        if not hasattr(layer, "base_layer"):
            found.append(layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB)
    for layer in (module for module in model.modules() if type(module).__name__ == "Linear4bit"):
        if hasattr(layer, "base_layer"):
            continue
        state = getattr(layer.weight, "quant_state", None) or layer.quant_state
        nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
        found += [state.absmax, state.code, *nested]
    return found


def gradients(engine: Engine, storage: object, found: list[int]) -> None:
    """Note the bytes of gradients whenever the optimizer steps."""

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        tensors = [p.grad for p in engine.model.parameters()]
        tensors += [owner.grad for group in optimizer.param_groups for owner in group["params"]]
        if hasattr(engine.optimizer, "grad_partitions_flat_buffer"):  # ZeRO-3
            tensors.append(engine.optimizer.grad_partitions_flat_buffer)
        elif hasattr(engine.optimizer, "averaged_gradients"):  # ZeRO-1 and 2
            tensors += [t for group in engine.optimizer.averaged_gradients.values() for t in group or ()]
        found.append(held((tensor for tensor in tensors if tensor is not None), set()))

    storage.optimizer.register_step_pre_hook(note)


def measure(switcher: Switcher, engine: Engine, of_gradients: list[int]) -> dict[str, int]:
    """Bytes of each part, as ``forecast.Held`` names them."""
    storage, counted = switcher.storage, set()
    storage.to_rest_layout_()
    named = dict(engine.model.named_parameters())
    second = [p for name, p in named.items() if f".{FUSED}." in name]
    frozen = [p for name, p in named.items() if not p.requires_grad and f".{FUSED}." not in name]
    trained = [p for p in named.values() if p.requires_grad]
    state = storage.optimizer.state
    stepped = {id(run.owner): run.owner for run in storage.held}
    stepped |= {id(owner): owner for owner in state}
    moments = [
        moment for each in state.values() for moment in each.values() if torch.is_tensor(moment) and moment.dim()
    ]
    averages = [t for each in switcher.statistics._statistics.values() for t in each]
    entries = list(switcher.ledger.entries()) if switcher.ledger is not None else []
    return {
        "base_weights": held([t for p in frozen for t in parts_of(p)], counted) + held(scales_of(engine.model), set()),
        "adapter_weights": held([t for p in trained for t in parts_of(p)], counted),
        "gradients": max(of_gradients),
        "optimizer_state": held([*stepped.values(), *moments], counted),
        "moving_averages": held(averages, counted),
        "residual": held(storage.residuals.values(), counted),
        "second_adapter": held([t for p in second for t in parts_of(p)], counted),
        "ledger": sum(tensor.nbytes for entry in entries for tensor in entry.values()),
    }


def draw(name: str, world_size: int, precision: str, threshold: int, optimizer: str) -> Blueprint:
    """The blueprint of the model that ``engines.py`` prepares, drawn from its weights before they are quantised."""
    quantised = precision not in ("fp32", "bf16")
    kind, _, double = precision.partition("-")
    config = RunConfig(
        engine=name,
        model=ModelOptions(quantization=kind if quantised else "none", double_quantization=bool(double)),
        srlora=SRLoRAConfig(target_rank=TARGET),
        train=TrainOptions(max_steps=NUM_STEPS, optimizer=optimizer),
    )
    model = make_odd_net("fp32" if quantised else precision)
    if precision == "bf16" and name.startswith("zero"):
        cast_trainable_(model, "bfloat16")  # DeepSpeed converts all of it
    return draw_from(model, config, world_size, threshold, groups_of(model))


def groups_of(model: nn.Module) -> list[list[nn.Parameter]]:
    """Of the optimizer, as ``engines.py`` makes them."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [[p for n, p in trained if ("lora_B" in n) == second] for second in (False, True)]


def run(rank: int, world_size: int, name: str, precision: str, zero: dict, folder: str, kind: str) -> dict:
    """Train through all switches; what is held, by part, and what was sent, by phase."""
    model, of_gradients, sent = make_odd_net(precision), [], []
    switcher = Switcher(model, SRLoRAConfig(target_rank=TARGET, svd_cache=folder), NUM_STEPS)
    settings = {"zero_allow_untested_optimizer": True}  # SGD is one, and Accelerate sets this too
    settings |= {"bf16": {"enabled": True}} if precision == "bf16" else {}
    sgd = torch.optim.SGD([{"params": group} for group in groups_of(model)], lr=1e-2, momentum=0.9)
    engine = prepare(name, model, 1e-2, 0.5, 1, settings, sgd if kind == "sgd" else None, **zero)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with Handed() as traffic:
        switcher.bind(engine.model, engine.optimizer)
        sent.append(traffic.take())
        gradients(engine, switcher.storage, of_gradients)
        for step in range(NUM_STEPS):
            x, y = (t.chunk(world_size)[rank] for t in make_batch(step))
            engine.backward((engine.model(x.to(dtype)).float() - y).square().mean())
            engine.step()
            traffic.take()
            if switcher.step() is not None:
                sent.append(traffic.take())
                if switcher.num_steps == switcher.due_steps[-2]:  # the largest: the averages are still needed
                    switcher.save_checkpoint(f"{folder}/checkpoints")
    extra = asdict(switcher.extra_memory)
    del extra["samples"]  # a few kB per site at the most, which a plan leaves out
    return {"held": measure(switcher, engine, of_gradients), "sent": sent, "announced": extra}


CUT = {"stage3_param_persistence_threshold": 0}
RUNS = {
    "plain": ("plain", 1, "fp32", {}),
    "plain, nf4, double": ("plain", 1, "nf4-double", {}),
    "ddp": ("ddp", 2, "fp32", {}),
    "ddp, bf16": ("ddp", 2, "bf16", {}),
    "ddp, int8": ("ddp", 2, "int8", {}),
    "ddp, sgd": ("ddp", 2, "fp32", {}),
    "zero0": ("zero0", 2, "fp32", {}),
    "zero0, bf16": ("zero0", 2, "bf16", {}),
    "zero0, bf16, sgd": ("zero0", 2, "bf16", {}),
    "zero1": ("zero1", 2, "fp32", {}),
    "zero2": ("zero2", 2, "fp32", {}),
    "zero2, uneven, bf16": ("zero2", 3, "bf16", {}),
    "zero2, sgd": ("zero2", 2, "fp32", {}),
    "zero3": ("zero3", 2, "fp32", CUT),
    "zero3, empty runs, bf16": ("zero3", 4, "bf16", CUT),
    "zero3, some persistent": ("zero3", 2, "bf16", {"stage3_param_persistence_threshold": 100}),
    "zero3, nf4": ("zero3", 2, "nf4", CUT),
    "fsdp2, empty shards": ("fsdp2", 4, "fp32", {}),
    "fsdp2, bf16": ("fsdp2", 2, "bf16", {}),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_plan_is_what_an_engine_holds_and_sends(case: str, tmp_path) -> None:
    """Part by part and message by message, to the byte; gradients of ZeRO-1 and 2 but for DeepSpeed's padding."""
    name, world_size, precision, zero = RUNS[case]
    optimizer = "sgd" if "sgd" in case else "adamw"
    arguments = name, precision, zero, str(tmp_path), optimizer
    # One rank runs in this process, where there is no process group.
    ranks = [run(0, 1, *arguments)] if world_size == 1 else run_ranks(run, world_size, *arguments)
    blueprint = draw(name, world_size, precision, zero.get("stage3_param_persistence_threshold", 100_000), optimizer)
    forecast = Forecast(blueprint)
    phases = switches(blueprint)
    phases[0] = [*start_up(blueprint, cold=True), *phases[0]]
    for rank, seen in enumerate(ranks):
        planned = asdict(forecast.held(rank))
        announced = {"directions": planned.pop("during_switch"), "tracking": planned["moving_averages"]}
        announced |= {part: planned[part] for part in ("residual", "second_adapter", "ledger")}
        if name in ("zero1", "zero2"):
            assert seen["held"].pop("gradients") == pytest.approx(planned.pop("gradients"), rel=0.05)
        assert seen["held"] == planned
        assert seen["sent"] == [[(message.kind, message.num_bytes) for message in phase] for phase in phases]
        assert seen["announced"] == announced
    files = Path(f"{tmp_path}/checkpoints").rglob("*.safetensors")
    saved = sum(tensor.nbytes for path in files for tensor in load_file(path).values())
    assert saved == forecast.checkpoint_bytes(len(blueprint.due_steps) - 1) == forecast.largest_checkpoint()
