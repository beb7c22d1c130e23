"""A task in a file of one's own: the example of the documentation, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from srlora_dist.config.run import ModelOptions, RunConfig, TaskOptions
from srlora_dist.tasks.registry import check_task, load_task

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "my_task.py"


@pytest.fixture
def bert(tmp_path: Path) -> str:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "it", "so", "?", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer.from_pretrained(tmp_path, model_max_length=30).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=30, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path)
    return str(tmp_path)


def run_config(file: Path, model: str, data_dir: Path | None = None) -> RunConfig:
    options = TaskOptions(name=str(file), data_dir=str(data_dir), max_length=16)
    return RunConfig(model=ModelOptions(name_or_path=model), task=options)


def test_the_example_is_the_one_of_the_documentation_and_short() -> None:
    code = EXAMPLE.read_text()
    assert f"```python\n{code}```" in (ROOT / "docs" / "tasks.md").read_text()
    assert len(code.splitlines()) <= 30


def test_the_example_is_a_task(bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    config = run_config(EXAMPLE, bert, data)
    assert config.output_dir == "runs/my_task-srlora"
    with pytest.raises(ValueError, match="which has no train.tsv"):
        check_task(config)
    for name in ("train.tsv", "test.tsv"):
        (data / name).write_text("is it so ?\tasks\nit is so .\ttells\n")
    task = load_task(config)
    batch = task.collate([task.train[0], task.train[1]])
    assert batch["labels"].tolist() == [1, 0]
    assert torch.isfinite(task.model(**batch).loss)
    assert task.main_metric == "accuracy"
    monkeypatch.chdir(data)
    config.task.data_dir = None
    assert len(load_task(config).train) == 2, "without a folder those here"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        ("def load(config", r"cannot be run \(SyntaxError"),
        ("import not_installed_anywhere", r"cannot be run \(ModuleNotFoundError: No module named 'not_installed"),
        ("def check(config): pass", r"defines no load\(config\)"),
        ("def load(config): return 3", r"whose load\(config\) gives int: let it return a Task"),
    ],
)
def test_a_file_that_is_no_task_is_refused(content: str | None, message: str, bert: str, tmp_path: Path) -> None:
    file = tmp_path / "odd_task.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=f"odd_task.py.*{message}"):
        load_task(run_config(file, bert))
