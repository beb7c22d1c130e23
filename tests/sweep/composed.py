"""Tiny random models of transformers that are made of several: detection, segmentation, sound or images to text."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf
from torch import Tensor, nn

from tests.sweep.senses import LLAMA, PIXELS, SEEING, TEXT, TOKENS, noise
from tests.sweep.text import SMALL, quiet

WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
TOWER = WIDE | {"image_size": 16, "patch_size": 4}
HALVES = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
HALVES |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
DETECTING = HALVES | {"d_model": 32, "num_queries": 5}
NO_TIMM = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
SCENE = {"pixel_values": noise(2, 3, 32, 32)}
VIDEO = {"pixel_values": noise(2, 2, 3, 16, 16)}
IMAGE = 63


def made(name: str, config: str, **options: object) -> Callable[[], nn.Module]:
    """A model of a class and a configuration of another."""
    return lambda: getattr(tf, name)(quiet(getattr(tf, config)(**options)))


def resnet(*stages: str, kind: str = "ResNetConfig") -> object:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return getattr(tf, kind)(**sizes, out_features=list(stages))


def swin() -> object:
    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    sizes = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4], "window_size": 2, "patch_size": 2}
    return tf.SwinConfig(**sizes, image_size=32, out_features=stages)


def image_then(text: Tensor, count: int) -> Tensor:
    """Tokens with those of an image before them."""
    return torch.cat([torch.full((2, count), IMAGE), text], 1)


def rt_detr() -> nn.Module:
    config = tf.RTDetrConfig(
        backbone_config=resnet("stage2", "stage3", "stage4", kind="RTDetrResNetConfig"),
        **{"encoder_hidden_dim": 32, "encoder_in_channels": [8, 16, 16], "feat_strides": [8, 16, 32]},
        **{"encoder_layers": 1, "encoder_ffn_dim": 48, "encoder_attention_heads": 4, "d_model": 32, "num_queries": 5},
        **{"decoder_in_channels": [32, 32, 32], "decoder_ffn_dim": 48, "decoder_layers": 1, "num_denoising": 0},
        decoder_attention_heads=4,
    )
    return tf.RTDetrForObjectDetection(quiet(config))


def two_halves(encoder: nn.Module, decoder: nn.Module, whole: str) -> nn.Module:
    return getattr(tf, whole)(encoder=encoder, decoder=decoder)


def image_to_text() -> nn.Module:
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "add_cross_attention": True}
    encoder = tf.ViTModel(quiet(tf.ViTConfig(**SEEING)))
    return two_halves(encoder, tf.GPT2LMHeadModel(quiet(tf.GPT2Config(**sizes))), "VisionEncoderDecoderModel")


def text_to_text() -> nn.Module:
    decoder = tf.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True)
    encoder = tf.BertModel(quiet(tf.BertConfig(**SMALL)))
    return two_halves(encoder, tf.BertLMHeadModel(quiet(decoder)), "EncoderDecoderModel")


SEGMENTING = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 48}
SEGMENTING |= {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 4, "dim_feedforward": 48}
SPEECH = {"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_conv_pos_embeddings": 8}
SPEECH |= {"num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "vocab_size": 64, "hidden_size": 32}
GEMMA, OPT = SMALL | {"model_type": "gemma"}, SMALL | {"model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 48}
SIGLIP = SEEING | {"model_type": "siglip_vision_model", "vision_use_head": False}
QFORMER = WIDE | {"vocab_size": 64, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
MLLAMA = WIDE | {"hidden_size": 16, "num_global_layers": 1, "attention_heads": 2, "image_size": 16, "patch_size": 4}
MLLAMA |= {"max_num_tiles": 1, "intermediate_layers_indices": [0], "vision_output_dim": 32}
DETR = made("DetrForObjectDetection", "DetrConfig", backbone_config=resnet("stage4"), **NO_TIMM, **DETECTING)

COMPOSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "detr": (DETR, SCENE),
    "conditional_detr": (
        made(
            "ConditionalDetrForObjectDetection",
            "ConditionalDetrConfig",
            backbone_config=resnet("stage4"),
            **(NO_TIMM | DETECTING),
        ),
        SCENE,
    ),
    "detr segmentation": (
        made(
            "DetrForSegmentation",
            "DetrConfig",
            backbone_config=resnet("stage1", "stage2", "stage3", "stage4"),
            **(NO_TIMM | DETECTING | {"d_model": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 8}),
        ),
        SCENE,
    ),
    "rt_detr": (rt_detr, {"pixel_values": noise(2, 3, 64, 64)}),
    "mask2former": (
        made(
            "Mask2FormerForUniversalSegmentation",
            "Mask2FormerConfig",
            backbone_config=swin(),
            num_queries=5,
            **SEGMENTING,
        ),
        SCENE,
    ),
    "maskformer": (
        lambda: tf.MaskFormerForInstanceSegmentation(
            quiet(
                tf.MaskFormerConfig(
                    backbone_config=swin(),
                    decoder_config=tf.DetrConfig(**DETECTING),
                    fpn_feature_size=32,
                    mask_feature_size=32,
                )
            )
        ),
        SCENE,
    ),
    "upernet": (
        made(
            "UperNetForSemanticSegmentation",
            "UperNetConfig",
            backbone_config=swin(),
            hidden_size=16,
            pool_scales=[1, 2],
        ),
        SCENE,
    ),
    "swin": (lambda: tf.SwinForImageClassification(quiet(swin())), SCENE),
    "swinv2": (
        made(
            "Swinv2ForImageClassification",
            "Swinv2Config",
            embed_dim=16,
            depths=[1, 1],
            num_heads=[2, 4],
            window_size=4,
            patch_size=2,
            image_size=16,
        ),
        {"pixel_values": PIXELS},
    ),
    "owlvit": (
        made(
            "OwlViTForObjectDetection",
            "OwlViTConfig",
            text_config=WIDE | {"vocab_size": 64, "max_position_embeddings": 16},
            vision_config=TOWER,
            projection_dim=32,
        ),
        {"pixel_values": PIXELS, "input_ids": TEXT, "attention_mask": torch.ones_like(TEXT)},
    ),
    "idefics3": (
        made(
            "Idefics3ForConditionalGeneration",
            "Idefics3Config",
            text_config=LLAMA,
            vision_config=TOWER,
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=0,
        ),
        {"input_ids": image_then(TEXT, 4), "pixel_values": noise(2, 1, 3, 16, 16)},
    ),
    "paligemma": (
        made(
            "PaliGemmaForConditionalGeneration",
            "PaliGemmaConfig",
            text_config=GEMMA,
            vision_config=SIGLIP,
            image_token_index=IMAGE,
            projection_dim=32,
            hidden_size=32,
            vocab_size=64,
        ),
        {"input_ids": image_then(TEXT, 16), "pixel_values": PIXELS, "token_type_ids": torch.ones(2, 26).long()},
    ),
    "blip-2": (
        made(
            "Blip2ForConditionalGeneration",
            "Blip2Config",
            vision_config=TOWER,
            qformer_config=QFORMER,
            text_config=OPT,
            num_query_tokens=4,
            image_token_index=IMAGE,
        ),
        {"input_ids": image_then(TEXT, 4), "pixel_values": PIXELS},
    ),
    "mllama": (
        made(
            "MllamaForConditionalGeneration",
            "MllamaConfig",
            text_config=SMALL | {"cross_attention_layers": [1]},
            vision_config=MLLAMA | {"supported_aspect_ratios": [[1, 1]]},
        ),
        {"input_ids": TEXT, "pixel_values": noise(2, 1, 1, 3, 16, 16), "aspect_ratio_ids": torch.ones(2, 1).long()}
        | {"aspect_ratio_mask": torch.ones(2, 1, 1).long(), "cross_attention_mask": torch.ones(2, 10, 1, 1).long()},
    ),
    "speecht5": (
        made("SpeechT5ForSpeechToText", "SpeechT5Config", **HALVES, **SPEECH, positional_dropout=0.0),
        {"input_values": noise(3, 400), "labels": TOKENS},
    ),
    "musicgen": (
        made(
            "MusicgenForCausalLM",
            "MusicgenDecoderConfig",
            **WIDE,
            vocab_size=64,
            ffn_dim=48,
            num_codebooks=1,
            max_position_embeddings=32,
        ),
        {"input_ids": TOKENS, "encoder_hidden_states": noise(3, 4, 32)},
    ),
    "patchtst": (
        made(
            "PatchTSTForPrediction",
            "PatchTSTConfig",
            num_input_channels=2,
            context_length=16,
            patch_length=4,
            patch_stride=4,
            prediction_length=4,
            num_hidden_layers=1,
            d_model=32,
            num_attention_heads=4,
            ffn_dim=48,
        ),
        {"past_values": noise(2, 16, 2)},
    ),
    "timesformer": (made("TimesformerForVideoClassification", "TimesformerConfig", **SEEING, num_frames=2), VIDEO),
    "videomae": (
        made("VideoMAEForVideoClassification", "VideoMAEConfig", **SEEING, num_frames=2, tubelet_size=2),
        VIDEO,
    ),
    "vit to gpt2": (image_to_text, {"pixel_values": PIXELS, "decoder_input_ids": TEXT}),
    "bert to bert": (text_to_text, {"input_ids": TOKENS, "decoder_input_ids": TOKENS}),
}
