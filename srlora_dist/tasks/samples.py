"""Reads a sample of instructions in any of the common layouts: as a conversation, or a prompt and its completion."""

from __future__ import annotations

import json
from typing import NamedTuple

ROLES = ("system", "developer", "user", "assistant", "tool")
ALIASES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("function", "function_response", "observation"), "tool"),
}
"""Other names of the roles: those of ShareGPT, LLaMA-Factory, Gemini, and OpenAI's first functions."""
CONVERSATIONS = ("messages", "conversations", "conversation")
MARKS = ("weight", "train", "loss")
"""What a message can have to say whether it is learnt: as OpenAI, Axolotl and ms-swift call it."""
ALPACA = (("instruction", "input", "output"), ("instruction", "context", "response"))
"""The names of a task, of what it is about, and of the answer: Alpaca's and Dolly's."""
LAYOUTS = (
    '{"messages": [{"role": ..., "content": ...}]}, {"conversations": [{"from": ..., "value": ...}]} (ShareGPT), '
    '{"prompt": ..., "completion": ...} or {"instruction": ..., "input": ..., "output": ...} (Alpaca)'
)
PREAMBLE = (
    "Below is an instruction that describes a task{also}. Write a response that appropriately completes the request."
)
WITH_INPUT = ", paired with an input that provides further context"


class Sample(NamedTuple):
    """What a line holds.

    Args:
        messages: A conversation whose roles are those of ``ROLES``; None where the line is a prompt and its completion.
        is_learnt: For each message, whether it is an answer that is to be learnt.
        tools: That the assistant may call.
        prompt: Text before the completion; an Alpaca sample has it too, for tokenizers without a chat template.
        completion: Text to learn.
    """

    messages: list[dict[str, object]] | None = None
    is_learnt: list[bool] = []
    tools: list[object] | None = None
    prompt: str | None = None
    completion: str | None = None


def read_sample(line: object, where: str) -> Sample:
    """Find out the layout of a sample, and read it.

    Args:
        line: As JSON has it. What is null counts as left out.
        where: File and line, for messages.

    Raises:
        ValueError: The layout is not known, or something in it is not as it should be; the message names both.
    """
    fields = {key: value for key, value in line.items() if value is not None} if isinstance(line, dict) else {}
    for name in CONVERSATIONS:
        if isinstance(fields.get(name), list):
            return _conversation(fields, fields[name], where)
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Sample(prompt=prompt, completion=completion)
    if isinstance(prompt, list) and isinstance(completion, list):  # what is before the completion is not learnt
        asked = [{**turn, "weight": 0} if isinstance(turn, dict) else turn for turn in prompt]
        return _conversation(fields, [*asked, *completion], where)
    for names in ALPACA:
        task, more, answer = (fields.get(name, "") for name in names)
        if {names[0], names[2]} <= fields.keys() and all(isinstance(text, str) for text in (task, more, answer)):
            return _alpaca(fields, task, more, answer, where)
    keys = f"the keys {', '.join(fields)}" if fields else f"no object with keys: {json.dumps(line)[:80]}"
    raise ValueError(f"{where} is in no layout that is known; it has {keys}. Write one of {LAYOUTS}")


def _conversation(fields: dict[str, object], turns: list[object], where: str) -> Sample:
    system = fields.get("system") or fields.get("system_prompt")
    read = [_read_message(turn, f"{where}: message {number}") for number, turn in enumerate(turns, start=1)]
    if isinstance(system, str) and not any(message["role"] == "system" for message, _ in read):
        read.insert(0, ({"role": "system", "content": system}, False))
    messages, is_learnt = [message for message, _ in read], [learnt for _, learnt in read]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where} has no message of the role assistant, so that there is nothing to learn")
    return Sample(messages, is_learnt, _read_tools(fields, where))


