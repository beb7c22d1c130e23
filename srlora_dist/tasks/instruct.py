"""Instruction tuning: the answers of conversations, or completions of prompts, from JSONL files."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from srlora_dist.config.run import RunConfig
from srlora_dist.tasks.answers import encode_sample
from srlora_dist.tasks.samples import LAYOUTS
from srlora_dist.tasks.text_files import SPLITS, read_lines, split_files

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from srlora_dist.tasks.task import Task

HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""A surrogate without its other half, which JSON can write and no tokenizer reads."""


def check(config: RunConfig) -> None:
    """Look for the files.

    Raises:
        ValueError: The folder is not given, or a file is missing.
    """
    _files(config.task.data_dir)


def load(config: RunConfig) -> Task:
    """Build the task.

    Raises:
        ValueError: A line of a file is not as it should be, the tokenizer has no chat template for ``messages``, or the
            model cannot be read.
    """
    from srlora_dist.tasks.causal_lm import require_decoder, token_task
    from srlora_dist.tasks.loading import check_length, check_tokens, load_decoder, quiet

    options, splits = config.task, []
    with quiet():
        model, tokenizer = load_decoder(config)
        require_decoder(config, model)
        check_length(config, model, tokenizer, least=2)
        for path, most in zip(
            _files(options.data_dir), (options.max_train_samples, options.max_eval_samples), strict=True
        ):
            splits.append(read_split(path, tokenizer, options.max_length, options.completion_only, most))
            check_tokens(config, model, tokenizer, splits[-1])
        return token_task(config, model, tokenizer, *splits)


def read_split(
    path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, completion_only: bool, most: int | None
) -> datasets.Dataset:
    """Turn the first ``most`` samples of a file into tokens and labels, cut to ``max_length``.

    Samples of which no token is left to learn are left out with a warning. Others warn of samples that are cut, and of
    answers without an end.

    Raises:
        ValueError: A sample is not as it should be (the message names its line), or none is left.
    """
    import datasets
    import numpy as np

    from srlora_dist.tasks.labels import IGNORED

    tokens, labels, endless, num_cut = [], [], Counter(), 0
    samples = _read_samples(path)[:most]
    for where, sample in samples:
        encoded = encode_sample(sample, tokenizer, where)
        ids = encoded.tokens[:max_length]
        wanted = encoded.is_answer if completion_only else [not muted for muted in encoded.is_muted]
        learnt = [False, *wanted[1:max_length]]
        if any(learnt):
            tokens.append(np.array(ids, np.int32))
            labels.append(np.where(learnt, tokens[-1], IGNORED).astype(np.int32))
            num_cut += len(encoded.tokens) > max_length
            endless[encoded.why_endless] += 1
    within = f"within task.max_length {max_length} tokens"
    if not tokens:
        raise ValueError(f"{path} has no sample with a completion {within} to learn ({len(samples)} samples)")
    _warn_of(path, len(samples) - len(tokens), len(samples), f"have no completion {within} to learn, and are left out")
    _warn_of(path, num_cut, len(samples), f"are longer than task.max_length {max_length} tokens, and are cut there")
    for reason, count in endless.items():
        unknown = f"teach no end of an answer, because {reason}: the model will not know where to stop"
        _warn_of(path, count if reason else 0, len(samples), unknown)
    return datasets.Dataset.from_dict({"input_ids": tokens, "labels": labels})


def _warn_of(path: Path, count: int, number: int, what: str) -> None:
    if count:
        warnings.warn(f"{path}: {count} of {number} samples {what}", stacklevel=3)


def _files(data_dir: str | None) -> list[Path]:
    if data_dir is None:
        raise ValueError("task instruct needs task.data_dir: a folder with train.jsonl and validation.jsonl")
    arrays = [Path(data_dir).expanduser() / f"{split}.json" for split in SPLITS]
    if all(path.is_file() for path in arrays):
        return arrays
    return split_files(data_dir, "jsonl", f"of lines {LAYOUTS}")


def _read_samples(path: Path) -> list[tuple[str, object]]:
    """Where each sample is, and what JSON has there: one a line, or the whole file a list of them."""
    lines = read_lines(path)
    text = "\n".join(lines).strip()
    if text.startswith("[") and (text.endswith("]") or path.suffix == ".json"):
        listed = _parse(text, str(path), "write a list of samples, or one object a line")
        found = [(f"{path}, sample {number}", sample) for number, sample in enumerate(listed, start=1)]
    else:
        numbered = [(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
        found = [(where, _parse(line, where, "write one object a line")) for where, line in numbered]
    for where, sample in found:
        if HALF_CHARACTER.search(json.dumps(sample, ensure_ascii=False)):
            raise ValueError(f"{where} has half of a character, such as of an emoji that was cut: remove it")
    return found


def _parse(text: str, where: str, remedy: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}): {remedy}") from error
