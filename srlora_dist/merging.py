"""Merges an exported adapter into its base: a whole checkpoint that plain Transformers loads."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from srlora_dist.safefiles import write_folder
from srlora_dist.sites import keep_payloads_
from srlora_dist.tasks.models import quiet

logger = logging.getLogger(__name__)

FORMAT = "srlora-merged-1"
DTYPES = ("float32", "bfloat16", "float16")
INPUT_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
INPUT_FILES += ("chat_template*", "preprocessor_config.json", "processor_config.json")
"""What turns text or pictures into a model's inputs; copied as it is."""
NUM_ROWS, ROW_LENGTH = 4, 16
"""Of the random inputs on which the merged model is compared."""


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
        """Read ``float32``, ``nf4-double computing in bfloat16`` and so on.

        Raises:
            ValueError: It is not such a type.
        """
        types = "|".join(DTYPES)
        match = re.fullmatch(rf"({types})|(?:(nf4|fp4)(-double)?|(int8))(?: computing in ({types}))?", text)
        if match is None:
            raise ValueError(
                f"the adapter belongs to weights in {text!r}: give --weights as float32, bfloat16, float16, int8, nf4, "
                "fp4, nf4-double or fp4-double, where quantised with ' computing in bfloat16' for example"
            )
        plain, four_bits, double, eight_bits, computing = match.groups()
        return cls(plain or computing or "float32", four_bits or eight_bits or "none", bool(double))

    def options(self) -> dict[str, object]:
        """For ``from_pretrained``."""
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        if self.quantization == "none":
            return {"dtype": dtype}
        # As the tasks load them: a head is never quantised.
        skipped = {"llm_int8_skip_modules": [*SEQ_CLS_HEAD_NAMES, "lm_head"]}
        if self.quantization == "int8":
            return {"dtype": dtype, "quantization_config": BitsAndBytesConfig(load_in_8bit=True, **skipped)}
        four_bits = {"bnb_4bit_quant_type": self.quantization, "bnb_4bit_use_double_quant": self.double}
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **four_bits, **skipped)
        return {"dtype": dtype, "quantization_config": config}


class Merger:
    """An adapter and the base that it belongs to.

    Args:
        adapter: Folder of the adapter.
        base: Folder or name on the hub; None takes the one that the adapter names.
        weights: The type that the adapter belongs to; None takes the one that its README names, and without that the
            type of the checkpoint.

    Raises:
        ValueError: The folder holds no adapter of a kind that can be merged, or its base is not there.
    """

    def __init__(self, adapter: Path, base: str | None = None, weights: str | None = None) -> None:
        if not (adapter / "adapter_config.json").is_file():
            raise ValueError(f"{adapter} is no adapter: it has no adapter_config.json; srlora export writes one")
        if not (adapter / "adapter_model.safetensors").is_file():
            raise ValueError(f"{adapter} has no adapter_model.safetensors; pickles, which can run code, are not opened")
        self.adapter, self.config = adapter, PeftConfig.from_pretrained(str(adapter))
        self.base = base or self.config.base_model_name_or_path
        if not self.base:
            raise ValueError(f"{adapter} does not name its base: give --base")
        self.stored_as = StoredAs.parse(weights) if weights is not None else _named_in_readme(adapter)
        self.settings, self.auto_class = self._find_class()

    def merge(self, folder: Path, dtype: str | None = None) -> dict[str, object]:
        """Write the merged model, its configuration and the files of its tokenizer or image processor.

        The sum is made in float32, 4 bytes a weight, and rounded once.

        Args:
            folder: Where to write, whole or not at all; it must be empty or not be there.
            dtype: Of the written weights; None is that of the base.

        Returns:
            ``weights`` of the base, the written ``dtype``, ``bytes``, and the ``relative_difference`` of the logits of
            random inputs from those of base and adapter.

        Raises:
            ValueError: The folder is in use, the base does not fit the adapter, or the merged model gives NaN.
            OSError: The folder cannot be written.
        """
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ValueError(f"{folder} is there already: choose a new folder")
        about: dict[str, object] = {"format": FORMAT, "base": self.base, "adapter": str(self.adapter)}
        with quiet():
            inputs, expected = self._expected()
            model = self._load()
            kept = dtype or str(model.dtype).removeprefix("torch.")
            about |= {"weights": self._describe(model), "dtype": kept}
            if self.stored_as.quantization != "none":
                model = model.dequantize()
            merged = PeftModel.from_pretrained(model.float(), self.adapter).merge_and_unload(safe_merge=True)
            merged = merged.to(getattr(torch, kept))

            def fill(temporary: Path) -> None:
                nonlocal model, merged
                merged.save_pretrained(temporary)
                model = merged = None  # so that no more than one is in memory
                self._copy_input_files(temporary)
                written = self.auto_class.from_pretrained(temporary, dtype="auto", use_safetensors=True)
                about["relative_difference"] = _relative_difference(_logits(written, inputs), expected)

            try:
                write_folder(folder, fill, about)
            except SafetensorError as error:  # it reports a full disk in its own way
                raise OSError(str(error)) from error
        return about | {"bytes": sum(path.stat().st_size for path in folder.iterdir())}

    def _expected(self) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Random inputs, and the logits of the adapter on the base as it was trained on."""
        model = self._load()
        keep_payloads_(model)
        inputs = _random_inputs(model)
        return inputs, _logits(PeftModel.from_pretrained(model, self.adapter), inputs)

    def _describe(self, model: nn.Module) -> str:
        kind, dtype = self.stored_as.quantization, str(model.dtype).removeprefix("torch.")
        return dtype if kind == "none" else f"{kind}{'-double' * self.stored_as.double} computing in {dtype}"

    def _find_class(self) -> tuple[PretrainedConfig, type]:
        """The configuration of the base with the classes of the adapter's head, and what loads it."""
        try:
            settings = AutoConfig.from_pretrained(self.base)
        except (OSError, ValueError) as error:
            raise ValueError(f"the base {self.base!r} cannot be read ({error}): give --base") from error
        kind = self.config.task_type
        if kind == "CAUSAL_LM":
            return settings, AutoModelForCausalLM
        is_vision = kind is None and type(settings) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        if kind != "SEQ_CLS" and not is_vision:
            raise ValueError(
                f"{self.adapter} is of PEFT's task type {kind}, and what can be merged is SEQ_CLS, CAUSAL_LM, and a "
                "classifier of pictures"
            )
        auto_class = AutoModelForImageClassification if is_vision else AutoModelForSequenceClassification
        num_labels = _num_labels(self.adapter, settings, auto_class)
        if num_labels is not None:
            settings.num_labels = num_labels
        if not is_vision and settings.get_text_config().pad_token_id is None:
            ends = settings.get_text_config().eos_token_id  # as the tasks do; without one rows go one by one
            settings.get_text_config().pad_token_id = ends[0] if isinstance(ends, list) else ends
        return settings, auto_class

    def _load(self) -> PreTrainedModel:
        options = {"use_safetensors": True, "ignore_mismatched_sizes": True, **self.stored_as.options()}
        try:
            return self.auto_class.from_pretrained(self.base, config=self.settings, **options).eval()
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"the base {self.base!r} cannot be loaded ({error}): give another with --base") from error

    def _copy_input_files(self, folder: Path) -> None:
        source = Path(self.base)
        if not source.is_dir():
            source = Path(snapshot_download(self.base, allow_patterns=list(INPUT_FILES)))
        for pattern in INPUT_FILES:
            for path in source.glob(pattern):
                shutil.copyfile(path, folder / path.name)


