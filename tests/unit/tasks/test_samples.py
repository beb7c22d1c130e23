"""Instructions in every common layout, and which of their tokens are learnt."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from srlora_dist.tasks.labels import IGNORED
from srlora_dist.tasks.registry import load_task
from srlora_dist.tasks.task import Task
from tests.unit.tasks.test_instruct import CHAT, MARKED, PLAIN, run_config, write_jsonl, write_model

DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|system|>one<|end|>\n{% endif %}"
INDENTED = """{% for m in messages %}
    {% if m.role == 'assistant' %}
        <|assistant|>
        {{ m.content }}<|end|>
    {% else %}
        <|user|>{{ m.content }}<|end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
    <|assistant|>
{% endif %}"""
ENDLESS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
ENDLESS_MARKED = MARKED.replace("<|end|>\n{% endgeneration %}", "{% endgeneration %}<|end|>\n")
WITH_CALLS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls %}"
    "[{{ c.function.name }} {{ c.function.arguments.more }}]{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ANSWERS = ["two<|end|>\n", "three it is<|end|>\n"]
FROM = {"system": "system", "user": "human", "assistant": "gpt"}
SHARE_GPT = [{"from": FROM[turn["role"]], "value": turn["content"]} for turn in CHAT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_model(folder, positions=128)
    return folder


def load(folder: Path, sample: object, template: str | None = PLAIN, **task: object) -> Task:
    """The task of one sample; the tokenizer in the folder gets the template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    options = {"max_length": 100} | task
    return load_task(run_config(str(folder), write_jsonl(folder / "data", [sample]), **options))


def learnt(task: Task) -> list[str]:
    """The text of each run of tokens of the first row that is learnt."""
    runs: list[list[int]] = []
    labels = task.train[0]["labels"]
    for k, label in enumerate(labels):
        if label != IGNORED:
            runs += [[]] if labels[k - 1] == IGNORED else []
            runs[-1].append(label)
    return [task.tokenizer.decode(run) for run in runs]


def text(task: Task) -> str:
    return task.tokenizer.decode(task.train[0]["input_ids"])


# --- layouts

SAME = {
    "ShareGPT": {"conversations": SHARE_GPT},
    "ShareGPT with a system prompt beside": {"system": "be short", "conversations": SHARE_GPT[1:]},
    "conversations with roles": {"conversations": CHAT},
    "one conversation": {"conversation": CHAT, "text": None},
    "messages as of ShareGPT": {"messages": SHARE_GPT},
    "parts of a text": {"messages": [*CHAT[:4], {**CHAT[4], "content": [{"type": "text", "text": "three it is"}]}]},
    "nulls of an export": {"prompt": None, "messages": [{**turn, "name": None, "tool_calls": None} for turn in CHAT]},
    "Alpaca with a history": {
        "system": "be short",
        "instruction": "and one?",
        "input": "",
        "output": "three it is",
        "history": [["one and one?", "two"]],
    },
}


@pytest.mark.parametrize("layout", SAME)
def test_common_layouts_are_the_same_conversation(layout: str, folder: Path) -> None:
    task = load(folder, SAME[layout])
    assert text(task) == text(load(folder, {"messages": CHAT}))
    assert learnt(task) == ANSWERS


@pytest.mark.parametrize("names", [("instruction", "input", "output"), ("instruction", "context", "response")])
def test_alpaca_goes_through_the_chat_template_or_is_alpacas_own_text(names: tuple[str, ...], folder: Path) -> None:
    sample = dict(zip(names, ("add", "one and one", "two"), strict=True))
    task = load(folder, sample)
    assert (text(task), learnt(task)) == ("<|user|>add\none and one<|end|>\n<|assistant|>two<|end|>\n", ANSWERS[:1])
    with pytest.raises(ValueError, match="no sample with a completion within task.max_length 100"):
        load(folder, sample, template=None)  # the preamble alone is longer
    write_model(folder.parent / "long", positions=512)
    for more, named in (("one and one", "paired with an input"), (None, "")):
        task = load(folder.parent / "long", {**sample, names[1]: more}, template=None, max_length=512)
        whole = text(task)
        assert whole.startswith("Below is an instruction that describes a task")
        assert whole.endswith("### Response:\ntwo</s>")
        assert ("### Input:\none and one" in whole, bool(named) and named in whole) == (bool(more), bool(more))
        assert learnt(task) == ["two</s>"]