def _alpaca(fields: dict[str, object], task: str, more: str, answer: str, where: str) -> Sample:
    """Read Alpaca's layout as a conversation; without earlier turns also as the text that Alpaca was trained on."""
    history, system = fields.get("history", []), fields.get("system", "")
    if not isinstance(system, str):
        raise ValueError(f'{where} has a "system" that is no text')
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise ValueError(f'{where} has a "history" that is no list of pairs: write [[question, answer], ...]')
    asked = [(role, text) for turn in history for role, text in zip(("user", "assistant"), turn, strict=True)]
    asked += [("user", f"{task}\n{more}" if more else task), ("assistant", answer)]
    turns = [{"role": role, "content": text} for role, text in asked]
    sample = _conversation({"system": system}, turns, where)
    if history:
        return sample
    parts = [system or PREAMBLE.format(also=WITH_INPUT if more else ""), f"### Instruction:\n{task}"]
    parts += [*([f"### Input:\n{more}"] if more else []), "### Response:\n"]
    return sample._replace(prompt="\n\n".join(parts), completion=answer)


def _read_message(turn: object, where: str) -> tuple[dict[str, object], bool]:
    """A message with its role and its text, and whether it is to be learnt."""
    given = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
    named = given.pop("role", None) or given.get("from", turn if not given else None)
    role = ALIASES.get(named, named) if isinstance(named, str) else named
    if role not in ROLES:
        raise ValueError(f"{where} has the role {named!r}: choose one of {', '.join((*ROLES, *ALIASES))}")
    content = given.pop("content", given.get("value"))
    calls = given.pop("tool_calls", None)
    if "function_call" in given:
        calls = [given.pop("function_call")]
    elif named == "function_call":
        content, calls = None, _read_calls_in_text(content, where)
    message = {key: value for key, value in given.items() if key not in (*MARKS, "from", "value")}
    message |= {"role": role, "content": _read_text(content, bool(calls), where)}
    if calls:
        message["tool_calls"] = _read_calls(calls, where)
    return message, _is_learnt(given, role, where)


def _is_learnt(given: dict[str, object], role: str, where: str) -> bool:
    for name in MARKS:
        value = given.get(name)
        if name in given and value not in (0, 1):
            raise ValueError(f"{where} has {name} {value!r}: choose 0, which leaves an answer out, or 1")
        if value and role != "assistant":
            raise ValueError(f"{where} has {name} {value!r} and the role {role}: only answers are learnt, leave it out")
    return role == "assistant" and all(given.get(name, 1) for name in MARKS)


def _read_text(content: object, calls_tools: bool, where: str) -> str:
    if isinstance(content, list):  # OpenAI's parts
        parts = [part.get("text", part.get("refusal")) if isinstance(part, dict) else None for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
        calls_tools = False
    if content is None and calls_tools:
        return ""
    if not isinstance(content, str):
        raise ValueError(f"{where} has no content that is text")
    return content


def _read_calls_in_text(content: object, where: str) -> list[object]:
    try:
        calls = json.loads(content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} has a function_call that is no JSON: {str(content)[:80]}") from error
    return calls if isinstance(calls, list) else [calls]


def _read_calls(calls: object, where: str) -> list[dict[str, object]]:
    """Calls of tools as chat templates want them: arguments are an object, and not the text of one as with OpenAI."""
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else {}
        arguments = function.get("arguments", {}) if isinstance(function, dict) else None
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                arguments = None
        if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f'{where} calls a tool in a way that is not known: write {{"type": "function", "function": '
                f'{{"name": ..., "arguments": {{...}}}}}}, and not {json.dumps(call)[:80]}'
            )
        kept = {key: value for key, value in call.items() if key == "id"}
        read.append({**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return read


def _read_tools(fields: dict[str, object], where: str) -> list[object] | None:
    tools = fields.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "[]")
        except ValueError as error:
            raise ValueError(f'{where} has "tools" that are no JSON ({error}): write a list') from error
    if tools is None and isinstance(fields.get("functions"), list):
        tools = [{"type": "function", "function": function} for function in fields["functions"]]
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f'{where} has "tools" that are no list: write [{{"type": "function", "function": ...}}]')
    return tools or None
