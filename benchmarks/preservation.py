"""How much of what is fused arrives in the weight: ours beside PEFT's merge and beside adding in place.

One layer, in each type of weights, lives through the same switches three times. Before each, its pairs are set to what
training might have made of them (a pair is ``--delta`` of the weight's norm). Then one pair is fused and a new
direction is taken out, as SRLoRA does; the peers do the one after the other. The wanted changes of the weight are known
exactly, so that three things can be read off:

- realised: projection of the change of the weight on the fused pair, 1 if nothing is lost (mean and spread);
- output: relative change of the layer's output at a switch, which should be none (median and largest);
- drift: distance of the weight from the exact sum, relative to its norm, after 126 and after all switches.

    python benchmarks/preservation.py [--switches 500] [--rows 520] [--columns 512]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import torch
from bitsandbytes import functional
from bitsandbytes import nn as quantised_nn
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package may not be installed

from srlora_dist import SRLoRAConfig, Switcher  # noqa: E402

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "nf4": None, "int8": None}
METHODS = ("ours", "PEFT merge", "add in place")
RANK, EARLY = 2, 126
RESULTS = Path(__file__).parent / "results" / "preservation.jsonl"


def make_layer(kind: str, weight: Tensor) -> nn.Module:
    """A linear layer that holds a weight (m, n) in this type; quantised ones compute in float32."""
    m, n = weight.shape
    if kind == "nf4":
        layer = quantised_nn.Linear4bit(n, m, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.weight = quantised_nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    elif kind == "int8":
        layer = quantised_nn.Linear8bitLt(n, m, bias=False, has_fp16_weights=False, threshold=0.0)
        layer.weight = quantised_nn.Int8Params(weight.clone(), requires_grad=False)
    else:
        layer = nn.Linear(n, m, bias=False)
        layer.weight = nn.Parameter(weight.to(TYPES[kind], copy=True), requires_grad=False)
    return layer.to("cpu")  # quantises


def dense(layer: nn.Module) -> Tensor:
    """The weight that a layer stands for, (m, n) in float64."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        return functional.dequantize_4bit(weight.data, weight.quant_state).double()
    if weight.dtype == torch.int8:
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return functional.int8_vectorwise_dequant(weight.data, scales).double()
    return weight.detach().double()


class Contender:
    """The layer under one of the methods, with the live pairs of an adapter beside it."""

    def __init__(self, method: str, kind: str, weight: Tensor) -> None:
        self.method = method
        net = nn.Sequential(make_layer(kind, weight))
        net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind == "nf4", kind == "int8"  # PEFT then takes its own layers
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
        self.model = get_peft_model(net, config)
        self.lora = self.model.base_model.model[0]
        for rank in (1, RANK) if method == "PEFT merge" else ():  # what is merged goes through these
            self.model.add_adapter(f"fuse{rank}", LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]))
        self.start = self.exact = dense(self.lora.get_base_layer())
        self.output_type = TYPES[kind] or torch.float32
        self.realised: list[float] = []
        self.changes: list[float] = []

    @property
    def weight(self) -> Tensor:
        """What stands for W now."""
        total = dense(self.lora.get_base_layer()).detach()
        if "srlora_fused" in self.lora.lora_A:
            a, b = (
                factors["srlora_fused"].weight.detach().double() for factors in (self.lora.lora_A, self.lora.lora_B)
            )
            total = total + self.lora.scaling["srlora_fused"] * b @ a
        return total

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of the live pairs."""
        return self.lora.lora_A["default"].weight, self.lora.lora_B["default"].weight

    @torch.no_grad()
    def output(self, x: Tensor) -> Tensor:
        """Of the whole layer, adapters included."""
        return self.model(x.to(self.output_type)).double()

    def note_fusion(
        self, before: Tensor, fused: tuple[Tensor, Tensor], beside: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Note how much of a fused pair is in the weight that it lacked before, beside a direction taken out."""
        moved, wanted = self.weight - before, product(*fused)
        if beside is not None:
            moved = moved + product(*beside)
        self.realised.append(float((moved * wanted).sum() / wanted.square().sum()))

    def drift(self) -> float:
        """Distance from the exact sum, relative."""
        return float((self.weight - self.exact).norm() / self.exact.norm())

    def figures(self, early: float | None) -> dict[str, float | None]:
        """Over all switches."""
        realised, changes = torch.tensor(self.realised), torch.tensor(self.changes)
        return {
            "realised": realised.mean().item(),
            "realised_spread": realised.std().item(),
            "output_median": changes.median().item(),
            "output_largest": changes.max().item(),
            f"drift_{EARLY}": early,
            "drift": self.drift(),
        }

    @torch.no_grad()
    def add(self, left: Tensor, right: Tensor) -> None:
        """Fuse ``left @ right`` as the peers do."""
        if self.method == "add in place":
            weight = self.lora.get_base_layer().weight
            weight += (left @ right).to(weight.dtype)
            return
        name = f"fuse{left.shape[1]}"
        self.lora.lora_A[name].weight.data, self.lora.lora_B[name].weight.data = right.clone(), left.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of the rounding that is measured here
            self.lora.merge(adapter_names=[name])
        self.lora.merged_adapters.clear()