def test_a_file_can_be_one_list(folder: Path) -> None:
    load(folder, {"messages": CHAT})
    for name in ("train.jsonl", "train.json"):
        for split in ("train", "validation"):
            (folder / "data" / f"{split}.jsonl").unlink(missing_ok=True)
            place = folder / "data" / name.replace("train", split)
            place.write_text(json.dumps([{"conversations": SHARE_GPT}, {"messages": CHAT}], indent=1))
        assert len(load_task(run_config(str(folder), folder / "data")).train) == 2
    place.write_text(json.dumps([{"messages": CHAT}, {"text": "one"}]))
    with pytest.raises(
        ValueError, match="validation.json, sample 2 is in no layout that is known; it has the keys text"
    ):
        load_task(run_config(str(folder), folder / "data"))
    for split in ("train", "validation"):
        (folder / "data" / f"{split}.json").unlink()


CALL = {"id": "1", "type": "function", "function": {"name": "that", "arguments": '{"more": "three"}'}}
CALLS = {
    "OpenAI": {"role": "assistant", "content": None, "tool_calls": [CALL]},
    "OpenAI's first": {"role": "assistant", "content": None, "function_call": CALL["function"]},
    "Hugging Face": {"role": "assistant", "tool_calls": [{"name": "that", "arguments": {"more": "three"}}]},
    "LLaMA-Factory": {"from": "function_call", "value": '{"name": "that", "arguments": {"more": "three"}}'},
}


@pytest.mark.parametrize("kind", CALLS)
def test_calls_of_tools_are_learnt_and_what_they_give_is_not(kind: str, folder: Path) -> None:
    role = {"OpenAI": "tool", "OpenAI's first": "function", "LLaMA-Factory": "observation"}.get(kind, "tool")
    messages = [CHAT[1], CALLS[kind], {"role": role, "content": "it is"}, CHAT[2]]
    task = load(folder, {"messages": messages, "tools": "[]"}, template=WITH_CALLS)
    assert learnt(task) == ["[that three]<|end|>\n", "two<|end|>\n"]
    assert "<|tool|>it is<|end|>" in text(task)


BAD = {
    "a weight between": ({"messages": [{**CHAT[2], "weight": 0.5}]}, "message 1 has weight 0.5: choose 0"),
    "a weight of the user": (
        {"messages": [{**CHAT[1], "train": True}, CHAT[2]]},
        "message 1 has train True and the role",
    ),
    "a call without a name": (
        {"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]},
        "1 calls a tool in a way",
    ),
    "arguments that are no JSON": (
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "a", "arguments": "{"}]}]},
        "message 1 calls a tool in a way that is not known",
    ),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1 has no content that is"),
    "no answer": ({"conversations": SHARE_GPT[:2]}, "has no message of the role assistant"),
    "a history that is none": (
        {"instruction": "a", "output": "b", "history": ["c"]},
        '"history" that is no list of pairs',
    ),
    "tools that are no JSON": ({"messages": CHAT, "tools": "["}, '"tools" that are no JSON'),
    "tools that are no list": ({"messages": CHAT, "tools": {"a": 1}}, '"tools" that are no list'),
    "a number": (3, "is in no layout that is known; it has no object with keys: 3"),
    "plain text": ({"text": "one"}, "it has the keys text. Write one of .*ShareGPT.*Alpaca"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_read_is_named_with_its_line(what: str, folder: Path) -> None:
    sample, message = BAD[what]
    with pytest.raises(ValueError, match=rf"train.jsonl, line 1.*{message}"):
        load(folder, sample)


# --- what is learnt


@pytest.mark.parametrize("only", [True, False])
@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}])
def test_an_answer_of_weight_0_is_not_learnt(mark: dict, template: str, only: bool, folder: Path) -> None:
    messages = [*CHAT[:2], {**CHAT[2], **mark}, CHAT[3], {**CHAT[4], "weight": 1}]
    task = load(folder, {"messages": messages}, template=template, completion_only=only)
    plain = load(folder, {"messages": CHAT}, template=template, completion_only=only)
    assert text(task) == text(plain)
    if only:
        assert learnt(task) == ANSWERS[1:]
    else:
        before, after = learnt(task)
        assert (before[-13:], after[:8]) == ("<|assistant|>", "<|user|>")
        assert after.endswith(ANSWERS[1])


