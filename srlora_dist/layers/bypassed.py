"""Finds adapted layers that do not compute ``x W^T``: the model reads their weight, or other tensors make it.

At such a layer PEFT's adapter does nothing, or something else, so an edit of W would change the function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

PLAIN_WEIGHTS = (torch.Tensor, nn.Parameter)
KNOWN_WEIGHTS = ("DTensor", "Params4bit", "Int8Params")
"""Types by name: these packages may not be installed."""

LEAVE_OUT = "leave it out of target_modules"

Fault = tuple[str, str]
"""What is wrong with a layer, as the end of "a layer that ...", and the remedy."""


def find_bypassed(base: nn.Module, layers: dict[str, LoraLayer]) -> dict[str, Fault]:
    """Find the layers whose structure shows that they do not compute ``x W^T``, before anything is edited.

    Args:
        base: The model that the names belong to, not yet prepared.
        layers: Linear LoRA layers by name.
    """
    faults = {}
    for name, layer in layers.items():
        linear = layer.get_base_layer()
        parent = base.get_submodule(name.rpartition(".")[0])
        fault = _fault_of_weight(linear) or _fault_of_parent(parent, linear, layer) or _fault_of_forward(linear)
        if fault is not None:
            faults[name] = fault
    return faults


def _fault_of_weight(linear: nn.Module) -> Fault | None:
    if "weight" not in linear._parameters:
        return (
            "computes its weight from other tensors (weight norm, spectral norm, pruning or another parametrisation)",
            "make it a plain weight first, as torch.nn.utils.parametrize.remove_parametrizations and prune.remove do, "
            f"or {LEAVE_OUT}",
        )
    shape = (linear.nf, linear.nx) if isinstance(linear, Conv1D) else (linear.out_features, linear.in_features)
    if 0 in shape:
        return "has no inputs or no outputs", LEAVE_OUT
    kind = type(linear.weight)
    if kind in PLAIN_WEIGHTS or kind.__name__ in KNOWN_WEIGHTS:
        return None
    return (
        f"keeps its weight as a {kind.__module__}.{kind.__name__}",
        f"load it in a float type or with bitsandbytes, or {LEAVE_OUT}",
    )


def _fault_of_parent(parent: nn.Module, linear: nn.Module, layer: LoraLayer) -> Fault | None:
    """Notice modules of PyTorch that pass the weight of a child to a kernel, one of them only in evaluation mode."""
    children = {
        nn.MultiheadAttention: ("out_proj",),
        nn.TransformerEncoderLayer: ("linear1", "linear2"),
    }
    for kind, names in children.items():
        ours = type(parent).forward is kind.forward
        if ours and any(getattr(parent, name, None) in (linear, layer) for name in names):
            return f"nn.{kind.__name__} never calls, for it reads the weight", LEAVE_OUT
    return None


@torch.no_grad()
def _fault_of_forward(linear: nn.Module) -> Fault | None:
    """Try a layer whose class, instance or hooks may compute something else, except those of bitsandbytes."""
    kinds = {kind.__name__ for kind in type(linear).__mro__}
    ours = type(linear).forward in (nn.Linear.forward, Conv1D.forward) and "forward" not in vars(linear)
    hooked = linear._forward_hooks or linear._forward_pre_hooks
    if (ours and not hooked) or linear.weight.is_meta or kinds & {"Linear4bit", "Linear8bitLt"}:
        return None
    fault = f"computes something else than x W^T ({type(linear).__name__}.forward, or a hook)", LEAVE_OUT
    weight = linear.weight
    if weight.dim() != 2:  # zero.Init has cut it, so it cannot be tried
        return None if ours else fault
    generator = torch.Generator().manual_seed(0)
    weight = weight.T if isinstance(linear, Conv1D) else weight
    x = torch.randn(1, 3, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    try:
        wanted, got = functional.linear(x, weight, linear.bias), linear(x)
    except Exception:  # it wants other inputs than a linear layer
        return fault
    same = torch.is_tensor(got) and got.shape == wanted.shape
    rounding = max(1e-5, torch.finfo(weight.dtype).eps / 2)
    return None if same and float((got - wanted).norm()) <= rounding * float(wanted.norm()) else fault


def is_all_linear(base: nn.Module, config: PeftConfig, adapter_name: str) -> bool:
    """Whether ``target_modules="all-linear"`` chose an adapter's layers, so that the user has named none of them.

    PEFT does not keep the word: it puts the names of all linear layers in its place, or their endings if many.
    """
    if not isinstance(config.target_modules, (set, list)):
        return False
    again = copy(config)
    again.target_modules = "all-linear"
    wanted = set(_maybe_include_all_linear_layers(again, base).target_modules)
    copied = [name for name, module in base.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    wanted = {name for name in wanted if not any(name == c or name.startswith(f"{c}.") for c in copied)}
    if set(config.target_modules) - set(copied) == wanted:
        return True
    modules = base.named_modules()
    adapted = {name for name, module in modules if isinstance(module, LoraLayer) and adapter_name in module.scaling}
    return len(wanted) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION and wanted <= adapted


class Usage:
    """Notes during forward passes which layers were called, and of which the weight was used from outside.

    From outside means: it was read from PEFT's layer, or the layer inside was called, which a model may keep in a list.

    Attributes:
        called: For each layer, in the order given, whether it was called.
        read: For each layer whether its weight was read.
        types: Types of the layers' outputs, which autocast can make shorter than those of all weights.
    """

    def __init__(self, layers: list[LoraLayer]) -> None:
        self._numbers = {id(layer): number for number, layer in enumerate(layers)}
        self._layers = layers
        self.called, self.read = [False] * len(layers), [False] * len(layers)
        self.types: set[torch.dtype] = set()
        self._inside: set[int] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what happens inside."""
        whole = BaseTunerLayer.weight  # model code that knows nothing of PEFT reads this property

        def read(layer: BaseTunerLayer) -> Tensor:
            if id(layer) in self._numbers:
                self.read[self._numbers[id(layer)]] = True
            return whole.fget(layer)

        handles = [layer.register_forward_pre_hook(self._note_call) for layer in self._layers]
        handles += [layer.register_forward_hook(self._note_end, always_call=True) for layer in self._layers]
        for number, layer in enumerate(self._layers):
            handles.append(layer.get_base_layer().register_forward_pre_hook(partial(self._note_use, number)))
        BaseTunerLayer.weight = property(read)
        try:
            yield
        finally:
            BaseTunerLayer.weight = whole
            for handle in handles:
                handle.remove()

    def _note_call(self, layer: nn.Module, *_: object) -> None:
        self.called[self._numbers[id(layer)]] = True
        self._inside.add(self._numbers[id(layer)])

    def _note_end(self, layer: nn.Module, _: tuple, output: object) -> None:
        self._inside.discard(self._numbers[id(layer)])
        if torch.is_tensor(output):
            self.types.add(output.dtype)

    def _note_use(self, number: int, *_: object) -> None:
        """The layer inside of PEFT's was called: by PEFT's, or by a model that keeps its layers in a list."""
        if number not in self._inside:
            self.read[number] = True
