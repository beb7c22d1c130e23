"""Turns a sample of instructions into tokens, and says which of them are of answers that are to be learnt."""

from __future__ import annotations

import re
from itertools import groupby
from os.path import commonprefix
from typing import TYPE_CHECKING, NamedTuple

from srlora_dist.tasks.samples import Sample, read_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a chat template has around an answer if it says itself where answers are."""
PROMPT, ANSWER, MUTED = 0, 1, 2
"""What a piece of a sample is; a muted answer is one that is marked not to be learnt."""
NO_EOS = "the tokenizer has no eos token"
NO_END_MARK = "the chat template writes no end mark after it, or keeps it out of what is learnt"


class Encoded(NamedTuple):
    """Tokens of a sample.

    Args:
        tokens: Not cut.
        is_answer: For each, whether it belongs to an answer that is to be learnt.
        is_muted: For each, whether it belongs to an answer that is marked not to be learnt.
        why_endless: Why what is learnt has no end by which the model would know where to stop; empty where it has one.
    """

    tokens: list[int]
    is_answer: list[bool]
    is_muted: list[bool]
    why_endless: str


def encode_sample(sample: object, tokenizer: PreTrainedTokenizerBase, where: str) -> Encoded:
    """Tokens of a sample: by the tokenizer's chat template, or of a prompt, its completion and an end token.

    Args:
        sample: In one of the layouts that ``samples.py`` reads.
        tokenizer: Tokenizer of the model.
        where: File and line, for messages.

    Raises:
        ValueError: The layout is not known, there is no chat template, or it does not take these messages.
    """
    read = read_sample(sample, where)
    if read.messages is not None and (tokenizer.chat_template is not None or read.prompt is None):
        return _encode_messages(read, tokenizer, where)
    tokens, kinds = _tokenise(tokenizer, [(read.prompt, PROMPT), (read.completion, ANSWER)], begins=True)
    has_end = tokenizer.eos_token_id is None or tokens[-1:] == [tokenizer.eos_token_id]
    end = [] if has_end else [tokenizer.eos_token_id]
    return _encoded(tokens + end, kinds + [ANSWER] * len(end), NO_EOS if tokenizer.eos_token_id is None else "")


def _encode_messages(sample: Sample, tokenizer: PreTrainedTokenizerBase, where: str) -> Encoded:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where} has messages, but the tokenizer has no chat template: choose a model made for chats, put a "
            "chat_template.jinja into its folder, or write lines with prompt and completion"
        )
    _require_calls(sample, tokenizer, where)
    if MARKS_ANSWERS.search(tokenizer.get_chat_template()):
        return _encode_marked(sample, tokenizer, where)
    pieces = _pieces(sample, tokenizer, where)
    contents = [message["content"] for message in sample.messages if message["role"] == "assistant"]
    answers = [piece for piece in pieces if piece[1] != PROMPT]
    has_end = any(
        kind == ANSWER and _has_end(text, content, tokenizer)
        for (text, kind), content in zip(answers, contents, strict=True)
    )
    return _encoded(*_tokenise(tokenizer, pieces, begins=False), "" if has_end else NO_END_MARK)


def _require_calls(sample: Sample, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise where the template leaves calls of tools out: an empty answer would be learnt in their place."""
    calls = [call for message in sample.messages for call in message.get("tool_calls", ())]
    names = [str(call.get("function", call).get("name")) for call in calls]
    text = _apply_template(tokenizer, sample.messages, where, tokenize=False, tools=sample.tools) if names else ""
    missing = [name for name in names if name not in text]
    if missing:
        raise ValueError(
            f"{where} calls the tool {missing[0]}, which the chat template does not write: choose a model made for "
            "tools, or leave such lines out"
        )


