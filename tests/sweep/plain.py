"""Small modules of plain PyTorch that use a weight in every way seen in public code."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune


class Block(nn.Module):
    """A linear layer before and after whatever is tried; its inputs are vectors in a sequence."""

    def __init__(self, middle: nn.Module | None = None, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.middle = middle if middle is not None else nn.Linear(16, width)
        self.last = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.use(torch.tanh(self.first(x))))

    def use(self, x: Tensor) -> Tensor:
        """Pass it through the middle."""
        return self.middle(x)


class SelfAttention(Block):
    def use(self, x: Tensor) -> Tensor:
        return self.middle(x, x, x)[0]


class Reads(Block):
    """Never calls the layer."""

    def use(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.middle.weight, self.middle.bias)


class KeepsLayers(Block):
    """Calls what it has put into a list before PEFT came, as MaskFormer does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.middle, torch.tanh]

    def use(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class CallsAndReads(Block):
    def use(self, x: Tensor) -> Tensor:
        return self.middle(x) + functional.linear(x, self.middle.weight)


class ReadsInEvaluation(Block):
    """A fast path for inference, as nn.TransformerEncoderLayer has one."""

    def use(self, x: Tensor) -> Tensor:
        return self.middle(x) if self.training else functional.linear(x, self.middle.weight, self.middle.bias)


class ReadsDetached(Block):
    """Behind .data, as code for export and for penalties does it."""

    def use(self, x: Tensor) -> Tensor:
        return x @ self.middle.weight.data.T


class Penalty(Block):
    """The weight goes into a second output alone."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(x), "penalty": self.middle.weight.square().sum().reshape(1)}


class AsksForType(Block):
    """Reads the type and the device of a weight alone, as transformers does everywhere."""

    def use(self, x: Tensor) -> Tensor:
        return self.middle(x.to(self.middle.weight.dtype).to(self.middle.weight.device))


class Twice(Block):
    def use(self, x: Tensor) -> Tensor:
        return self.middle(torch.tanh(self.middle(x)))


class Unused(Block):
    """A branch that is not taken."""

    def use(self, x: Tensor) -> Tensor:
        return x


class Routed(Block):
    """Tokens choose one of two experts; none chooses the second."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(16, 16)

    def use(self, x: Tensor) -> Tensor:
        return self.middle(x) if x.sum() > -1e9 else self.other(x)


class InTraining(Block):
    """A head that evaluation leaves out."""

    def use(self, x: Tensor) -> Tensor:
        return self.middle(x) if self.training else x


class SharedModule(Block):
    """The same layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.middle

    def use(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.middle(x)))


class TiedWeight(Block):
    def __init__(self) -> None:
        super().__init__()
        self.middle.weight = self.first.weight


class FakeQuantised(nn.Linear):
    """As for training that knows of quantisation: the weight is rounded at each call."""

    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.abs().amax() / 7
        return functional.linear(x, (self.weight / step).round() * step, self.bias)


class PlainSubclass(nn.Linear):
    """With a forward of its own that is that of nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class QuietSubclass(nn.Linear):
    """With nothing of its own, as nn.modules.linear.NonDynamicallyQuantizableLinear."""


class Standardised(nn.Linear):
    """Normalises its rows at each call."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, functional.normalize(self.weight, dim=1), self.bias)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


class VisionAttention(nn.Module):
    """Attention of torchvision's Swin: reads qkv.weight and proj.weight."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = functional.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        mixed = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
        return functional.linear(mixed, self.proj.weight, self.proj.bias)


class VisionBlock(nn.Module):
    """A block of torchvision's ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.self_attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        y = x + self.self_attention(y, y, y, need_weights=False)[0]
        return y + self.mlp(self.ln_2(y))


class Decoder(Block):
    def __init__(self) -> None:
        layer = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        super().__init__(nn.TransformerDecoder(layer, 2))

    def use(self, x: Tensor) -> Tensor:
        return self.middle(x, x.flip(1))


class FusedKernel(Block):
    """Computes base and pair at once, as Axolotl's kernels do: it knows of the first active adapter alone."""

    def use(self, x: Tensor) -> Tensor:
        layer = self.middle
        if not hasattr(layer, "active_adapters"):
            return layer(x)
        name = layer.active_adapters[0]
        base = layer.base_layer
        pair = x @ layer.lora_A[name].weight.T @ layer.lora_B[name].weight.T
        return functional.linear(x, base.weight, base.bias) + layer.scaling[name] * pair


class FusedForward(FusedKernel):
    """Puts such a kernel in the place of the forward of PEFT's layer, on its first call."""

    def use(self, x: Tensor) -> Tensor:
        layer = self.middle
        if hasattr(layer, "active_adapters") and "forward" not in vars(layer):
            layer.forward = super().use
        return layer(x)


def encoder(norm_first: bool = False) -> nn.Module:
    """Two layers; in evaluation mode without gradients PyTorch takes its fast path."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    return Block(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def hooked(module: nn.Module, hook: object) -> nn.Module:
    """With a hook that computes the weight at each call."""
    hook(module.middle)
    return module


def pruned(linear: nn.Linear) -> None:
    prune.l1_unstructured(linear, "weight", amount=0.5)


def converged(linear: nn.Linear) -> None:
    """With so many iterations per call that a call does not move the weight."""
    nn.utils.spectral_norm(linear, n_power_iterations=500)
    linear(torch.zeros(1, 16))


def rewritten_by_a_hook(linear: nn.Linear) -> None:
    """A forward hook that scales the output: harmless, for it sees the layer's output as before."""
    linear.register_forward_hook(lambda module, args, output: 2 * output)


def flax_style_tail(linear: nn.Linear) -> None:
    """The instance has a forward of its own that computes something else."""
    linear.forward = lambda x: functional.linear(x, linear.weight.clamp(-0.1, 0.1), linear.bias)


def compiled_forward(linear: nn.Linear) -> None:
    """The instance has a forward of its own that wraps the class's, as accelerate's hooks leave one."""
    old = linear.forward
    linear.forward = lambda *args, **kwargs: old(*args, **kwargs)


PLAIN = {
    "linear": Block,
    "nn.MultiheadAttention": lambda: SelfAttention(nn.MultiheadAttention(16, 4, batch_first=True)),
    "nn.MultiheadAttention kdim": lambda: SelfAttention(nn.MultiheadAttention(16, 4, batch_first=True, kdim=16)),
    "nn.TransformerEncoder": encoder,
    "nn.TransformerEncoder norm_first": lambda: encoder(norm_first=True),
    "nn.TransformerDecoder": Decoder,
    "torchvision ViT": lambda: Block(VisionBlock()),
    "torchvision Swin": lambda: Block(VisionAttention()),
    "weight_norm old": lambda: hooked(Block(), nn.utils.weight_norm),
    "weight_norm": lambda: hooked(Block(), parametrizations.weight_norm),
    "spectral_norm old": lambda: hooked(Block(), converged),
    "spectral_norm": lambda: hooked(Block(), parametrizations.spectral_norm),
    "orthogonal": lambda: hooked(Block(), parametrizations.orthogonal),
    "utils.prune": lambda: hooked(Block(), pruned),
    "parametrize": lambda: hooked(Block(), lambda x: parametrize.register_parametrization(x, "weight", Symmetric())),
    "fake-quantising": lambda: Block(FakeQuantised(16, 16)),
    "standardised": lambda: Block(Standardised(16, 16)),
    "plain subclass": lambda: Block(PlainSubclass(16, 16)),
    "quiet subclass": lambda: Block(QuietSubclass(16, 16)),
    "forward replaced": lambda: hooked(Block(), flax_style_tail),
    "forward wrapped": lambda: hooked(Block(), compiled_forward),
    "output hook": lambda: hooked(Block(), rewritten_by_a_hook),
    "reads": Reads,
    "keeps layers": KeepsLayers,
    "calls and reads": CallsAndReads,
    "reads in evaluation": ReadsInEvaluation,
    "reads detached": ReadsDetached,
    "penalty": Penalty,
    "asks for type": AsksForType,
    "used twice": Twice,
    "unused branch": Unused,
    "routed": Routed,
    "in training alone": InTraining,
    "shared module": SharedModule,
    "tied weight": TiedWeight,
    "fused kernel": FusedKernel,
    "fused forward": FusedForward,
}
