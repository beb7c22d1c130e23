"""Causal language modelling: the next token of plain text, from a folder or from the sentences of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from srlora_dist.config.run import RunConfig
from srlora_dist.tasks.text_files import SPLITS, read_lines, split_files

if TYPE_CHECKING:
    from srlora_dist.tasks.task import Task


def check(config: RunConfig) -> None:
    """Look for the text files where a folder is given.

    Raises:
        ValueError: A file is missing.
    """
    if config.task.data_dir is not None:
        _files(config.task.data_dir)


def load(config: RunConfig) -> Task:
    """Build the task; without a folder it learns the demo's sentences, whose labels are left out.

    Raises:
        ValueError: The text or the model cannot be read.
    """
    if config.task.data_dir is not None:
        texts = [_read_documents(path) for path in _files(config.task.data_dir)]
    else:
        from srlora_dist.tasks.demo import read_splits

        parts = read_splits()
        texts = [parts[split]["text"] for split in SPLITS]
    return _lm_task(config, *texts)


def _files(data_dir: str) -> list[Path]:
    return split_files(data_dir, "txt", "one document a line")


def _read_documents(path: Path) -> list[str]:
    return [line.strip() for line in read_lines(path) if line.strip()]


def _lm_task(config: RunConfig, train: list[str], evaluation: list[str]) -> Task:
    from srlora_dist.tasks.causal_lm import require_decoder, token_task
    from srlora_dist.tasks.labels import IGNORED
    from srlora_dist.tasks.loading import check_length, check_tokens, load_decoder, quiet
    from srlora_dist.tasks.text import encode

    def labelled(tokens: list[int]) -> dict[str, list[int]]:
        return {"labels": [IGNORED, *tokens[1:]]}

    options, splits = config.task, []
    with quiet():
        model, tokenizer = load_decoder(config)
        require_decoder(config, model)
        check_length(config, model, tokenizer, least=2)
        for name, texts, most in (
            ("train", train, options.max_train_samples),
            ("validation", evaluation, options.max_eval_samples),
        ):
            # A single token has nothing before it to be predicted from.
            rows = encode(tokenizer, {"text": texts}, options.max_length, most)
            rows = rows.filter(lambda tokens: len(tokens) > 1, input_columns="input_ids", keep_in_memory=True)
            if len(rows) == 0:
                raise ValueError(
                    f"task.data_dir is {options.data_dir!r}, whose {name} split has no document of two tokens or more"
                )
            check_tokens(config, model, tokenizer, rows)
            rows = rows.select_columns("input_ids")
            splits.append(rows.map(labelled, input_columns="input_ids", keep_in_memory=True))
        return token_task(config, model, tokenizer, *splits)
