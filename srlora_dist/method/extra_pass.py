"""Calls a model an extra time beside its training, and leaves no trace of the call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

NUM_SAMPLES = 1 << 16
"""Most elements that are kept of each output tensor: logits can be larger than the model."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def sample_outputs(call: Callable[[], object]) -> list[Tensor]:
    """Call a model and take evenly spaced elements, in float32, of each floating-point tensor in its nested output.

    A compiled model is called as it was written. Collective: a forward pass.
    """
    with _uncompiled():
        return samples(call())


def samples(output: object) -> list[Tensor]:
    """At most ``NUM_SAMPLES`` elements of each floating-point tensor in an output."""
    leaves = [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf)]
    if not leaves and hasattr(output, "__dict__"):  # a data class that is not registered
        leaves = [leaf for leaf in tree_leaves(list(vars(output).values())) if torch.is_tensor(leaf)]
    flat = (leaf.detach().reshape(-1) for leaf in leaves if leaf.is_floating_point() and leaf.numel())
    return [tensor[:: -(-tensor.numel() // NUM_SAMPLES)].float().clone() for tensor in flat]


def _uncompiled() -> AbstractContextManager:
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the buffers that a forward pass changes, such as the averages of a batch norm."""
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    yield
    for module, name, buffer, kept in before:
        module._buffers[name] = buffer
        buffer.copy_(kept)


def set_compiled_calls_aside_(model: nn.Module) -> list[tuple[nn.Module, object]]:
    """Undo ``module.compile()`` for a while, so that modules and their hooks are called as written.

    Returns:
        Each such module with the compiled call to put back.
    """
    compiled = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl]
    for module, _ in compiled:
        module._compiled_call_impl = None
    return compiled


def copy_inputs(inputs: object) -> object:
    """Copy inputs, because a forward pass may change them and the batch's own pass needs them as they were.

    Raises:
        TypeError: Something in the inputs cannot be copied, such as a generator.
    """

    def copy(leaf: object) -> object:
        return leaf.detach().clone() if torch.is_tensor(leaf) else deepcopy(leaf)

    return tree_map(copy, inputs)
