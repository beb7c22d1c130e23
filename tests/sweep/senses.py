"""Tiny random models that see and hear: images, sound, and both together with text."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from tests.sweep.text import SMALL, TOKENS, quiet

SEEING = SMALL | {"image_size": 16, "patch_size": 4, "num_channels": 3}
LABELS, MASKS = "AutoModelForImageClassification", "AutoModelForSemanticSegmentation"
BOXES, DEPTH = "AutoModelForObjectDetection", "AutoModelForDepthEstimation"
STAGES = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}
STAGES |= {"mlp_ratios": [2, 2, 2, 2], "sr_ratios": [4, 2, 1, 1], "decoder_hidden_size": 16, "image_size": 32}
HEARING = {"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2}
HEARING |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0}
HEARING |= {"apply_spec_augment": False}
MEL = {"num_mel_bins": 16, "max_source_positions": 20, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
MEL |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
MEL |= {"max_target_positions": 64, "decoder_start_token_id": 1, "num_hidden_layers": None}


def noise(*shape: int) -> Tensor:
    """The same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def sensing(auto: str, kind: str, sizes: dict[str, object]) -> nn.Module:
    """A model of a type with a head."""
    options = {key: value for key, value in sizes.items() if value is not None}
    return getattr(transformers, auto).from_config(quiet(AutoConfig.for_model(kind, **options)))


IMAGES: dict[str, tuple[str, dict[str, object]]] = {
    **{kind: (LABELS, {}) for kind in ("vit", "beit", "data2vec-vision", "dinov2", "vit_msn", "ijepa")},
    **{kind: ("AutoModel", {}) for kind in ("clip_vision_model", "vit_mae", "dinov3_vit", "siglip_vision_model")},
    **{kind: ("AutoModel", {}) for kind in ("aimv2_vision_model", "mlcd", "pixtral")},
    "deit": ("AutoModel", {}),
    "siglip": (LABELS, {"vision_config": SEEING, "text_config": SMALL}),
    "segformer": (MASKS, STAGES),
    "pvt": (LABELS, STAGES),
    "glpn": (DEPTH, STAGES),
    "yolos": (BOXES, {"image_size": [16, 16], "num_detection_tokens": 4}),
    "dpt": (
        DEPTH,
        {"backbone_out_indices": [0, 1, 2, 3], "num_hidden_layers": 4, "neck_hidden_sizes": [8, 8, 8, 8]}
        | {"fusion_hidden_size": 8, "is_hybrid": False},
    ),
    "mobilevit": (
        LABELS,
        {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "image_size": 32, "patch_size": 2},
    ),
    "focalnet": (LABELS, {"embed_dim": 16, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]}),
    "hiera": (
        LABELS,
        {"embed_dim": 16, "image_size": [32, 32], "patch_size": [7, 7], "patch_stride": [4, 4], "depths": [1, 1]}
        | {"num_heads": [1, 2], "num_query_pool": 1, "masked_unit_size": [4, 4], "num_attention_heads": None}
        | {"num_hidden_layers": None, "hidden_size": None},
    ),
}

SOUNDS: dict[str, tuple[str, dict[str, object], dict[str, Tensor]]] = {
    **{kind: ("AutoModelForCTC", HEARING, {"input_values": noise(2, 400)}) for kind in ("wav2vec2", "hubert", "wavlm")},
    **{kind: ("AutoModelForCTC", HEARING, {"input_values": noise(2, 400)}) for kind in ("unispeech-sat", "sew")},
    "wav2vec2-conformer": ("AutoModelForCTC", HEARING, {"input_values": noise(2, 400)}),
    "data2vec-audio": ("AutoModelForAudioClassification", HEARING, {"input_values": noise(2, 400)}),
    "whisper": ("AutoModelForSpeechSeq2Seq", MEL, {"input_features": noise(3, 16, 40), "labels": TOKENS}),
    "speech_to_text": ("AutoModelForSpeechSeq2Seq", MEL | {"input_feat_per_channel": 16, "conv_channels": 16})
    + ({"input_features": noise(3, 40, 16), "labels": TOKENS},),
    "audio-spectrogram-transformer": ("AutoModelForAudioClassification", {"num_mel_bins": 16, "max_length": 32})
    + ({"input_values": noise(2, 32, 16)},),
    "moonshine": ("AutoModelForSpeechSeq2Seq", {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1})
    + ({"input_values": noise(3, 4000), "labels": TOKENS},),
}

PIXELS, IMAGE = noise(2, 3, 16, 16), 63
TEXT = TOKENS[:2].clone().clamp(max=60)
WITH_IMAGE = torch.cat([torch.full((2, 16), IMAGE), TEXT], 1)
TOWER = SEEING | {"model_type": "clip_vision_model"}
LLAMA = SMALL | {"model_type": "llama", "max_position_embeddings": 128}
TOGETHER: dict[str, tuple[str, dict[str, object], dict[str, Tensor]]] = {
    "llava": ("AutoModelForImageTextToText", {"vision_config": TOWER, "text_config": LLAMA, "image_token_id": IMAGE})
    + ({"input_ids": WITH_IMAGE, "pixel_values": PIXELS},),
    "clip": ("AutoModel", {"vision_config": SEEING, "text_config": SMALL, "projection_dim": 16})
    + ({"input_ids": TEXT, "pixel_values": PIXELS},),
    "siglip both": ("AutoModel", {"vision_config": SEEING, "text_config": SMALL})
    + ({"input_ids": TEXT, "pixel_values": PIXELS},),
    "vilt": ("AutoModel", {"image_size": 16, "patch_size": 4}, {"input_ids": TEXT, "pixel_values": PIXELS}),
    "blip": ("AutoModel", {"vision_config": SEEING, "text_config": {**SMALL, "encoder_hidden_size": 32}})
    + ({"input_ids": TEXT, "pixel_values": PIXELS},),
    "git": ("AutoModelForCausalLM", {"vision_config": SEEING}, {"input_ids": TEXT, "pixel_values": PIXELS}),
}