def _named_in_readme(adapter: Path) -> StoredAs:
    """The type that srlora_dist writes into the README of an adapter."""
    try:
        named = re.search(r"the adapted weights in \*\*(.+?)\*\*", (adapter / "README.md").read_text())
    except (OSError, UnicodeDecodeError):
        named = None
    if named is None:
        logger.warning("%s does not say which type of weights it belongs to: taking that of the checkpoint", adapter)
        return StoredAs()
    return StoredAs.parse(named[1])


def _num_labels(adapter: Path, settings: PretrainedConfig, auto_class: type) -> int | None:
    """Classes of the head in an adapter: a model without memory, of a number of classes no other size has, tells where.

    None where the adapter has no head.
    """
    mark = 7919
    marked = type(settings).from_dict(settings.to_dict())
    marked.num_labels = mark
    with torch.device("meta"):
        parameters = auto_class.from_config(marked).named_parameters()
    outputs = [name for name, parameter in parameters if parameter.dim() == 2 and parameter.shape[0] == mark]
    try:
        with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            names = {f"base_model.model.{name}" for name in outputs} & set(file.keys())
            return file.get_slice(min(names)).get_shape()[0] if names else None
    except SafetensorError as error:
        raise ValueError(f"{adapter / 'adapter_model.safetensors'} cannot be read as safetensors ({error})") from error


def _random_inputs(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Rows of tokens or pictures, the same every time; one by one, because a model may lack a padding token."""
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        config, size = model.config, model.config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (NUM_ROWS, 1, getattr(config, "num_channels", 3), height, width)
        return [{"pixel_values": row.to(model.dtype)} for row in torch.randn(shape, generator=generator)]
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or ROW_LENGTH
    shape = (NUM_ROWS, 1, min(ROW_LENGTH, most))
    tokens = torch.randint(model.get_input_embeddings().num_embeddings, shape, generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]


@torch.no_grad()
def _logits(model: nn.Module, inputs: list[dict[str, Tensor]]) -> list[Tensor]:
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    rows = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in row.items()} for row in inputs]
    return [model.eval()(**row).logits.float() for row in rows]


def _relative_difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference over that of what was expected.

    Raises:
        ValueError: It is not a number.
    """
    got, expected = torch.cat(got), torch.cat(expected)
    difference = ((got - expected).norm() / expected.norm()).item()
    if not difference < float("inf"):
        raise ValueError("the merged model's logits are NaN or infinite: choose a wider --dtype, such as float32")
    return difference
