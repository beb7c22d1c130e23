"""The type of the pretrained weights that an adapter belongs to, and how a base is loaded in it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig

from srlora_dist.tasks.heads import never_quantised

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class StoredAs:
    """The type of the pretrained weights that an adapter belongs to.

    Args:
        dtype: Of weights that are not quantised, and of the forward pass; ``auto`` is that of the checkpoint.
        quantization: ``nf4``, ``fp4``, ``int8``, or ``none``.
        double: Whether the constants of a 4-bit storage are quantised as well.
    """

    dtype: str = "auto"
    quantization: str = "none"
    double: bool = False

    @classmethod
    def parse(cls, text: str) -> StoredAs:
        """Read ``float32``, ``nf4-double computing in bfloat16`` and so on; with layers that are not quantised beside.

        Raises:
            ValueError: It is not such a type.
        """
        found = [cls._parse_one(part) for part in text.split(" and ")]
        quantised = [each for each in found if each is not None and each.quantization != "none"]
        plain = {each.dtype for each in found if each is not None and each.quantization == "none"}
        if None in found or len(quantised) > 1 or len(plain) > 1:
            raise ValueError(
                f"the adapter belongs to weights in {text!r}: give --weights as float32, bfloat16, float16, int8, nf4, "
                "fp4, nf4-double or fp4-double, where quantised with ' computing in bfloat16' for example"
            )
        return replace(quantised[0], dtype=(plain or {quantised[0].dtype}).pop()) if quantised else found[0]

    @classmethod
    def _parse_one(cls, text: str) -> StoredAs | None:
        types = "|".join(DTYPES)
        match = re.fullmatch(rf"({types})|(?:(nf4|fp4)(-double)?|(int8))(?: computing in ({types}))?", text)
        if match is None:
            return None
        plain, four_bits, double, eight_bits, computing = match.groups()
        return cls(plain or computing or "float32", four_bits or eight_bits or "none", bool(double))

    def options(self, auto_class: type, settings: PretrainedConfig) -> dict[str, object]:
        """For ``auto_class.from_pretrained``, of a model with this configuration."""
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        if self.quantization == "none":
            return {"dtype": dtype}
        skipped = {"llm_int8_skip_modules": never_quantised(auto_class, settings)}
        options = {"dtype": dtype, "device_map": {"": "cpu"}}  # else a quantised model goes to the GPU
        if self.quantization == "int8":
            return {**options, "quantization_config": BitsAndBytesConfig(load_in_8bit=True, **skipped)}
        four_bits = {"bnb_4bit_quant_type": self.quantization, "bnb_4bit_use_double_quant": self.double}
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **four_bits, **skipped)
        return {**options, "quantization_config": config}
