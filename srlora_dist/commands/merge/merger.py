"""Puts an adapter on its base, adds it up, writes the sum, and compares what plain Transformers reads of it."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from srlora_dist.checkpoint.base_label import BaseLabel
from srlora_dist.checkpoint.files import write_folder
from srlora_dist.commands.merge.adapter_file import read_config, read_shapes, require_pairs
from srlora_dist.commands.merge.compare import logits, random_inputs, relative_difference
from srlora_dist.commands.merge.load_options import load_options
from srlora_dist.config.weight_type import WeightType
from srlora_dist.errors import first_sentence, shorten_list
from srlora_dist.layers.discovery import keep_payloads_
from srlora_dist.tasks.loading import quiet

logger = logging.getLogger(__name__)

FORMAT = "srlora-merged-1"
INPUT_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
INPUT_FILES += ("chat_template*", "preprocessor_config.json", "processor_config.json")
"""What turns text or pictures into a model's inputs; copied as it is."""
SAME_IN_FLOAT32, SAME_FILE = 1e-3, 0.05
"""Relative differences of the logits that another order of summing makes, and a type that Transformers keeps wider."""


class Merger:
    """An adapter and the base that it belongs to.

    Args:
        adapter: Folder of the adapter.
        base: Folder or name on the hub; None takes the one that the adapter names.
        weights: The type that the adapter belongs to; None takes the one that the adapter says, and without that the
            type of the checkpoint.

    Raises:
        ValueError: The folder holds no adapter of a kind that can be merged, or its base is not there.
    """

    def __init__(self, adapter: Path, base: str | None = None, weights: str | None = None) -> None:
        if not (adapter / "adapter_config.json").is_file():
            raise ValueError(f"{adapter} is no adapter: it has no adapter_config.json; srlora export writes one")
        if not (adapter / "adapter_model.safetensors").is_file():
            raise ValueError(f"{adapter} has no adapter_model.safetensors; pickles, which can run code, are not opened")
        self.adapter, self.config, self.shapes = adapter, read_config(adapter), read_shapes(adapter)
        require_pairs(adapter, self.config, self.shapes)
        self.names = set(self.shapes)
        self.base = base or self.config.base_model_name_or_path
        if not self.base:
            raise ValueError(f"{adapter} does not name its base: give --base")
        self.label = BaseLabel.read(adapter / "adapter_model.safetensors")
        self.weights = self._find_type(weights)
        self.settings, self.auto_class = self._find_class()

    def merge(self, folder: Path, dtype: str | None = None) -> dict[str, object]:
        """Write the merged model, its configuration and the files of its tokenizer or image processor.

        The sum is made in float32, 4 bytes per weight, and rounded once.

        Args:
            folder: Where to write, whole or not at all; it must be empty or not be there.
            dtype: Type of the written weights; None is that of the base.

        Returns:
            ``weights`` of the base, the written ``dtype``, ``bytes``, and the ``relative_difference`` of the logits of
            random inputs from those of base and adapter.

        Raises:
            ValueError: The folder is in use, the base does not fit the adapter, or the merged model gives NaN or
                something else than both do.
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
            if self.weights.quantization != "none":
                model = _with_published_layers(model.dequantize())
            merged = self._merge(model.float(), inputs).to(getattr(torch, kept))
            rounded = logits(merged, inputs)

            def fill(temporary: Path) -> None:
                nonlocal model, merged
                merged.save_pretrained(temporary)
                model = merged = None  # so that no more than one is in memory
                self._copy_input_files(temporary)
                got = logits(self.auto_class.from_pretrained(temporary, dtype="auto", use_safetensors=True), inputs)
                about["relative_difference"] = relative_difference(got, expected)
                if relative_difference(got, rounded) > SAME_FILE:
                    raise ValueError(
                        "the merged model computes something else once it is written and read: report this"
                    )

            try:
                write_folder(folder, fill, about)
            except SafetensorError as error:  # it reports a full disk in its own way
                raise OSError(str(error)) from error
        return about | {"bytes": sum(path.stat().st_size for path in folder.iterdir())}

    def _find_type(self, weights: str | None) -> WeightType:
        if self.label is None:
            logger.warning(
                "%s does not say which base it belongs to: its weights are not checked, and taken in the type of %s",
                self.adapter,
                "the checkpoint" if weights is None else weights,
            )
            return WeightType() if weights is None else WeightType.parse(weights)
        own = WeightType.parse(self.label.weights)
        if weights is None or WeightType.parse(weights) == own:
            return own
        logger.warning(
            "%s belongs to weights in %s: in %s it gives something else, and the base cannot be checked",
            self.adapter,
            self.label.weights,
            weights,
        )
        self.label = None
        return WeightType.parse(weights)

    def _require_its_base(self, adapted: PeftModel) -> None:
        """Stop where another base has the same shapes."""
        others = self.label.differing(adapted.get_base_model()) if self.label is not None else []
        if others:
            raise ValueError(
                f"the adapter {self.adapter} was trained on other weights than those of {self.base!r} in "
                f"{self.label.weights}, from {shorten_list(others)} on: give its own base with --base"
            )

    def _expected(self) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Random inputs, and the logits of the adapter on the base as it was trained on."""
        model = self._load()
        keep_payloads_(model)
        inputs = random_inputs(model)
        adapted = self._adapt(model)
        self._require_its_base(adapted)
        return inputs, logits(adapted, inputs)

    def _adapt(self, model: PreTrainedModel) -> PeftModel:
        """The base with its adapter, all of it."""
        try:
            adapted = PeftModel.from_pretrained(model, self.adapter)
        except Exception as error:  # PEFT's are of many kinds
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(
                f"the adapter {self.adapter} does not fit the base {self.base!r} ({reason}): give its own with --base"
            ) from error
        # PEFT leaves out in silence what it finds no place for.
        factors = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        known = factors | adapted.state_dict().keys()
        homeless = sorted(self.names - known)
        if homeless:
            raise ValueError(
                f"the adapter {self.adapter} has {shorten_list(homeless)}, for which the base {self.base!r} has no "
                "place: give its own with --base"
            )
        lacking = sorted(name for name in factors - self.names if ".lora_" in name)
        if lacking:
            raise ValueError(
                f"the adapter {self.adapter} lacks {shorten_list(lacking)}, for which its adapter_config.json asks"
            )
        return adapted

    def _merge(self, model: PreTrainedModel, inputs: list[dict[str, Tensor]]) -> PreTrainedModel:
        adapted = self._adapt(model)
        before = logits(adapted, inputs)
        merged = adapted.merge_and_unload(safe_merge=True)
        if relative_difference(logits(merged, inputs), before) > SAME_IN_FLOAT32:
            raise ValueError(
                f"{self.adapter} cannot be merged: the sum computes something else, as where a weight that is adapted "
                "in one layer is used by another one, too; serve it with PEFT"
            )
        return merged

    def _describe(self, model: nn.Module) -> str:
        return str(replace(self.weights, dtype=str(model.dtype).removeprefix("torch.")))

    def _find_class(self) -> tuple[PretrainedConfig, type]:
        """The configuration of the base with the classes of the adapter's head, and what loads it."""
        try:
            settings = AutoConfig.from_pretrained(self.base)
        except Exception as error:  # of whatever is in its config.json
            raise ValueError(f"the base {self.base!r} cannot be read ({first_sentence(error)}): give --base") from error
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
        try:
            num_labels = _num_labels(self.shapes, settings, auto_class)
        except Exception as error:  # of whatever is in its config.json
            raise ValueError(
                f"the base {self.base!r} cannot be made ({first_sentence(error)}): give another --base"
            ) from error
        if num_labels is not None:
            settings.num_labels = num_labels
        if not is_vision and settings.get_text_config().pad_token_id is None:
            ends = settings.get_text_config().eos_token_id  # as the tasks do; without one rows go one by one
            settings.get_text_config().pad_token_id = ends[0] if isinstance(ends, list) else ends
        return settings, auto_class

    def _load(self) -> PreTrainedModel:
        options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        options |= load_options(self.weights, self.auto_class, self.settings)
        try:
            model, report = self.auto_class.from_pretrained(self.base, config=self.settings, **options)
        except Exception as error:  # of whatever is in its files
            reason = first_sentence(error)
            raise ValueError(f"the base {self.base!r} cannot be loaded ({reason}): give another with --base") from error
        not_loaded = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
        nowhere = sorted(key for key in not_loaded if not _names_of(key) & self.names)
        if nowhere:
            raise ValueError(
                f"neither the base {self.base!r} nor the adapter has {shorten_list(nowhere)}, which started at "
                "random when it was trained: train it whole and save it (modules_to_save), or give its own base with "
                "--base"
            )
        if self.label is not None and self.label.vocab_size is not None:
            with torch.random.fork_rng():
                model.resize_token_embeddings(self.label.vocab_size, mean_resizing=False)  # the adapter has all rows
        return model.eval()

    def _copy_input_files(self, folder: Path) -> None:
        source = Path(self.base)
        if not source.is_dir():
            source = Path(snapshot_download(self.base, allow_patterns=list(INPUT_FILES)))
        for place in (source, self.adapter):  # a tokenizer beside the adapter is the later one
            for path in (path for pattern in INPUT_FILES for path in place.glob(pattern)):
                shutil.copyfile(path, folder / path.name)


