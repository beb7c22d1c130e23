"""Instruction tuning: the answers of conversations, or completions of prompts, from JSONL files."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from srlora_dist.config import RunConfig
from srlora_dist.tasks.files import read_lines, split_files

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from srlora_dist.tasks import Task

ROLES = ("system", "developer", "user", "assistant", "tool")
MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a chat template has around an answer if it says itself where answers are."""
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""A surrogate without its other half, which JSON can write and no tokenizer reads."""


class Encoded(NamedTuple):
    """Tokens of a sample, and for each whether it is of an answer."""

    tokens: list[int]
    is_answer: list[bool]


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
    from srlora_dist.tasks.models import check_length, check_tokens, load_decoder, quiet
    from srlora_dist.tasks.tokens import require_decoder, token_task

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
    """Turn the first ``most`` lines of a file into tokens and labels, cut to ``max_length``.

    Samples of which no token is left to learn are left out with a warning.

    Raises:
        ValueError: A line is not as it should be (the message names it), or no sample is left.
    """
    import datasets
    import numpy as np

    from srlora_dist.tasks.tokens import IGNORED

    tokens, labels = [], []
    lines = [(number, line) for number, line in enumerate(read_lines(path), start=1) if line.strip()][:most]
    for number, line in lines:
        where = f"{path}, line {number}"
        ids, is_answer = (part[:max_length] for part in encode_sample(_read_sample(line, where), tokenizer, where))
        learnt = [False, *(answer or not completion_only for answer in is_answer[1:])]
        if any(learnt):
            tokens.append(np.array(ids, np.int32))
            labels.append(np.where(learnt, tokens[-1], IGNORED).astype(np.int32))
    num_left_out = len(lines) - len(tokens)
    if not tokens:
        raise ValueError(
            f"{path} has no sample with a completion within task.max_length {max_length} tokens ({len(lines)} samples)"
        )
    if num_left_out:
        warnings.warn(
            f"{path}: {num_left_out} of {len(lines)} samples have no completion within task.max_length {max_length} "
            "tokens, and are left out",
            stacklevel=2,
        )
    return datasets.Dataset.from_dict({"input_ids": tokens, "labels": labels})


def encode_sample(sample: dict[str, object], tokenizer: PreTrainedTokenizerBase, where: str) -> Encoded:
    """Tokens of a sample: by the tokenizer's chat template, or of a prompt, its completion and an end token.

    Args:
        sample: With ``messages`` and perhaps ``tools``, or ``prompt`` and ``completion``.
        tokenizer: Of the model.
        where: File and line, for messages.

    Raises:
        ValueError: There is no chat template, or it does not take these messages.
    """
    if "messages" not in sample:
        pieces = [(sample["prompt"], False), (sample["completion"], True)]
        tokens, is_answer = _tokenise(tokenizer, pieces, begins=True)
        has_end = tokenizer.eos_token_id is None or tokens[-1:] == [tokenizer.eos_token_id]
        end = [] if has_end else [tokenizer.eos_token_id]
        return Encoded(tokens + end, is_answer + [True] * len(end))
    messages, tools = sample["messages"], {"tools": sample["tools"]} if sample.get("tools") else {}
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where} has messages, but the tokenizer has no chat template: choose a model made for chats, put a "
            "chat_template.jinja into its folder, or write lines with prompt and completion"
        )
    if MARKS_ANSWERS.search(tokenizer.get_chat_template()):
        asked = {"return_dict": True, "return_assistant_tokens_mask": True}
        marked = _apply_template(tokenizer, messages, where, **asked, **tools)
        return Encoded(list(marked["input_ids"]), [bool(mark) for mark in marked["assistant_masks"]])
    return _tokenise(tokenizer, _pieces(messages, tokenizer, where, **tools), begins=False)


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict], where: str, **options: object) -> object:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template raises errors of its own, such as of roles that do not alternate
        raise ValueError(f"{where}: the chat template does not take these messages ({error})") from error


def _pieces(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase, where: str, **tools: object
) -> list[tuple[str, bool]]:
    """The text of a conversation, cut before and after each answer; with an answer goes what the template ends it with.

    Found by what the template writes for the messages until there.
    """

    def written(number: int, **options: object) -> str:
        return _apply_template(tokenizer, messages[:number], where, tokenize=False, **options, **tools)

    whole, cuts = written(len(messages)), [0]
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = written(number, add_generation_prompt=True) if number else ""
            for text in (before, written(number + 1)):
                if not whole.startswith(text):
                    raise ValueError(
                        f"{where}: the chat template writes an earlier message in another way once others follow, so "
                        "that answers cannot be told apart: put {% generation %} around them in the template, or "
                        "write lines with prompt and completion"
                    )
                cuts.append(len(text))
    cuts.append(len(whole))
    return [(whole[start:stop], bool(k % 2)) for k, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False))]


def _tokenise(tokenizer: PreTrainedTokenizerBase, pieces: list[tuple[str, bool]], begins: bool) -> Encoded:
    """Tokens of pieces of one text, of which none belongs to two pieces.

    The text as a whole decides, unless it has a token across a boundary; then each piece is taken by itself, as a
    prompt is when the model is used.
    """

    def tokens_of(text: str, special: bool) -> list[int]:
        tokens = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        return tokens[: len(tokens) - _num_added_after(tokenizer)] if special else tokens

    texts = [piece for piece, _ in pieces]
    upto = [tokens_of("".join(texts[: k + 1]), begins) for k in range(len(texts))]
    whole = upto[-1]
    if all(whole[: len(tokens)] == tokens for tokens in upto):
        ends = [len(tokens) for tokens in upto]
        parts = [whole[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]
    else:
        parts = [tokens_of(text, begins and k == 0) for k, text in enumerate(texts)]
    tokens = [token for part in parts for token in part]
    return Encoded(tokens, [flag for part, (_, flag) in zip(parts, pieces, strict=True) for _ in part])


def _num_added_after(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens the tokenizer puts after any text, such as an end."""
    plain, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    ends = (len(whole) - number for number in range(len(whole)))
    return next((len(whole) - end for end in ends if whole[:end][-len(plain) :] == plain), 0)


def _files(data_dir: str | None) -> list[Path]:
    if data_dir is None:
        raise ValueError("task instruct needs task.data_dir: a folder with train.jsonl and validation.jsonl")
    lines = 'of lines {"messages": [...]} or {"prompt": ..., "completion": ...}'
    return split_files(data_dir, "jsonl", lines)


def _read_sample(line: str, where: str) -> dict[str, object]:
    try:
        sample = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}): write one object a line") from error
    if HALF_CHARACTER.search(json.dumps(sample, ensure_ascii=False)):
        raise ValueError(f"{where} has half of a character, such as of an emoji that was cut: remove it")
    if isinstance(sample, dict) and isinstance(sample.get("messages"), list):
        _require_messages(sample["messages"], where)
        return sample
    if not isinstance(sample, dict) or not all(isinstance(sample.get(key), str) for key in ("prompt", "completion")):
        raise ValueError(
            f'{where} has neither a list "messages" nor two texts "prompt" and "completion": {line.strip()[:80]}'
        )
    return sample


def _require_messages(messages: list[object], where: str) -> None:
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise ValueError(f"{where}: message {number} has the role {role!r}: choose one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: message {number} has no content that is text")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where} has no message of the role assistant, so that there is nothing to learn")
