"""Bytes that each rank will hold, and those of a checkpoint, counted by the arithmetic that the engines use.

Left out is what does not depend on SRLoRA and is there only for a moment or in a pool: activations, layers that ZeRO-3
and FSDP2 gather, the buckets in which DDP and DeepSpeed send gradients, and the allocator's waste.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import nn

from srlora_dist.commands.plan.blueprint import Blueprint, Stored
from srlora_dist.layers.spans import Span, deal_by_size, fragment, fragment_numel, padded, rows, whole
from srlora_dist.method.memory import ledger_bytes, switch_bytes
from srlora_dist.storage.collectives import cut_into_buckets

FLOAT32 = 4


@dataclass(frozen=True)
class Held:
    """Bytes of one rank.

    Args:
        base_weights: The pretrained parameters, quantised ones with their scales.
        adapter_weights: What is trained, as the model computes with it.
        gradients: Gradients of what is trained; under DeepSpeed as they are collected, and as the optimizer gets them.
        optimizer_state: Its moments, AdamW's two or one of SGD, and DeepSpeed's float32 copy of what is trained.
        moving_averages: SRLoRA's statistics.
        residual: The second terms of 16-bit weights.
        second_adapter: Stands for the change of quantised weights.
        ledger: In host memory of rank 0, at the end of a run that has no ``ledger_dir``.
        during_switch: Directions and gathered factors of the largest bucket, for the moment of a switch.
    """

    base_weights: int
    adapter_weights: int
    gradients: int
    optimizer_state: int
    moving_averages: int
    residual: int
    second_adapter: int
    ledger: int
    during_switch: int

    @property
    def device_total(self) -> int:
        """What lies beside each other on the device while a switch runs."""
        return sum(asdict(self).values()) - self.ledger


class Forecast:
    """Counts the parts of any rank.

    Args:
        blueprint: Blueprint of the run.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        self.blueprint, self.sites = blueprint, blueprint.sites
        self.engine, self.world_size = blueprint.engine, blueprint.world_size
        self.trained = [parameter for group in blueprint.groups for parameter in group]

    # Which part of a parameter is where.

    def model_span(self, shape: torch.Size, rank: int) -> Span:
        """The run of a parameter in the model of a rank, without padding."""
        if self.engine == "fsdp2":
            return rows(shape, self.world_size, rank)
        numel = torch.Size(shape).numel()
        return padded(numel, self.world_size, rank) if self.engine == "zero3" else whole(numel)

    def stepped_span(self, parameter: nn.Parameter, rank: int) -> Span:
        """The run of a trained parameter that the optimizer of a rank steps."""
        if self.engine not in ("zero1", "zero2"):
            return self.model_span(parameter.shape, rank)
        offset, length = self._places[id(parameter)]
        return fragment(offset, parameter.numel(), length, rank)

    def _allocated(self, stored: Stored) -> int:
        """Bytes that the model of a rank allocates for a parameter, padding and whole copies included."""
        longest = self.blueprint.longest_run(stored)
        numel = longest + self.blueprint.is_persistent(stored) * longest * self.world_size
        return numel * stored.element_size + stored.beside

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        """For each trained parameter its offset in the flat buffer of its group, and how long a rank's fragment is."""
        places = {}
        for group, length in zip(self.blueprint.groups, self._fragments, strict=True):
            offset = 0
            for parameter in group:
                places[id(parameter)] = offset, length
                offset += parameter.numel()
        return places

    @cached_property
    def _touched(self) -> dict[int, list[nn.Parameter]]:
        """The trained parameters of which the fragments of a rank hold something."""
        touched = defaultdict(list)
        for parameter in self.trained:
            offset, length = self._places[id(parameter)]
            for rank in range(offset // length, (offset + parameter.numel() - 1) // length + 1):
                touched[rank].append(parameter)
        return touched

    @cached_property
    def _factors(self) -> dict[int, nn.Parameter]:
        return {id(factor): factor for site in self.sites for factor in (site.lora_a, site.lora_b)}

    @cached_property
    def _fragments(self) -> list[int]:
        sizes = ([parameter.numel() for parameter in group] for group in self.blueprint.groups)
        return [fragment_numel(group, self.world_size) for group in sizes]

    @cached_property
    def _dealt_averages(self) -> list[int]:
        """Bytes of the moving averages of each rank, where the sites are dealt to ranks."""
        sizes = [site.num_factor_elements for site in self.sites]
        held = [0] * self.world_size
        for size, rank in zip(sizes, deal_by_size(sizes, self.world_size), strict=True):
            held[rank] += 2 * FLOAT32 * size
        return held

    # What that takes.

    def held(self, rank: int) -> Held:
        """Bytes that a rank holds."""
        second = [factor for site in self.sites for factor in (site.fused_a, site.fused_b) if factor is not None]
        num_switches, options = len(self.blueprint.due_steps), self.blueprint.options
        buckets = cut_into_buckets([site.num_factor_elements for site in self.sites])
        gathers = self.blueprint.gathers
        return Held(
            base_weights=sum(map(self._allocated, self.blueprint.frozen)),
            adapter_weights=self._adapter_weights(),
            gradients=self._gradients(rank),
            optimizer_state=self._optimizer_state(rank),
            moving_averages=self._moving_averages(rank) if num_switches else 0,
            residual=sum(self._residual(number, rank) for number in range(len(self.sites))),
            second_adapter=sum(self._allocated(_stored(factor)) for factor in second),
            ledger=sum(ledger_bytes(site, num_switches, options) for site in self.sites) if rank == 0 else 0,
            during_switch=max(sum(switch_bytes(self.sites[number], gathers) for number in b) for b in buckets),
        )

    def largest_rank(self) -> int:
        """A rank that holds most on its device: what is cut by parameters shrinks from rank 0 on, all else may not."""
        if self.engine in ("plain", "zero3", "fsdp2"):
            return 0
        if self.engine in ("ddp", "zero0"):
            return max(range(self.world_size), key=self._moving_averages)
        return max(range(self.world_size), key=lambda rank: self._moving_averages(rank) + self._gradients(rank))

    def _adapter_weights(self) -> int:
        if self.engine not in ("zero1", "zero2"):
            return sum(self._allocated(_stored(parameter)) for parameter in self.trained)
        groups = zip(self.blueprint.groups, self._fragments, strict=True)
        return sum(length * self.world_size * group[0].element_size() for group, length in groups)

    @cached_property
    def _has_copy(self) -> bool:
        """Whether the optimizer steps DeepSpeed's float32 copy; without ZeRO there is one of 16 bits alone."""
        in_16_bits = self.trained[0].element_size() < FLOAT32
        return self.engine in ("zero1", "zero2", "zero3") or (self.engine == "zero0" and in_16_bits)

    @cached_property
    def _in_float32(self) -> list[int]:
        """Elements of each group that DeepSpeed's optimizer steps on every rank, padding included."""
        if self.engine in ("zero1", "zero2"):
            return self._fragments
        return [sum(self.blueprint.longest_run(_stored(p)) for p in group) for group in self.blueprint.groups]

    def _gradients(self, rank: int) -> int:
        if not self._has_copy:
            return sum(self.blueprint.longest_run(_stored(p)) * p.element_size() for p in self.trained)
        # With ZeRO one group after the other is given to the optimizer.
        given = sum(self._in_float32) if self.engine == "zero0" else max(self._in_float32)
        return self._num_collected(rank) * self.trained[0].element_size() + given * FLOAT32

    def _num_collected(self, rank: int) -> int:
        """Elements of the gradients that DeepSpeed collects in the type of the model."""
        if self.engine in ("zero0", "zero3"):
            return sum(self._in_float32)
        # Of a parameter at the edge of a fragment it keeps all.
        return sum(parameter.numel() for parameter in self._touched[rank])

    def _optimizer_state(self, rank: int) -> int:
        num_moments = self.blueprint.num_moments
        if self._has_copy:
            return (1 + num_moments) * sum(self._in_float32) * FLOAT32
        return num_moments * sum(self.model_span(p.shape, rank).numel * p.element_size() for p in self.trained)

    def _moving_averages(self, rank: int) -> int:
        if self.engine in ("plain", "ddp", "zero0"):
            return self._dealt_averages[rank]
        factors = self._factors.values()
        if self.engine in ("zero1", "zero2"):
            factors = [parameter for parameter in self._touched[rank] if id(parameter) in self._factors]
        return 2 * FLOAT32 * sum(self.stepped_span(factor, rank).numel for factor in factors)

    def _residual(self, number: int, rank: int) -> int:
        stored = self.blueprint.weights[number]
        if self.sites[number].fused_a is not None or stored.element_size == FLOAT32:
            return 0
        # Of a weight that is there whole, all of it is edited.
        numel = stored.numel if self.blueprint.is_persistent(stored) else self.model_span(stored.shape, rank).numel
        return numel * stored.element_size

    # What is on disk.

    def checkpoint_bytes(self, num_switches: int) -> int:
        """A checkpoint after so many switches: tensors alone, its JSON files are small."""
        of_training = (1 + self.blueprint.num_moments) * FLOAT32 * sum(parameter.numel() for parameter in self.trained)
        sites, due = self.sites, self.blueprint.due_steps
        averages = 2 * FLOAT32 * sum(site.num_factor_elements for site in sites) if num_switches < len(due) else 0
        return of_training + averages + sum(ledger_bytes(s, num_switches, self.blueprint.options) for s in sites)

    def largest_checkpoint(self) -> int:
        """The averages are left out after the last switch, so that the last checkpoint need not be the largest."""
        num_switches = len(self.blueprint.due_steps)
        return max(self.checkpoint_bytes(number) for number in {num_switches, max(0, num_switches - 1)})

    def directions_bytes(self) -> int:
        """The file of directions in ``srlora.svd_cache``; while it is made, rank 0 has them in host memory."""
        return sum(FLOAT32 * site.state.target_rank * (sum(site.shape) + 1) for site in self.sites)

    def model_bytes(self) -> int:
        """Size of the pretrained model as it is stored."""
        return sum(stored.numel * stored.element_size + stored.beside for stored in self.blueprint.frozen)


def _stored(parameter: nn.Parameter) -> Stored:
    return Stored(parameter.shape, parameter.element_size())
