"""How a base is loaded in the type of weights that an adapter belongs to."""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig

from srlora_dist.config.weight_type import WeightType
from srlora_dist.tasks.heads import never_quantised


def load_options(weights: WeightType, auto_class: type, settings: PretrainedConfig) -> dict[str, object]:
    """Arguments of ``auto_class.from_pretrained`` that load a model in this type.

    Args:
        weights: The type of the pretrained weights; the dtype ``auto`` is that of the checkpoint.
        auto_class: One of Transformers' auto classes.
        settings: Configuration of the model.
    """
    dtype = weights.dtype if weights.dtype == "auto" else getattr(torch, weights.dtype)
    if weights.quantization == "none":
        return {"dtype": dtype}
    skipped = {"llm_int8_skip_modules": never_quantised(auto_class, settings)}
    options = {"dtype": dtype, "device_map": {"": "cpu"}}  # else a quantised model goes to the GPU
    if weights.quantization == "int8":
        return {**options, "quantization_config": BitsAndBytesConfig(load_in_8bit=True, **skipped)}
    four_bits = {"bnb_4bit_quant_type": weights.quantization, "bnb_4bit_use_double_quant": weights.double}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **four_bits, **skipped)
    return {**options, "quantization_config": config}