def _encode_marked(sample: Sample, tokenizer: PreTrainedTokenizerBase, where: str) -> Encoded:
    """Find the answers by the marks in the template: each unbroken row of marked tokens is one."""
    options = {"return_dict": True, "return_assistant_tokens_mask": True, "tools": sample.tools}
    marked = _apply_template(tokenizer, sample.messages, where, **options)
    tokens, mask = list(marked["input_ids"]), [bool(mark) for mark in marked["assistant_masks"]]
    answers = [k for k, message in enumerate(sample.messages) if message["role"] == "assistant"]
    runs = [(is_answer, len(list(run))) for is_answer, run in groupby(mask)]
    has_all = sum(is_answer for is_answer, _ in runs) == len(answers)
    if not has_all and not all(sample.is_learnt[k] for k in answers):
        raise ValueError(
            f"{where} marks an answer as not to be learnt, but the chat template marks "
            f"{sum(is_answer for is_answer, _ in runs)} answers where there are {len(answers)}, so that it cannot be "
            "told apart: remove {% generation %} from the template, or that message from the line"
        )
    kinds, has_end, numbers = [], not has_all, iter(answers)
    for is_answer, length in runs:
        number = next(numbers) if is_answer and has_all else None
        learnt = is_answer and (number is None or sample.is_learnt[number])
        if learnt and number is not None:
            text = tokenizer.decode(tokens[len(kinds) : len(kinds) + length])
            has_end |= _has_end(text, sample.messages[number]["content"], tokenizer)
        kinds += [(ANSWER if learnt else MUTED) if is_answer else PROMPT] * length
    return _encoded(tokens, kinds, "" if has_end else NO_END_MARK)


def _encoded(tokens: list[int], kinds: list[int], why_endless: str) -> Encoded:
    is_answer, is_muted = ([kind == which for kind in kinds] for which in (ANSWER, MUTED))
    return Encoded(tokens, is_answer, is_muted, why_endless if ANSWER in kinds else "")


def _has_end(text: str, content: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether something stands after the content of an answer, or is a special token at its end."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {*tokenizer.all_special_tokens}
    text, content = text.rstrip(), content.strip()
    return text.endswith(tuple(special)) or not content or not text.endswith(content)


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict], where: str, **options: object) -> object:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template raises errors of its own, such as of roles that do not alternate
        raise ValueError(f"{where}: the chat template does not take these messages ({error})") from error


def _pieces(sample: Sample, tokenizer: PreTrainedTokenizerBase, where: str) -> list[tuple[str, int]]:
    """The text of a conversation, cut before and after each answer; with an answer goes what the template ends it with.

    Found by what the template writes for the messages until there.
    """

    def written(messages: list[dict], **options: object) -> str:
        return _apply_template(tokenizer, messages, where, tokenize=False, tools=sample.tools, **options)

    whole, pieces, done = written(sample.messages), [], 0
    for number, message in enumerate(sample.messages):
        if message["role"] == "assistant":
            until = written(sample.messages[: number + 1])
            begin = _begin(written, sample.messages[:number], message, until, whole)
            end = len(commonprefix([until, whole]))
            if begin is None or end < begin or until[end:].strip():  # white space may depend on what follows
                raise ValueError(
                    f"{where}: the chat template writes an earlier message in another way once others follow, so "
                    "that answers cannot be told apart: put {% generation %} around them in the template, or "
                    "write lines with prompt and completion"
                )
            kind = ANSWER if sample.is_learnt[number] else MUTED
            pieces += [(whole[done:begin], PROMPT), (whole[begin:end], kind)]
            done = end
    return [*pieces, (whole[done:], PROMPT)]


def _begin(written: object, earlier: list[dict], message: dict, until: str, whole: str) -> int | None:
    """Where the text of an answer begins in the whole; None where the whole does not begin as what is until there.

    After what the template writes to ask for an answer. It may write that in another way in front of an answer, as with
    other indentation, or not at all in front of the first message, where it writes a system prompt of its own. Then it
    is where two answers begin to differ.
    """
    try:
        asked = written(earlier, add_generation_prompt=True) if earlier else None
    except ValueError:  # some templates want messages of the user
        asked = None
    if asked is not None and whole.startswith(asked):
        return len(asked)
    first = message["content"].lstrip()[:1]
    other = written([*earlier, {"role": "assistant", "content": "b" if first == "a" else "a"}])
    before = commonprefix([until, other])
    return len(before) if whole.startswith(before) else None


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, pieces: list[tuple[str, int]], begins: bool
) -> tuple[list[int], list[int]]:
    """Tokens of pieces of one text, of which none belongs to two pieces, and the kind of each.

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
    return tokens, [kind for part, (_, kind) in zip(parts, pieces, strict=True) for _ in part]


def _num_added_after(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens the tokenizer puts after any text, such as an end."""
    plain, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    ends = (len(whole) - number for number in range(len(whole)))
    return next((len(whole) - end for end in ends if whole[:end][-len(plain) :] == plain), 0)
