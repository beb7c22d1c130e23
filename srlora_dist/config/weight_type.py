"""The type of pretrained weights, and its text: ``float32``, ``int8`` or ``nf4-double computing in bfloat16``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class WeightType:
    """How pretrained weights are stored, which an adapter depends on.

    Args:
        dtype: Type of the weights that are not quantised, and of the forward pass. ``auto`` is that of the checkpoint;
            empty if the text does not name it.
        quantization: ``nf4``, ``fp4``, ``int8`` or ``none``.
        double: Whether the scales of a 4-bit storage are quantised as well.
    """

    dtype: str = "auto"
    quantization: str = "none"
    double: bool = False

    def __str__(self) -> str:
        if self.quantization == "none":
            return self.dtype
        computing = f" computing in {self.dtype}" if self.dtype else ""
        return f"{self.quantization}{'-double' * self.double}{computing}"

    @classmethod
    def parse(cls, text: str) -> WeightType:
        """Read the text of a type, or of a quantised and a plain type joined by `` and ``.

        Raises:
            ValueError: The text is not such a type.
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
    def _parse_one(cls, text: str) -> WeightType | None:
        types = "|".join(DTYPES)
        match = re.fullmatch(rf"({types})|(?:(nf4|fp4)(-double)?|(int8))(?: computing in ({types}))?", text)
        if match is None:
            return None
        plain, four_bits, double, eight_bits, computing = match.groups()
        return cls(plain or computing or "float32", four_bits or eight_bits or "none", bool(double))
