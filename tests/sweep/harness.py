"""Takes one model through a whole run, and says whether it was kept exactly, reduced, refused or damaged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from srlora_dist import SRLoRAConfig, Switcher

EXACT = 4e-6
"""Largest change of the output, relative to its norm, that float32 arithmetic in another order makes here."""
NUM_STEPS = 8


@dataclass(frozen=True)
class Case:
    """A model of the sweep and what has to become of it.

    Args:
        build: Makes the same model at each call.
        inputs: Keyword arguments of its forward.
        targets: Of the LoraConfig.
        lora: More of its options.
        options: Of the SRLoRAConfig.
    """

    build: Callable[[], nn.Module]
    inputs: dict[str, object]
    targets: str | list[str] = "all-linear"
    lora: dict[str, object] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of a model.

    Args:
        kind: ``exact``, ``reduced``, ``refused`` or ``damaged``; ``unloadable`` where PEFT says at loading that it
            does not find what it has saved, which happens without SRLoRA, too.
        message: The error or the warning that says what is not worked on; or where it was damaged.
        errors: Relative changes of the output, by where they were measured.
        num_sites: Sites that were worked on.
        num_adapted: Layers that PEFT had adapted.
    """

    kind: str
    message: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    num_sites: int = 0
    num_adapted: int = 0


def floats(output: object) -> Iterator[Tensor]:
    """All floating-point tensors of an output, however it nests them."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from floats(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from floats(value)


def outputs(model: nn.Module, inputs: dict[str, object]) -> list[Tensor]:
    """All of them, in training mode and in evaluation mode; the model is left in training mode."""
    found = []
    with torch.no_grad():
        for mode in (False, True):
            model.train(mode)
            torch.manual_seed(7)  # some models draw numbers
            found += [tensor.detach().clone() for tensor in floats(model(**inputs))]
    return found


def relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest one over the tensors; infinite where they are not comparable."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return float("inf")
    changes = [0.0]
    for old, new in zip(before, after, strict=True):
        finite = old.isfinite()  # masked scores may be minus infinity
        if not torch.equal(finite, new.isfinite()):
            return float("inf")
        old, new = old[finite].double(), new[finite].double()
        if old.numel():
            changes.append(float((new - old).norm() / old.norm().clamp_min(1e-12)))
    return max(changes)


def loss_of(output: object) -> Tensor:
    """A target of noise for every output, so that all that is used gets a gradient."""
    generator = torch.Generator().manual_seed(11)
    parts = [t for t in floats(output) if t.requires_grad]
    noise = [torch.randn(t.shape, generator=generator) for t in parts]
    return sum((t.clamp(-100, 100) - n).square().mean() for t, n in zip(parts, noise, strict=True))


def without_dropout(model: nn.Module) -> nn.Module:
    """In training mode, without dropout, and with BatchNorm statistics that stay."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def make(case: Case) -> nn.Module:
    """The model, the same at each call."""
    torch.manual_seed(0)
    return without_dropout(case.build())


def run(case: Case, folder: Path) -> Outcome:
    """Three switches, with the outputs before and after each, and the export on an untouched base."""
    model = get_peft_model(make(case), LoraConfig(r=4, lora_alpha=4, target_modules=case.targets, **case.lora))
    start = outputs(model, case.inputs)  # what plain PEFT cannot run is no case
    num_adapted = sum(name.endswith(".lora_A") for name, _ in model.named_modules())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            switcher, errors = _train(case, model, start, folder)
        except (ValueError, RuntimeError) as error:
            return Outcome("refused", f"{type(error).__name__}: {error}", num_adapted=num_adapted)
    switcher.export(folder / "adapter")
    live = outputs(model, case.inputs)
    with warnings.catch_warnings(record=True) as at_load:
        warnings.simplefilter("always")
        exported = PeftModel.from_pretrained(make(case), str(folder / "adapter"))
    lost = " ".join(str(w.message) for w in at_load if "missing adapter keys" in str(w.message))
    errors["export"] = relative_change(live, outputs(exported, case.inputs))
    assert relative_change(start, live) > 1e-3, "it was not trained"
    said = " ".join(str(w.message) for w in caught if "leaves out" in str(w.message))
    wrong = {where: f"{error:.1e}" for where, error in errors.items() if not error <= EXACT}
    kind = "damaged" if wrong else "reduced" if said else "exact"
    if lost and set(wrong) == {"export"}:
        kind, said = "unloadable", f" {said} {lost}"
    return Outcome(kind, f"{wrong or ''}{said}", errors, len(switcher.sites), num_adapted)


def _train(case: Case, model: nn.Module, start: list[Tensor], folder: Path) -> tuple[Switcher, dict[str, float]]:
    config = SRLoRAConfig(**({"target_rank": 12, "svd_cache": str(folder / "svd")} | case.options))
    switcher = Switcher(model, config, NUM_STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0)
    switcher.bind(model, optimizer)
    before, errors = start, {}
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        torch.manual_seed(100 + step)
        loss_of(model(**case.inputs)).backward()
        optimizer.step()
        if step:  # the first one has a learning rate of 0: what it and switch 0 leave is the function of before
            before = outputs(model, case.inputs)
        report = switcher.step()
        if not step or report is not None:
            errors[f"switch {report.switch if report else 0}"] = relative_change(before, outputs(model, case.inputs))
        optimizer.param_groups[0]["lr"] = 3e-3
    assert switcher.num_switches > 2, switcher.num_switches
    return switcher, errors
