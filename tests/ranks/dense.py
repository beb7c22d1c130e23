"""The training of test_engines.py with the specification: one process, dense, in each precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.ranks.engines import SHAPES, dequantised, make_batch, make_odd_net
from tests.reference import OtherChoices, Reference, RoundedSite, Site


class Masters:
    """fp32 copies of the trainable parameters for the optimizer, where the model holds them in 16 bits."""

    def __init__(self, model: nn.Module, own: bool) -> None:
        self.live = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.own = own
        self.stepped = [p.detach().float() for p in self.live] if own else self.live
        self.of = {id(live): stepped for live, stepped in zip(self.live, self.stepped, strict=True)}

    def take_gradients(self) -> None:
        for live, stepped in zip(self.live, self.stepped, strict=True):
            stepped.grad = live.grad.to(stepped.dtype)

    @torch.no_grad()
    def publish(self) -> None:
        for live, stepped in zip(self.live, self.stepped, strict=True):
            live.copy_(stepped)


def reference_run(precision: str, masters_in_fp32: bool, options: dict) -> dict:
    """Train and switch as the run under test does.

    Args:
        precision: Of the pretrained weights.
        masters_in_fp32: All of the model is in 16 bits and the optimizer steps fp32 copies, as DeepSpeed has it.
        options: ``num_steps``, ``rate``, ``clip``, ``target``, ``ratio``, ``betas``, the steps ``due``, and ``choices``
            that are not the paper's. The first step, and each after a switch, is made at rate 0.
    """
    model = make_odd_net(precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if masters_in_fp32:
        model = model.bfloat16()
    masters, sites = Masters(model, masters_in_fp32), {}
    for name in SHAPES:
        layer = model.get_submodule(f"base_model.model.{name}")
        a, b = (masters.of[id(factors["default"].weight)] for factors in (layer.lora_A, layer.lora_B))
        weight = layer.base_layer.weight.data
        if precision not in ("fp32", "bf16"):
            weight = _stand_in_for_weight(layer.base_layer, precision)
        used_type = dtype if masters_in_fp32 else torch.float32
        kind = RoundedSite if precision == "bf16" else Site
        sites[name] = kind(weight, a, b, layer.scaling["default"], min(options["target"], *SHAPES[name]))
        if precision == "bf16":
            sites[name].used_type = used_type
    choices = options.get("choices", {})
    reference = (OtherChoices if choices else Reference)(sites, options["ratio"], *options["betas"], **choices)
    masters.publish()
    optimizer = torch.optim.AdamW(masters.stepped, lr=1.0, weight_decay=0)
    losses, parts, scores, due, still = [], [], [], list(options["due"]), True
    for step in range(options["num_steps"]):
        optimizer.param_groups[0]["lr"] = 0.0 if still else options["rate"]
        x, y = make_batch(step)
        loss = (model(x.to(dtype)).float() - y).square().mean()
        model.zero_grad()
        loss.backward()
        masters.take_gradients()
        torch.nn.utils.clip_grad_norm_(masters.stepped, options["clip"])
        reference.observe()
        if choices:
            reference.step(optimizer, step + 1)
        else:
            optimizer.step()
        losses.append(loss.detach())
        still = step + 1 in due
        later = [k for k, at in enumerate(due) if at > step + 1]
        if not still and later and choices.get("interval") and reference.settled(step + 1):
            due[later[0]], still = step + 1, True
        if still:
            scores.append({name: reference.scores(site) for name, site in sites.items()})
            held = {name: list(site.holds) for name, site in sites.items()}
            taken = reference.switch(optimizer, step + 1) if choices else reference.switch(optimizer)
            chosen = {name: slots for name, slots in taken.items() if slots}
            pick = {
                name: ([held[name][k] for k in ks], [sites[name].holds[k] for k in ks]) for name, ks in chosen.items()
            }
            parts.append({name: (slots, *pick[name]) for name, slots in chosen.items()})
        masters.publish()
    return {
        "due": due,
        "losses": losses,
        "parts": parts,
        "scores": scores,
        "held": {name: site.holds for name, site in sites.items()},
        "weights": [site.W.detach().float() for site in sites.values()],
        "factors": [site.used(f.detach()) for site in sites.values() for f in (site.A, site.B)],
        "moments": {
            f"{n}.{f}": optimizer.state[getattr(s, f)]["exp_avg_sq"].flatten() for n, s in sites.items() for f in "AB"
        },
    }


def _stand_in_for_weight(layer: nn.Module, precision: str) -> Tensor:
    """W as the specification edits it, dense; the quantised layer computes as ever, and the difference is added."""
    start = dequantised(layer, precision)
    weight = start.clone()
    layer.register_forward_hook(lambda _, inputs, output: output + inputs[0] @ (weight - start).T)
    return weight
