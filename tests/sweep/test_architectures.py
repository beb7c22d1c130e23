"""About two hundred kinds of models, each through a run with three switches: exact, reduced or refused by name.

On one process in float32: the engines and types have tests of their own. ``EXPECTED`` says what is not exact.
"""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch

from tests.sweep.composed import COMPOSED
from tests.sweep.encoders import ANSWERS, ENCODERS, SEQUENCE, TAGS
from tests.sweep.harness import Case, run
from tests.sweep.plain import PLAIN, FusedForward, FusedKernel
from tests.sweep.senses import IMAGES, SEEING, SOUNDS, TOGETHER, noise, sensing
from tests.sweep.text import DECODERS, NAMED, SEQ2SEQ, SMALL, TOKENS, language_model

HEADS = {
    SEQUENCE: {"task_type": "SEQ_CLS"},
    TAGS: {"task_type": "TOKEN_CLS", "exclude_modules": ["classifier", "score"]},
    ANSWERS: {"task_type": "QUESTION_ANS", "exclude_modules": ["qa_outputs"]},
}
ENDED = torch.cat([TOKENS[:, :-1], torch.full((3, 1), 2)], 1)
"""Tokens with the end mark by which encoder-decoders classify."""


def cases() -> dict[str, Case]:
    """All of them, by name; the first word of a name is mostly the type of the model."""
    found, text = {}, {"input_ids": TOKENS}
    for name, sizes in DECODERS.items():
        found[name] = Case(partial(language_model, name.split()[0], **sizes), text)
    for name, (targets, sizes) in NAMED.items():
        found[name] = Case(partial(language_model, name, **sizes), text, targets)
    for name, sizes in SEQ2SEQ.items():
        found[name] = Case(partial(language_model, name, True, **sizes), text | {"labels": TOKENS})
    for name, (auto, sizes) in ENCODERS.items():
        build = partial(sensing, auto, name.split()[0], SMALL | sizes)
        found[name] = Case(build, {"input_ids": ENDED}, lora=HEADS.get(auto, {}))
    for name, (auto, sizes) in IMAGES.items():
        size = (SEEING | sizes)["image_size"]
        shape = size if isinstance(size, list) else [size, size]
        found[name] = Case(partial(sensing, auto, name, SEEING | sizes), {"pixel_values": noise(2, 3, *shape)})
    for name, (auto, sizes, inputs) in (SOUNDS | TOGETHER).items():
        found[name] = Case(partial(sensing, auto, name.split()[0], SMALL | sizes), inputs)
    for name, (build, inputs) in COMPOSED.items():
        found[name] = Case(build, inputs)
    vectors, in_adapter = {"x": noise(3, 5, 16)}, {"fusion": "adapter"}
    found |= {name: Case(build, vectors) for name, build in PLAIN.items()}
    found["fused kernel, second adapter"] = Case(FusedKernel, vectors, options=in_adapter)
    found["fused forward, second adapter"] = Case(FusedForward, vectors, options=in_adapter)
    return found


CASES = cases()

NEVER_CALLED = "a layer that the model never calls"
OUT_PROJ = r"out_proj .a layer that nn.MultiheadAttention never calls"
LINEAR1 = "linear1.*a layer that nn.TransformerEncoderLayer never calls"
COMPUTED = "leaves out middle .a layer that computes its weight from other tensors"
OTHERWISE = "leaves out middle .a layer that computes something else"
SHARED = "a layer that shares its weight"
USED_ELSEWHERE = "switch 0 changed the output on the first batch.* was undone: .*it may be"

MIXTURES = ("mixtral", "qwen3_moe", "qwen3_next", "olmoe", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "minimax")

EXPECTED: dict[str, str] = {
    **dict.fromkeys((*MIXTURES, "dots1", "glm4_moe"), "reduced: mlp.experts.* PEFT adapts as a bare tensor"),
    # Named, so refused.
    **dict.fromkeys(("mamba", "falcon_mamba"), f"refused: {NEVER_CALLED}.*mixer.dt_proj"),
    "jamba": f"reduced: mamba.dt_proj .{NEVER_CALLED}",
    "bloom pretraining_tp": f"reduced: self_attention.dense, .*dense_4h_to_h.*{NEVER_CALLED}",
    "mobilebert masked": f"reduced: predictions.dense .{NEVER_CALLED}",
    "luke": f"reduced: entity_predictions.decoder .{SHARED}",
    "wavlm": f"reduced: attention.k_proj.*{NEVER_CALLED}",
    "detr segmentation": f"reduced: bbox_attention.k_proj .{NEVER_CALLED}",
    **dict.fromkeys(("siglip", "siglip both", "siglip_vision_model"), f"reduced: head.attention.{OUT_PROJ}"),
    "mask2former": f"reduced: cross_attn.{OUT_PROJ}.*mask_embedder.*{NEVER_CALLED}",
    # PEFT 0.21 does not find what it has saved of this type, and says so at loading; with plain LoRA, too.
    "maskformer": f"unloadable: mask_embedder.*{NEVER_CALLED}",
    **dict.fromkeys(("nn.MultiheadAttention", "nn.MultiheadAttention kdim"), f"reduced: middle.{OUT_PROJ}"),
    **dict.fromkeys(("nn.TransformerEncoder", "nn.TransformerEncoder norm_first"), f"reduced: {OUT_PROJ}.*{LINEAR1}"),
    "nn.TransformerDecoder": f"reduced: {OUT_PROJ}",
    "torchvision ViT": f"reduced: self_attention.{OUT_PROJ}",
    "torchvision Swin": f"reduced: middle.qkv, middle.proj .{NEVER_CALLED}",
    **dict.fromkeys(("weight_norm old", "weight_norm", "spectral_norm old", "spectral_norm"), f"reduced: {COMPUTED}"),
    **dict.fromkeys(("orthogonal", "utils.prune", "parametrize"), f"reduced: {COMPUTED}"),
    **dict.fromkeys(("fake-quantising", "standardised", "forward replaced", "output hook"), f"reduced: {OTHERWISE}"),
    **dict.fromkeys(("reads", "reads in evaluation", "reads detached"), f"reduced: out middle .{NEVER_CALLED}"),
    "keeps layers": f"reduced: out middle .{NEVER_CALLED}",
    **dict.fromkeys(("calls and reads", "penalty"), f"refused: {USED_ELSEWHERE} middle"),
    **dict.fromkeys(("fused kernel, second adapter", "fused forward, second adapter"), f"refused: {USED_ELSEWHERE}"),
    "shared module": f"reduced: out middle .{SHARED}",
    "tied weight": f"reduced: out first, middle .{SHARED}",
}
"""What is not exact, with the pattern of the warning or the error that says so and names the layers."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_model_is_kept_exactly_or_named(name: str, tmp_path) -> None:
    outcome = run(CASES[name], tmp_path)
    kind, _, pattern = EXPECTED.get(name, "exact").partition(": ")
    assert outcome.kind == kind, outcome
    assert re.search(pattern, outcome.message), outcome.message
