"""How long the directions and a switch take: work and messages over the bandwidths of a device. Estimates, no more.

What is left out: reading the file of directions, and copies between host and device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from srlora_dist.commands.plan.communication import Message, restarted_pairs, start_up, switches
from srlora_dist.commands.plan.memory import FLOAT32, Forecast
from srlora_dist.method.svd import BLOCK, is_worth_it


@dataclass(frozen=True)
class Device:
    """What the data sheet of a device promises, for one rank.

    Args:
        memory_bandwidth: Bytes a second.
        flops: Dense float32 operations a second.
        network: Bytes a second in one direction to ranks on other nodes.
        latency: Seconds of one message between two nodes.
        site_overhead: Seconds of Python and kernel launches that a switch takes at a site, however small it is.
    """

    memory_bandwidth: float
    flops: float
    network: float
    latency: float
    site_overhead: float


# Latencies of GPUs are round numbers for a message over such a network, not from a data sheet. The overhead is Python's
# and that of the demo on the CPU below: 0.6 s for 6 switches of 37 sites.
DEVICES = {
    # NVIDIA A100 80GB SXM data sheet: 2,039 GB/s, FP32 19.5 TFLOPS (TF32 is not used here). DGX A100 data sheet: one
    # 200 Gb/s HDR InfiniBand port a GPU.
    "a100": Device(2039e9, 19.5e12, 25e9, 10e-6, 3e-3),
    # NVIDIA H100 SXM data sheet: 3.35 TB/s, FP32 67 TFLOPS. DGX H100 data sheet: one 400 Gb/s ConnectX-7 port a GPU.
    "h100": Device(3.35e12, 67e12, 50e9, 10e-6, 3e-3),
    # AMD Instinct MI250X data sheet, half of it for one of its two GCDs: 3.2 TB/s, FP32 matrix 95.7 TFLOPS. Frontier
    # user guide (OLCF): four 200 Gb/s Slingshot ports for the eight GCDs of a node.
    "mi250x": Device(1.6e12, 47.85e12, 12.5e9, 10e-6, 3e-3),
    # Two cores of a Xeon as measured (2026-11-22): a copy, a GEMM of 2048, and gloo over the loopback interface.
    "cpu": Device(9.1e9, 102e9, 1.2e9, 1e-3, 3e-3),
}

EFFICIENCY = 0.7
"""Share of what a data sheet promises that long kernels and messages are taken to reach."""
FULL_SVD_EFFICIENCY = 0.02
"""That share for a full decomposition, whose reduction to a bidiagonal works on vectors. A guess between solvers."""
DIGEST_BYTES = 24
"""Memory traffic of the digest of an element: it is read, and widened to 8 bytes for a product."""
EDIT_BYTES = {4: 8, 2: 40}
"""Memory traffic of the edit of an element of 4 bytes, read and written, and of 2, widened with its second term."""

BASIS = 1.8
"""Columns of the Krylov basis over sqrt(k n), as for k = 64 of a Gaussian 2048 x 2048 matrix: a flat spectrum."""
BLOCK_OVERHEAD = 2e-3
"""Seconds of Python, launches and small factorisations a block; with it the matrix above takes 0.30 s on the CPU above,
where 0.27 s were measured."""


def svd_seconds(shape: tuple[int, int], num_directions: int, device: Device) -> float:
    """Seconds for one (m, n) matrix: a block Krylov iteration, or the whole decomposition where that is less work."""
    (m, n), smaller = shape, min(shape)
    if not is_worth_it(shape, num_directions):
        return 20 * m * n * smaller / (device.flops * FULL_SVD_EFFICIENCY)
    basis = BASIS * math.sqrt(num_directions * smaller)
    # Products with W and its transpose, which are read for each block; it is made orthogonal to those before it.
    work = 4 * m * n * basis + 4 * smaller * basis**2
    traffic = 2 * FLOAT32 * m * n * basis / BLOCK
    long_kernels = max(work / device.flops, traffic / device.memory_bandwidth) / EFFICIENCY
    return long_kernels + BLOCK_OVERHEAD * basis / BLOCK


def wire_seconds(messages: Iterable[Message], world_size: int, device: Device) -> float:
    """Seconds for messages that are sent one after the other, over trees for the latency and rings for the bytes."""
    depth, seconds = math.ceil(math.log2(world_size)) if world_size > 1 else 0, 0.0
    # An all-reduce passes almost everything on twice; what all others hand to a gather is received.
    passes = {
        "broadcast": 1,
        "all-reduce": 2 * (world_size - 1) / world_size,
        "gather": world_size - 1,
        "all-gather": world_size - 1,
    }
    for message in messages:
        seconds += depth * device.latency
        seconds += passes[message.kind] * message.num_bytes / (device.network * EFFICIENCY)
    return seconds


@dataclass(frozen=True)
class Seconds:
    """Seconds for the parts of a run that training waits for.

    Args:
        digests: Seconds for the digests of the pretrained weights, at each start.
        directions: Singular value decompositions on rank 0, only before the first run on a model.
        start_up_wire: What is sent then.
        first_switch: Switch 0.
        later_switch: The longest of the others; 0 if there is none.
    """

    digests: float
    directions: float
    start_up_wire: float
    first_switch: float
    later_switch: float


def estimate(forecast: Forecast, device: Device) -> Seconds:
    """The times of a run on a device."""
    blueprint = forecast.blueprint
    memory = device.memory_bandwidth * EFFICIENCY
    # By size, the sites are dealt out evenly where every rank holds all of them.
    weights = sum(stored.numel for stored in blueprint.weights) / blueprint.world_size
    counts, messages = restarted_pairs(blueprint), switches(blueprint)
    took = [_switch_seconds(forecast, device, j, counts[j], messages[j]) for j in range(len(counts))]
    return Seconds(
        digests=weights * DIGEST_BYTES / memory,
        directions=sum(svd_seconds(site.shape, site.state.target_rank, device) for site in blueprint.sites),
        start_up_wire=wire_seconds(start_up(blueprint, cold=True), blueprint.world_size, device),
        first_switch=took[0],
        later_switch=max(took[1:], default=0.0),
    )


def _switch_seconds(
    forecast: Forecast, device: Device, switch: int, counts: list[int], messages: list[Message]
) -> float:
    """Seconds of rank 0, which has most to do: its edits of W, the digests of all that was done, and the messages."""
    traffic = flops = seconds = 0.0
    for site, stored, count in zip(forecast.sites, forecast.blueprint.weights, counts, strict=True):
        if not count:
            continue
        edited = count * (1 + (switch > 0))
        traffic += DIGEST_BYTES * (edited + site.rank) * sum(site.shape)
        if site.fused_a is None:
            numel = forecast.model_span(stored.shape, 0).numel
            traffic += EDIT_BYTES[stored.element_size] * numel
            flops += 2 * edited * numel
        else:
            traffic += 2 * FLOAT32 * edited * sum(site.shape)
        seconds += device.site_overhead
    seconds += traffic / (device.memory_bandwidth * EFFICIENCY) + flops / (device.flops * EFFICIENCY)
    return seconds + wire_seconds(messages, forecast.world_size, device)
