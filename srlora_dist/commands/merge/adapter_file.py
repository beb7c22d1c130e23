"""Reads the two files of an adapter, and names what in them is not as it should be before PEFT stumbles over it."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path

from peft import PeftConfig
from safetensors import SafetensorError, safe_open

KINDS = ("LORA", "ADALORA")
"""PEFT's types of adapters that can be merged here: what a run leaves."""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_pattern(value: object) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except (re.error, RecursionError, OverflowError):
        return False


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_map(is_value: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(_is_pattern(k) and is_value(v) for k, v in value.items())


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


EXPECTED: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_count, "a positive whole number"),
    "lora_alpha": (_is_number, "a finite number"),
    **dict.fromkeys(
        ("target_modules", "exclude_modules"),
        (lambda value: _are_names(value) or _is_pattern(value), "a list of names, or a regular expression"),
    ),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (_are_names, "a list of names")),
    "layers_pattern": (lambda value: isinstance(value, str) or _are_names(value), "a name, or a list of names"),
    "layers_to_transform": (
        lambda value: all(isinstance(k, int) for k in (value if isinstance(value, list) else [value])),
        "a number of a layer, or a list of them",
    ),
    "rank_pattern": (_is_map(_is_count), "regular expressions with positive whole numbers"),
    "alpha_pattern": (_is_map(_is_number), "regular expressions with finite numbers"),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"), (_is_flag, "true or false")),
    **dict.fromkeys(
        ("base_model_name_or_path", "task_type", "revision"), (lambda value: isinstance(value, str), "a text")
    ),
}
"""What ``adapter_config.json`` may say, beside null."""


def read_config(adapter: Path) -> PeftConfig:
    """Read ``adapter_config.json``.

    Raises:
        ValueError: It cannot be read, is of another kind of adapter than LoRA, or one of its values is of a wrong type;
            the message names the value.
    """
    path = adapter / "adapter_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): copy the adapter again") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a JSON object: copy the adapter again")
    kind = settings.get("peft_type")
    if kind not in KINDS:
        raise ValueError(
            f"{path} is of peft_type {kind!r}, and what can be merged is {' and '.join(KINDS)}: merge others with "
            "PEFT's merge_and_unload, where it has one"
        )
    for name, (is_right, wanted) in EXPECTED.items():
        if kind == "ADALORA" and name == "rank_pattern":  # there it lists which pairs are left
            continue
        if settings.get(name) is not None and not is_right(settings[name]):
            raise ValueError(f"{path} has {name} {settings[name]!r}, where {wanted} is wanted: correct it")
    for name in ("r", "lora_alpha"):
        if settings.get(name) is None:  # PEFT would take its own default
            raise ValueError(f"{path} has {name} null or left out, where {EXPECTED[name][1]} is wanted: correct it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that this version of PEFT does not know
            return PeftConfig.from_pretrained(str(adapter))
    except Exception as error:  # whatever PEFT makes of it
        raise ValueError(f"{path} is of no adapter that PEFT knows ({error!r})") from error


def read_shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of an adapter by their names.

    Raises:
        ValueError: The file cannot be read, has none, or one that is NaN or infinite.
    """
    path, shapes = adapter / "adapter_model.safetensors", {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                tensor = file.get_tensor(name)
                shapes[name] = tuple(tensor.shape)
                if not tensor.is_floating_point() and ".lora_" in name:
                    raise ValueError(f"{path} has {name} in {tensor.dtype}, which is no type of a factor")
                if tensor.is_floating_point() and not tensor.float().isfinite().all():
                    raise ValueError(f"{path} has {name} with NaN or infinite values: take another checkpoint")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): copy the adapter again") from error
    if not shapes:
        raise ValueError(f"{path} has no tensors: copy the adapter again")
    return shapes


def require_pairs(adapter: Path, config: PeftConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare the factors with each other and with the rank that ``adapter_config.json`` gives.

    Raises:
        ValueError: One lacks its other half, or they have other ranks.
    """
    path = adapter / "adapter_model.safetensors"
    for name, shape in shapes.items():
        other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if ".bias" in name or other == name:
            continue
        if other not in shapes:
            raise ValueError(f"{path} has {name}, but no {other}: copy the adapter again")
        if len(shape) < 2 or len(shapes[other]) < 2:
            raise ValueError(f"{path} has {name} of the shape {shape}, which is no matrix")
        rank, others = (shape[0], shapes[other][1]) if ".lora_A." in name else (shape[1], shapes[other][0])
        if rank != others:
            raise ValueError(
                f"{path} has {name} of rank {rank}, and {other} of rank {others}: they do not belong together"
            )
        if config.peft_type == "LORA" and not (config.rank_pattern or config.target_parameters) and rank != config.r:
            raise ValueError(f"{path} has {name} of rank {rank}, but adapter_config.json has r {config.r}: correct it")
