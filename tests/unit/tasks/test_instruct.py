"""Instructions: which tokens are learnt, what is refused, and that packing changes no loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from srlora_dist.config.run import ModelOptions, RunConfig, TaskOptions
from srlora_dist.tasks.answers import Encoded, encode_sample
from srlora_dist.tasks.causal_lm import pack, require_decoder, require_packable, token_task
from srlora_dist.tasks.labels import IGNORED
from srlora_dist.tasks.registry import check_task, load_task
from srlora_dist.training.data_order import SampleOrder, TokenMean

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>\n"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>{% if loop.last %}(thinks) {% endif %}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}" + PLAIN
CHAT = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "one and one?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "and one?"},
    {"role": "assistant", "content": "three it is"},
]
SAMPLES = [
    {"prompt": "one and one is", "completion": " two"},
    {"prompt": "two and one is", "completion": " three, and that is more than two"},
    {"prompt": "Q: three? A:", "completion": " it is"},
    {"messages": CHAT},
    {"messages": CHAT[1:3]},
]


def make_tokenizer(template: str | None = PLAIN, ends: bool = False, **options: object) -> PreTrainedTokenizerFast:
    """Byte-level pairs that were learnt on a few words, so that tokens join letters; perhaps with both ends added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["one two three and it is more than that abab"] * 9, trainer)
    if ends:
        both = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=both)
    names = {"pad_token": "<pad>", "eos_token": "</s>", **options}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)
    made.chat_template = template
    return made


def configuration(kind: str, vocabulary: int, **more: object) -> transformers.PretrainedConfig:
    if kind == "gpt2":
        return transformers.GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=64, **more)
    kinds = {
        "lfm2": transformers.Lfm2Config,
        "llama": transformers.LlamaConfig,
        "qwen3": transformers.Qwen3Config,
        "mistral": transformers.MistralConfig,
    }
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0}
    return kinds[kind](**{"vocab_size": vocabulary, **sizes, **more})