def test_a_sample_without_an_answer_to_learn_is_left_out(folder: Path) -> None:
    with pytest.raises(ValueError, match="has no sample with a completion .* to learn"):
        load(folder, {"messages": [*CHAT[:2], {**CHAT[2], "weight": 0}]})


def test_of_a_prompt_and_a_completion_in_messages_the_completion_is_learnt(folder: Path) -> None:
    task = load(folder, {"prompt": CHAT[:4], "completion": CHAT[4:]})
    assert learnt(task) == ANSWERS[1:]
    assert text(task) == text(load(folder, {"messages": CHAT}))


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_with_the_answer_first_neither_a_system_prompt_nor_the_header_is_learnt(template: str, folder: Path) -> None:
    task = load(folder, {"messages": [CHAT[2], CHAT[1], CHAT[4]]}, template=DEFAULT_SYSTEM + template)
    assert text(task).startswith("<|system|>one<|end|>\n<|assistant|>two")
    assert learnt(task) == ANSWERS


def test_a_call_of_a_tool_first_is_learnt_whole(folder: Path) -> None:
    task = load(folder, {"messages": [CALLS["OpenAI"]]}, template=DEFAULT_SYSTEM + WITH_CALLS)
    assert learnt(task) == ["[that three]<|end|>\n"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_call_that_the_template_leaves_out_is_no_empty_answer(template: str, folder: Path) -> None:
    with pytest.raises(ValueError, match="line 1 calls the tool that, which the chat template does not write"):
        load(folder, {"messages": [{"role": "user", "content": "w?"}, CALLS["OpenAI"]]}, template=template)


@pytest.mark.parametrize("turns", [slice(1, 3), slice(1, 5), slice(2, 5)])
def test_templates_with_indentation_work(turns: slice, folder: Path) -> None:
    task = load(folder, {"messages": CHAT[turns]}, template=INDENTED)
    answers = [answer for turn, answer in zip(CHAT[2::2], ANSWERS, strict=True) if turn in CHAT[turns]]
    assert [answer.strip() for answer in learnt(task)] == [answer.strip() for answer in answers]


# --- ends


@pytest.mark.parametrize("template", [ENDLESS, ENDLESS_MARKED])
def test_a_template_that_ends_no_answer_is_warned_of(template: str, folder: Path) -> None:
    with pytest.warns(UserWarning, match="1 of 1 samples teach no end of an answer, because the chat template"):
        load(folder, {"messages": CHAT}, template=template)


def test_a_tokenizer_without_an_end_is_warned_of(tmp_path: Path) -> None:
    write_model(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="teach no end of an answer, because the tokenizer has no eos token"):
        load(tmp_path, {"prompt": "one", "completion": " two"}, max_length=64)


@pytest.mark.parametrize("template", [PLAIN, MARKED, INDENTED, WITH_CALLS])
def test_an_end_that_is_taught_is_not_warned_of(template: str, folder: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(folder, {"messages": CHAT[1:]}, template=template)
        load(folder, {"prompt": "one", "completion": " two"})
    assert [str(each.message) for each in caught if issubclass(each.category, UserWarning)] == []


def test_samples_that_are_cut_are_counted(folder: Path) -> None:
    with pytest.warns(UserWarning, match="1 of 1 samples are longer than task.max_length 20 tokens, and are cut"):
        load(folder, {"messages": CHAT[1:]}, max_length=20)
