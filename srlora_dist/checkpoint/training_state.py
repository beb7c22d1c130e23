"""The trained parameters and their optimizer's moments as whole tensors by name, the same on any engine and world size.

Each rank's optimizer holds a span of a parameter: all of it, some rows, or a part of a flat fragment. To save, the fp32
weights and each of the moments are put together on rank 0. To restore, they are cut again, perhaps in another way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from srlora_dist.checkpoint.format import BUFFERS, MOMENTS, TRAINED
from srlora_dist.layers.adapter import find_peft_model
from srlora_dist.storage.base import Storage
from srlora_dist.storage.factor_spans import OwnedSpan
from srlora_dist.storage.optimizer_trial import why_not_saved

SAME_STATE = {"Adam": "AdamW", "DeepSpeedCPUAdam": "AdamW", "FusedAdam": "AdamW"}
"""Optimizers that keep the same state as another one."""

GROUP_NUMBERS = ("lr", "step")
SCALER_NUMBERS = ("cur_scale", "cur_iter", "cur_hysteresis", "last_overflow_iter")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All trainable parameters by their names in the PEFT model, whatever it is wrapped in."""
    peft_model = find_peft_model(model)
    return {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def gather_training_state(
    model: nn.Module, storage: Storage, buffers: dict[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, object]]:
    """The trained parameters, their moments, and the numbers that the optimizer keeps beside them.

    Args:
        model: The prepared model.
        storage: How the ranks hold the model.
        buffers: Buffers that a resumed run needs, such as the averages of a batch norm. Those of rank 0 are kept.

    Returns:
        Whole tensors in float32 by file and name, on rank 0 (empty files on the other ranks), and entries of
        ``state.json``.

    Collective: every rank must call it; gathers the weights and each moment, see ``Collectives.gather_to_0``.

    Raises:
        ValueError: The optimizer's state cannot be cut into spans.
    """
    parameters = trained_parameters(model)
    names, shapes = list(parameters), [storage.whole_shape(parameter) for parameter in parameters.values()]
    sizes = [shape.numel() for shape in shapes]
    spans = [storage.owned_span(parameter) for parameter in parameters.values()]
    scalars, kinds = _optimizer_state(storage, dict(zip(names, spans, strict=True)))

    def gather(read: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
        held = [(j, span, read(span.owner)) for j, span in enumerate(spans) if span.numel]
        parts = [(j, span.start, span.of(tensor)) for j, span, tensor in held if tensor is not None]
        wholes = storage.gather_to_0(sizes, parts, storage.cuts_optimizer)
        return {name: whole.view(shape) for name, whole, shape in zip(names, wholes, shapes, strict=bool(wholes))}

    moments = {}
    for kind in kinds:
        wholes = gather(lambda owner, kind=kind: storage.optimizer.state.get(owner, {}).get(kind))
        moments |= {f"{kind}.{name}": whole for name, whole in wholes.items() if name in scalars}
    groups = [
        {key: float(group[key]) for key in GROUP_NUMBERS if key in group} for group in storage.optimizer.param_groups
    ]
    optimizer = {"name": type(storage.optimizer).__name__, "moments": kinds, "scalars": scalars, "groups": groups}
    if storage.loss_scaler is not None:
        scaler = vars(storage.loss_scaler)
        optimizer["loss_scaler"] = {key: scaler[key] for key in SCALER_NUMBERS if key in scaler}
    state = {"trainable": dict(zip(names, map(list, shapes), strict=True)), "optimizer": optimizer}
    buffers = {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()}
    files = {TRAINED: gather(lambda owner: owner), MOMENTS: moments, BUFFERS: buffers}
    return files, {**state, "buffers": sorted(buffers)}


def require_same_training(model: nn.Module, storage: Storage, state: dict[str, object]) -> None:
    """Check that a training state is of the same parameters and the same optimizer.

    Raises:
        ValueError: It is not. The message names the first difference and the remedy.
    """
    parameters = trained_parameters(model)
    shapes = {name: list(storage.whole_shape(parameter)) for name, parameter in parameters.items()}
    for name in [*state["trainable"], *shapes]:
        theirs, ours = state["trainable"].get(name), shapes.get(name)
        if theirs != ours:
            raise ValueError(
                f"the checkpoint has {name} as {theirs}, and the model trains it as {ours}: resume with the same model "
                "and the same options of LoRA"
            )
    theirs, ours = state["optimizer"]["name"], type(storage.optimizer).__name__
    if state["optimizer"]["moments"] and SAME_STATE.get(theirs, theirs) != SAME_STATE.get(ours, ours):
        raise ValueError(f"the checkpoint was made with {theirs}, and the optimizer is {ours}: use {theirs}")
    num_groups = len(state["optimizer"]["groups"]), len(storage.optimizer.param_groups)
    if num_groups[0] != num_groups[1]:
        raise ValueError(
            f"the optimizer of the checkpoint had {num_groups[0]} groups of parameters, and this one has "
            f"{num_groups[1]}: build it in the same way"
        )


@torch.no_grad()
def restore_training_state_(
    model: nn.Module, storage: Storage, state: dict[str, object], read: Callable[[str, str], Tensor]
) -> None:
    """Put back what :func:`gather_training_state` returned, into the spans that this rank holds now.

    Args:
        model: The prepared model.
        storage: How the ranks hold the model.
        state: The entries of ``state.json``, on every rank.
        read: Returns a tensor by file and name; called on rank 0 only.

    Collective: every rank must call it; sends the weights and each moment, see ``Collectives.scatter_from_0``.

    Raises:
        ValueError: A tensor cannot be read.
    """
    parameters, optimizer = trained_parameters(model), storage.optimizer
    names = list(parameters)
    sizes = [storage.whole_shape(parameter).numel() for parameter in parameters.values()]
    spans = {name: storage.owned_span(parameter) for name, parameter in parameters.items()}
    for number, whole in storage.scatter_from_0(sizes, lambda j: read(TRAINED, names[j])):
        parameter, owned = parameters[names[number]], spans[names[number]]
        for span, start in [(owned.of(owned.owner), owned.start), *storage.writable_copies_(parameter)]:
            span.copy_(whole[start : start + span.numel()])
    buffers = dict(find_peft_model(model).named_buffers())
    for name in state["buffers"]:
        saved_buffer = storage.on_rank_0(f"read {name}", lambda name=name: read(BUFFERS, name))
        buffers[name].copy_(storage.broadcast_object(saved_buffer))
    saved = state["optimizer"]
    stepped = [name for name in names if name in saved["scalars"]]
    sizes = [size for name, size in zip(names, sizes, strict=True) if name in saved["scalars"]]
    for owned in spans.values():  # the optimizer's groups are no use: ZeRO-3 fills them only during a step
        optimizer.state[owned.owner] = {}
    for kind in saved["moments"]:
        for number, whole in storage.scatter_from_0(sizes, lambda j, kind=kind: read(MOMENTS, f"{kind}.{stepped[j]}")):
            owned = spans[stepped[number]]
            if owned.numel:
                moment = optimizer.state[owned.owner].setdefault(kind, torch.zeros_like(owned.owner.detach()))
                owned.of(moment).copy_(whole[owned.start : owned.start + owned.numel])
    for name in stepped:
        if spans[name].numel:
            _restore_scalars_(optimizer, spans[name].owner, saved["scalars"][name])
    for group, numbers in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update({key: int(value) if key == "step" else value for key, value in numbers.items()})
    if storage.loss_scaler is not None:
        vars(storage.loss_scaler).update(saved.get("loss_scaler", {}))


def _optimizer_state(storage: Storage, spans: dict[str, OwnedSpan]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """The optimizer's numbers for each parameter that was ever stepped, and the names of all moments.

    Collective: an all-gather of both, because a rank that holds nothing of a parameter has no state of it.
    """
    scalars, kinds, error = {}, set(), None
    for name, span in spans.items():
        state = storage.optimizer.state.get(span.owner, {}) if span.numel else {}
        for key, value in state.items():
            problem = why_not_saved(type(storage.optimizer).__name__, key, value, span.owner)
            if problem is not None:
                error = ValueError(problem)
            elif not torch.is_tensor(value) or value.dim() == 0:
                scalars.setdefault(name, {})[key] = float(value)
            else:
                scalars.setdefault(name, {})
                kinds.add(key)
    storage.raise_together(error)
    everywhere, all_kinds = {}, set()
    for theirs, their_kinds in storage.gather_objects((scalars, sorted(kinds))):
        everywhere |= theirs
        all_kinds |= set(their_kinds)
    return everywhere, sorted(all_kinds)


def _restore_scalars_(optimizer: torch.optim.Optimizer, owner: Tensor, numbers: dict[str, float]) -> None:
    """Restore step counts and the like, in the form in which this optimizer keeps them."""
    on_device = optimizer.defaults.get("capturable") or optimizer.defaults.get("fused")
    for key, value in numbers.items():
        if type(optimizer).__module__.startswith("torch."):
            place = owner.device if on_device else "cpu"
            optimizer.state[owner][key] = torch.tensor(value, dtype=torch.float32, device=place)
        else:
            optimizer.state[owner][key] = int(value)