def write_model(folder: Path, kind: str = "llama", template: str | None = PLAIN, positions: int = 64) -> str:
    tokenizer = make_tokenizer(template)
    tokenizer.model_max_length = positions
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    more = {} if positions == 64 else {"max_position_embeddings": positions}
    model = transformers.AutoModelForCausalLM.from_config(configuration(kind, len(tokenizer), **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)  # so that every token before a token matters to it
    model.save_pretrained(folder)
    return str(folder)


def write_jsonl(folder: Path, train: list[object], validation: list[object] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for split, rows in (("train", train), ("validation", train if validation is None else validation)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("llama"))


def run_config(model: str, data_dir: Path, **task: object) -> RunConfig:
    options = TaskOptions(**{"name": "instruct", "max_length": 64} | task, data_dir=str(data_dir))
    return RunConfig(model=ModelOptions(name_or_path=model), task=options)


def learnt(encoded: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each run of tokens that is learnt."""
    runs, before = [], False
    for token, is_answer in zip(encoded.tokens, encoded.is_answer, strict=True):
        if is_answer and not before:
            runs.append([])
        if is_answer:
            runs[-1].append(token)
        before = is_answer
    return [tokenizer.decode(run) for run in runs]


# --- which tokens are learnt


def test_of_a_prompt_and_its_completion_the_completion_is_learnt() -> None:
    tokenizer = make_tokenizer()
    encoded = encode_sample(SAMPLES[1], tokenizer, "here")
    assert learnt(encoded, tokenizer) == [" three, and that is more than two</s>"]
    assert tokenizer.decode(encoded.tokens) == SAMPLES[1]["prompt"] + SAMPLES[1]["completion"] + "</s>"


def test_an_end_that_is_written_out_stays_where_it_is() -> None:
    """It is the end that a tokenizer puts after any text which is taken away, and a sample has one of its own."""
    for adds_ends in (False, True):
        tokenizer = make_tokenizer(ends=adds_ends)
        encoded = encode_sample({"prompt": "one</s>", "completion": " two</s>"}, tokenizer, "here")
        assert learnt(encoded, tokenizer) == [" two</s>"]
        assert tokenizer.decode(encoded.tokens) == "<s>one</s> two</s>" if adds_ends else "one</s> two</s>"


def test_no_token_lies_across_the_boundary() -> None:
    tokenizer = make_tokenizer()
    sample = {"prompt": " th", "completion": "ree"}
    assert len(tokenizer(" three")["input_ids"]) == 1, "the whole text would be one token"
    encoded = encode_sample(sample, tokenizer, "here")
    assert learnt(encoded, tokenizer) == ["ree</s>"]
    assert tokenizer.decode(encoded.tokens) == " three</s>"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_of_a_conversation_the_answers_are_learnt_with_what_ends_them(template: str) -> None:
    tokenizer = make_tokenizer(template)
    encoded = encode_sample({"messages": CHAT}, tokenizer, "here")
    assert learnt(encoded, tokenizer) == ["two<|end|>\n", "three it is<|end|>\n"]
    assert encoded.tokens == tokenizer.apply_chat_template(CHAT, return_dict=False)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_tools_of_a_conversation_come_into_its_prompt(template: str) -> None:
    tokenizer = make_tokenizer("{% if tools %}<|system|>{{ tools[0].function.name }}<|end|>\n{% endif %}" + template)
    tools = [{"type": "function", "function": {"name": "that_is_more", "parameters": {}}}]
    encoded = encode_sample({"messages": CHAT[1:3], "tools": tools}, tokenizer, "here")
    assert learnt(encoded, tokenizer) == ["two<|end|>\n"]
    assert tokenizer.decode(encoded.tokens).startswith("<|system|>that_is_more<|end|>")


def test_labels_are_the_tokens_that_are_learnt(llama: str, tmp_path: Path) -> None:
    folder = write_jsonl(tmp_path / "data", SAMPLES)
    for only in (True, False):
        task = load_task(run_config(llama, folder, completion_only=only))
        assert len(task.train) == len(task.eval) == 5
        for sample, row in zip(SAMPLES, task.train, strict=True):
            tokens, is_answer, *_ = encode_sample(sample, task.tokenizer, "here")
            assert row["input_ids"] == tokens
            mask = [False, *(answer or not only for answer in is_answer[1:])]
            assert row["labels"] == [t if m else IGNORED for t, m in zip(tokens, mask, strict=True)]
        assert task.num_targets == [sum(label != IGNORED for label in row["labels"]) for row in task.train]


def test_the_loss_of_a_batch_is_the_mean_over_what_is_learnt(llama: str, tmp_path: Path) -> None:
    task = load_task(run_config(llama, write_jsonl(tmp_path / "data", SAMPLES)))
    batch = task.collate(list(task.eval))
    with torch.no_grad():
        output = task.model.eval()(**batch)
    sums, counts = task.answers(output, batch)
    assert counts.tolist() == task.num_targets
    assert task.loss(sums, counts).item() == pytest.approx(output.loss.item(), rel=1e-6)
    for row, total in zip(task.eval, sums, strict=True):  # one at a time, without padding
        tokens, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            alone = task.model(input_ids=tokens, labels=labels).loss
        assert total.item() == pytest.approx(alone.item() * (labels != IGNORED).sum().item(), rel=1e-5)


# --- what is cut, left out or refused


def test_a_sample_whose_completion_is_cut_away_is_left_out_with_a_warning(llama: str, tmp_path: Path) -> None:
    folder = write_jsonl(tmp_path / "data", [*SAMPLES, {"prompt": "one and " * 20, "completion": " two"}])
    with pytest.warns(UserWarning, match="train.jsonl: 1 of 6 samples have no completion within task.max_length 30"):
        task = load_task(run_config(llama, folder, max_length=30))
    assert len(task.train) == 5
    assert max(map(len, task.train["input_ids"])) == 30
    write_jsonl(folder, [{"prompt": "one and " * 20, "completion": " two"}])
    with pytest.raises(ValueError, match="train.jsonl has no sample with a completion within task.max_length 30"):
        load_task(run_config(llama, folder, max_length=30))


BAD_LINES = {
    '{"prompt": "a"': "line 3 is not JSON",
    '["prompt", "completion"]': "line 3 is in no layout that is known; it has no object with keys",
    '{"prompt": "a", "completion": 3}': "line 3 is in no layout .* the keys prompt, completion. Write .*messages",
    '{"prompt": "a", "chosen": "b"}': "line 3 is in no layout .* the keys prompt, chosen. Write .*ShareGPT.*Alpaca",
    '{"messages": [{"role": "bot", "content": "a"}]}': "line 3: message 1 has the role 'bot': choose one of system",
    '{"messages": [{"role": "user", "content": ["a"]}]}': "line 3: message 1 has no content that is text",
    '{"prompt": "a \\ud83d", "completion": "b"}': "line 3 has half of a character",
    '{"messages": [{"role": "user", "content": "a"}]}': "line 3 has no message of the role assistant",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_that_is_not_as_it_should_be_is_named(line: str, llama: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"train.jsonl, {BAD_LINES[line]}"):
        load_task(run_config(llama, write_jsonl(tmp_path / "data", [SAMPLES[0], "", line])))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template: choose a model made for chats, put a chat_template.jinja"),
        (STRICT, "the chat template does not take these messages .*the user begins"),
        (FORGETFUL, "writes an earlier message in another way once others follow"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"data.jsonl, line 7.*{message}"):
        encode_sample({"messages": CHAT}, make_tokenizer(template), "data.jsonl, line 7")


@pytest.mark.parametrize(
    "settings",
    [
        transformers.BartConfig(
            vocab_size=9, d_model=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8, encoder_layers=1
        ),
        transformers.XLNetConfig(vocab_size=9, d_model=8, n_layer=1, n_head=2, d_inner=8),
    ],
    ids=lambda settings: settings.model_type,
)
def test_a_loss_of_tokens_that_are_seen_is_refused(settings: transformers.PretrainedConfig, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(settings)
    tokens = torch.tensor([[3, 4]])
    first = torch.tensor([[3, IGNORED]])
    assert torch.isfinite(model(input_ids=tokens, labels=first).loss), "a loss of the first token"
    with pytest.raises(ValueError, match="does not shift the labels of its loss to the next token"):
        require_decoder(run_config("any", tmp_path), model)


def test_the_files_are_looked_for_first(llama: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task instruct needs task.data_dir"):
        check_task(RunConfig(model=ModelOptions(name_or_path=llama), task=TaskOptions(name="instruct")))
    write_jsonl(tmp_path / "data", SAMPLES)
    (tmp_path / "data" / "validation.jsonl").unlink()
    with pytest.raises(ValueError, match=r"no file .*validation.jsonl: give a folder with train.jsonl and"):
        check_task(run_config(llama, tmp_path / "data"))


# --- packing


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mistral"])
def test_packed_losses_are_those_of_samples_alone(kind: str, attention: str, tmp_path: Path) -> None:
    model, folder = write_model(tmp_path / kind, kind), write_jsonl(tmp_path / "data", SAMPLES)
    alone, packed = (load_task(run_config(model, folder, packing=packing)) for packing in (False, True))
    assert len(packed.train) < len(alone.train)
    assert sum(packed.num_targets) == sum(alone.num_targets)
    assert (len(packed.eval), packed.eval.column_names) == (5, ["input_ids", "labels"]), "evaluation is not packed"
    losses = {}
    for name, task in (("alone", alone), ("packed", packed)):
        task.model.set_attn_implementation(attention)
        assert task.model.config._attn_implementation == attention
        rows = list(task.train) if name == "packed" else None
        for row in task.train if rows is None else [None]:
            batch = task.collate([row] if rows is None else rows)
            with torch.no_grad():
                logits = task.model.eval()(**batch).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            each = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            losses.setdefault(name, []).extend(each[labels != IGNORED].tolist())
    got, expected = (torch.tensor(sorted(losses[name])) for name in ("packed", "alone"))
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_a_first_token_is_never_learnt_whatever_its_label(packing: bool, llama: str, tmp_path: Path) -> None:
    """As in a task of one's own that takes the tokens for labels."""
    config = run_config(llama, write_jsonl(tmp_path / "data", SAMPLES), completion_only=False)
    task = load_task(config)
    rows = task.train.select_columns("input_ids").map(lambda tokens: {"labels": tokens}, input_columns="input_ids")
    config.task.packing = packing
    own = token_task(config, task.model, task.tokenizer, rows, rows)
    assert sum(own.num_targets) == sum(task.num_targets)
    sums = []
    for each in (task, own):
        batch = each.collate(list(each.train))
        with torch.no_grad():
            loss = each.model.eval()(**batch).loss
        sums.append(loss.item() * sum(each.num_targets))
    assert sums[1] == pytest.approx(sums[0], rel=1e-5)


def test_packing_fills_rows_and_cuts_nothing(llama: str, tmp_path: Path) -> None:
    task = load_task(run_config(llama, write_jsonl(tmp_path / "data", SAMPLES * 4)))
    rows = pack(task.train, 64)
    assert sorted(token for row in rows["input_ids"] for token in row) == sorted(
        token for row in task.train["input_ids"] for token in row
    )
    lengths = [len(row) for row in rows["input_ids"]]
    assert max(lengths) <= 64
    assert len(rows) <= -(-sum(lengths) // 64) + 1
    for row in rows:
        starts = [k for k, position in enumerate(row["position_ids"]) if position == 0]
        assert all(row["labels"][k] == IGNORED for k in starts), "nothing before a sample predicts its first token"


def test_plain_text_can_be_packed(llama: str, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text("one and one is two\nthree it is\n" * 5)
    task = load_task(run_config(llama, tmp_path, name="lm", packing=True))
    assert len(task.train) < 10
    assert task.num_targets == [
        len(row["input_ids"]) - sum(position == 0 for position in row["position_ids"]) for row in task.train
    ]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (transformers.BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2), "it takes no position_ids"),
        (transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1), "it keeps a state"),
        (configuration("lfm2", 9, layer_types=["conv", "full_attention"]), "it has layers of the kind conv"),
        (configuration("mistral", 9, sliding_window=63), "its window of 63 tokens is shorter than task.max_length 64"),
    ],
)
def test_a_model_in_which_packed_samples_would_meet_is_refused(settings: object, reason: str, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(settings)
    with pytest.raises(ValueError, match=f"task.packing does not work with a model of type .*: {reason}"):
        require_packable(run_config("any", tmp_path, packing=True), model)


# --- the mean over the tokens of a step


@pytest.mark.parametrize(("num_processes", "accumulation_steps"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_each_token_of_a_step_weighs_the_same(num_processes: int, accumulation_steps: int) -> None:
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 9, (23,), generator=draw).tolist()
    losses = [torch.rand(count, generator=draw) for count in counts]  # of each token of each sample
    order = [int(k) for k in SampleOrder(23, 8, 5, seed=0)]
    size = 8 // num_processes // accumulation_steps
    means = [
        TokenMean(counts, SampleOrder(23, 8, 5, seed=0, num_done=2), 8, accumulation_steps, num_processes)
        for _ in range(num_processes)
    ]
    for step in (2, 3, 4):
        chunk = order[8 * step : 8 * step + 8]
        got = 0.0
        for k, start in enumerate(range(0, 8, size)):
            own = chunk[start : start + size]
            labels = torch.full((size, 9), IGNORED)
            for row, sample in enumerate(own):
                labels[row, 1 : 1 + counts[sample]] = 1
            loss = torch.cat([losses[sample] for sample in own]).mean()
            got += means[k % num_processes].weigh(loss, {"labels": labels}).item() / num_processes / accumulation_steps
        assert got == pytest.approx(torch.cat([losses[sample] for sample in chunk]).mean().item(), rel=1e-5)