def run(kind: str, num_switches: int, shape: tuple[int, int], delta: float) -> dict[str, dict[str, float]]:
    """All methods through the same switches; gives each one's figures."""
    torch.manual_seed(0)
    weight = torch.randn(shape) / shape[1] ** 0.5
    x = torch.randn(32, shape[1])
    names = [name for name in METHODS if not (TYPES[kind] is None and name == "add in place")]  # nothing to add to
    contenders = {name: Contender(name, kind, weight) for name in names}
    ours = contenders["ours"]
    early = {}
    with tempfile.TemporaryDirectory() as folder:
        # The step after the last switch is left out of the schedule, so one more is planned.
        options = SRLoRAConfig(target_rank=RANK + num_switches + 1, fusion_ratio=1 / RANK, svd_cache=folder)
        switcher = Switcher(ours.model, options, num_switches + 1)
        optimizer = torch.optim.SGD([p for p in ours.model.parameters() if p.requires_grad], lr=0.0)
        switcher.bind(ours.model, optimizer)
        follow(contenders, None, live_pairs(ours, range(RANK)))
        for number in tqdm(range(1, num_switches + 1), desc=kind, leave=False):
            for factor in ours.factors:
                factor.grad = torch.zeros_like(factor)
            optimizer.step()
            pretend_training(contenders, delta * float(weight.norm()))
            before = {name: (c.output(x), c.weight) for name, c in contenders.items()}
            factors = [factor.detach().clone() for factor in ours.factors]
            (part,) = switcher.step().sites
            fused, taken = (factors[1][:, part.slots], factors[0][part.slots]), live_pairs(ours, part.slots)
            ours.note_fusion(before["ours"][1], fused, beside=taken)
            follow(contenders, fused, taken)
            for name, contender in contenders.items():
                output = before[name][0]
                contender.changes.append(float((contender.output(x) - output).norm() / output.norm()))
                if number == EARLY:
                    early[name] = contender.drift()
    return {name: contender.figures(early.get(name)) for name, contender in contenders.items()}


def live_pairs(contender: Contender, slots: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Columns (m, k) and rows (k, n) of these slots."""
    a, b = (factor.detach().clone() for factor in contender.factors)
    return b[:, list(slots)], a[list(slots)]


@torch.no_grad()
def pretend_training(contenders: dict[str, Contender], size: float) -> None:
    """Give every live pair the same random values for all methods; each has this norm."""
    shapes = [factor.shape for factor in contenders["ours"].factors]
    a, b = (nn.functional.normalize(torch.randn(shape), dim=dim) for shape, dim in zip(shapes, (1, 0), strict=True))
    for contender in contenders.values():
        for factor, value in zip(contender.factors, (a, b), strict=True):
            factor.copy_(value * size**0.5)


@torch.no_grad()
def follow(contenders: dict[str, Contender], fused: tuple[Tensor, Tensor] | None, taken: tuple[Tensor, Tensor]) -> None:
    """Let the peers do the switch that ours has just done, and note what the weight of each should be now."""
    for contender in contenders.values():
        if contender.method != "ours":
            before = contender.weight
            if fused is not None:
                contender.add(*fused)
                contender.note_fusion(before, fused)
            contender.add(-taken[0], taken[1])
            for factor, value in zip(contender.factors, contenders["ours"].factors, strict=True):
                factor.copy_(value)
        contender.exact = contender.exact + (product(*fused) if fused else 0) - product(*taken)


def product(left: Tensor, right: Tensor) -> Tensor:
    """(m, n) in float64."""
    return left.double() @ right.double()


def main() -> None:
    """Print the table and append the figures as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--switches", type=int, default=500)
    parser.add_argument("--rows", type=int, default=520)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file to which the figures are appended")
    parser.add_argument("--delta", type=float, default=0.01, help="norm of a pair, relative to the weight's")
    options = parser.parse_args()
    sizes = {name: value for name, value in vars(options).items() if name != "results"}
    print(f"{'weights':8}{'method':14}{'realised':>18}{'output, median':>16}{'largest':>10}", end="")
    print(f"{f'drift {EARLY}':>12}{f'drift {options.switches}':>12}")
    for kind in TYPES:
        results = run(kind, options.switches, (options.rows, options.columns), options.delta)
        for name, found in results.items():
            first = f"{found['realised']:.4f} +- {found['realised_spread']:.4f}"
            early = "-" if found[f"drift_{EARLY}"] is None else f"{found[f'drift_{EARLY}']:.1e}"
            print(f"{kind:8}{name:14}{first:>18}{found['output_median']:16.1e}{found['output_largest']:10.1e}", end="")
            print(f"{early:>12}{found['drift']:12.1e}", flush=True)
            line = {"date": date.today().isoformat(), "machine": platform.processor() or platform.machine()}
            line |= {"torch": torch.__version__, "weights": kind, "method": name, **sizes, **found}
            options.results.parent.mkdir(exist_ok=True)
            with options.results.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