def _num_labels(shapes: dict[str, tuple[int, ...]], settings: PretrainedConfig, auto_class: type) -> int | None:
    """Classes of the head in an adapter: a model without memory, of a number of classes no other size has, tells where.

    None where the adapter has no head.
    """
    mark = 7919
    marked = type(settings).from_dict(settings.to_dict())
    marked.num_labels = mark
    with torch.device("meta"):
        parameters = auto_class.from_config(marked).named_parameters()
    outputs = [name for name, parameter in parameters if parameter.dim() == 2 and parameter.shape[0] == mark]
    names = {known for name in outputs for known in _names_of(name)} & shapes.keys()
    if not names:
        return None
    name = min(names)
    if len(shapes[name]) != 2:
        raise ValueError(f"the adapter has {name} of the shape {shapes[name]}, which is no matrix: copy it again")
    return shapes[name][0]


def _names_of(parameter: str) -> set[str]:
    """What a parameter of the base may be called in an adapter: whole, and in a layer that is adapted."""
    layer, _, name = parameter.rpartition(".")
    return {f"base_model.model.{parameter}", f"base_model.model.{layer}.base_layer.{name}"}


def _with_published_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Put back GPT-2's Conv1D, which holds its weight transposed: ``dequantize`` leaves a linear layer in its place."""
    with torch.device("meta"):
        published = type(model)(model.config)
    for name, layer in published.named_modules():
        found = model.get_submodule(name)
        if isinstance(layer, Conv1D) and isinstance(found, nn.Linear):
            layer.weight, layer.bias = nn.Parameter(found.weight.detach().T.contiguous()), found.bias
            model.set_submodule(name, layer)
    return model
