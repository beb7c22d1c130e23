"""Labels that do not belong are named before anything is trained."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch

from srlora_dist.config.run import RunConfig
from srlora_dist.errors import RunStoppedError
from srlora_dist.tasks.causal_lm import token_task
from srlora_dist.tasks.metrics import Scorer
from srlora_dist.tasks.registry import load_task
from srlora_dist.tasks.text import text_task
from srlora_dist.training.evaluation import Judged, _doubt
from srlora_dist.training.loop_state import Progress
from srlora_dist.training.outcome import doubts, is_better, require_a_best, require_a_step, require_finite_start
from tests.unit.tasks.test_custom import bert, run_config  # noqa: F401 (a fixture)

GOOD = {"text": ["is it so ?", "it is so .", "so ."], "labels": [1, 0, 1]}
BAD = {
    "too high": ([1, 0, 2], 2, "row 2: the label is 2: give a class index, a whole number from 0 to 1"),
    "negative": ([1, -1, 0], 2, "row 1: the label is -1: give a class index"),
    "ignored": ([1, -100, 0], 2, "row 1: the label is -100"),
    "floats": ([1.0, 0.0, 1.0], 2, "row 0: the label is 1.0, a float: give a class index.*num_labels=1"),
    "texts": (["1", "0", "1"], 2, "row 0: the label is '1', a str"),
    "booleans": ([1, True, 0], 2, "row 1: the label is True, a bool"),
    "nothing": ([1, None, 0], 2, "row 1: the label is None"),
    "numpy's booleans": (list(np.array([True, False, True])), 2, "row 0: the label is True, a bool"),
    "NaN": ([0.5, float("nan"), 1.0], 1, "row 1: the label is nan: leave that row out"),
    "infinite": ([0.5, 1.0, float("-inf")], 1, "row 2: the label is -inf"),
    "a regression of texts": ([0.5, "1.0", 1.0], 1, "row 1: the label is '1.0', a str: give a finite number"),
    "a regression of booleans": ([0.5, True, 1.0], 1, "row 1: the label is True, a bool"),
    "too few": ([1, 0], 2, "has 2 labels, but 3 of 'text'"),
    "no classes": ([0, 0, 0], 0, "num_labels is 0: choose the number of classes, or 1"),
    "a fraction of classes": ([0, 0, 0], 2.0, "num_labels is 2.0"),
}


def make(bert: str, num_labels: int = 2, train: dict = GOOD, evaluation: dict = GOOD) -> object:  # noqa: F811
    config = run_config("any", bert)
    scorer = Scorer("accuracy") if num_labels != 1 else Scorer("pearson")
    return text_task(config, train, evaluation, num_labels=num_labels, scorer=scorer)


@pytest.mark.parametrize("split", ["training", "evaluation"])
@pytest.mark.parametrize("what", BAD)
def test_a_label_that_does_not_belong_is_named_with_its_row(what: str, split: str, bert: str) -> None:  # noqa: F811
    labels, num_labels, message = BAD[what]
    good = {**GOOD, "labels": [0.5, 1.0, 2.0] if num_labels == 1 else GOOD["labels"]}
    parts = {"train": good, "evaluation": good} | {split.replace("training", "train"): {**GOOD, "labels": labels}}
    split = "" if what.endswith("classes") else split
    with pytest.raises(ValueError, match=f"{split}.*{message}"):
        make(bert, num_labels, **parts)


def test_a_split_that_is_empty_or_holds_no_text_is_named(bert: str) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="the evaluation split is empty"):
        make(bert, evaluation={"text": [], "labels": []})
    with pytest.raises(ValueError, match="the training split, row 1: 'text' is None, which is no text"):
        make(bert, train={**GOOD, "text": ["a", None, "b"]})
    with pytest.raises(ValueError, match="row 0: 'pair' is 3, which is no text"):
        make(bert, train={**GOOD, "pair": [3, "b", "c"]})
    with pytest.raises(ValueError, match="the training split has no column 'labels', but text, label"):
        make(bert, train={"text": ["a"], "label": [1]})


def test_whole_numbers_make_a_regression_and_numpys_do_as_classes(bert: str) -> None:  # noqa: F811
    task = make(bert, 1, {**GOOD, "labels": [1, 2.5, np.float32(0)]}, {**GOOD, "labels": [1, 2, 3]})
    batch = task.collate([task.eval[k] for k in range(3)])
    assert batch["labels"].dtype == torch.float32
    task.model(**batch).loss.backward()
    assert make(bert, 2, {**GOOD, "labels": np.array([1, 0, 1])}).train["labels"][:] == [1, 0, 1]


OWN = """
import datasets, torch
from srlora_dist.tasks.metrics import Scorer
from srlora_dist.tasks.text import text_task
def load(config):
    good = {"text": ["is it so ?", "it is so ."], "labels": [1, 0]}
    task = text_task(config, good, good, 2, Scorer("accuracy"))
    LINE
    return task
"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("task.eval = task.eval.select(range(0))", "the evaluation split is empty"),
        ("task.train = task.train.select(range(0))", "the training split is empty"),
        (
            "task.train = task.train.remove_columns('labels').add_column('labels', [2, 0])",
            "training split, row 0: the label is 2",
        ),
        (
            "task.eval = task.eval.remove_columns('labels').add_column('labels', [1.0, float('nan')])",
            "evaluation split, row 1: the label is nan",
        ),
    ],
)
def test_a_task_of_ones_own_is_looked_at_as_well(line: str, message: str, bert: str, tmp_path) -> None:  # noqa: F811
    (tmp_path / "own.py").write_text(OWN.replace("LINE", line))
    with pytest.raises(ValueError, match=message):
        load_task(run_config(tmp_path / "own.py", bert))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([-100, -100, -100], "row 0 has no label after its first token that is learnt"),
        ([3, -100, -100], "row 0 has no label after its first token that is learnt"),
        ([-100, 5], "has 3 tokens, but 2 labels: give one label per token"),
        ([-100, 5, -1], "has the label -1: give a token below 9, or -100"),
        ([-100, 5, 9], "has the label 9: give a token below 9"),
        ([-100.0, 5.0, 3.0], r"has labels that are no whole numbers \(float64\)"),
    ],
)
def test_labels_of_tokens_are_tokens(labels: list, message: str) -> None:
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [labels]})
    good = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[-100, 2, 3]]})
    with pytest.raises(ValueError, match=f"the evaluation split, {message}|the evaluation split, row 0 {message}"):
        token_task(RunConfig(), model, None, good, rows)
    with pytest.raises(ValueError, match="the training split is empty"):
        token_task(RunConfig(), model, None, good.select(range(0)), good)


def test_a_figure_that_cannot_be_computed_is_refused(bert: str) -> None:  # noqa: F811
    config = run_config("any", bert)
    with pytest.raises(ValueError, match="Scorer knows accuracy, .*: choose some of them, and not .'recall'"):
        Scorer("accuracy", "recall")
    with pytest.raises(ValueError, match="f1 cannot be computed of 3 classes"):
        text_task(config, GOOD, GOOD, 3, Scorer("accuracy", "f1"))
    with pytest.raises(ValueError, match="accuracy cannot be computed of a regression"):
        text_task(config, GOOD, GOOD, 1, Scorer("pearson", "accuracy"))


# --- a run that has learnt nothing


def test_two_points_are_no_correlation() -> None:
    assert Scorer("pearson", "spearman")(np.array([[1.0], [2.0]]), np.array([0.0, 1.0])) == {
        "pearson": 0,
        "spearman": 0,
    }


def test_a_run_that_has_learnt_nothing_stops() -> None:
    with pytest.raises(ValueError, match="the validation loss is nan before the first step"):
        require_finite_start(Judged({"loss": float("nan")}, ""))
    require_finite_start(Judged({"loss": 1.0}, ""))
    with pytest.raises(RunStoppedError, match="in all 4 steps, so nothing was learnt"):
        require_a_step(Progress(done=4, num_skipped=4), 4)
    require_a_step(Progress(done=3, num_skipped=3), 4)
    require_a_step(Progress(done=4, num_skipped=3), 4)
    with pytest.raises(RunStoppedError, match="the validation loss is inf after the last step"):
        require_a_best(Progress(final={"loss": float("inf")}))


def test_a_loss_that_is_not_finite_is_never_the_best() -> None:
    for loss in (float("nan"), float("inf")):
        assert not is_better({"loss": loss}, None)
    assert is_better({"loss": 2.0}, None)
    assert is_better({"loss": 1.0}, {"loss": 2.0})
    assert not is_better({"loss": 3.0}, {"loss": 2.0})


def test_figures_that_say_little_are_a_finding() -> None:
    logits, labels = torch.eye(2)[[1, 1, 1]], torch.tensor([0, 1, 1])
    assert "all 3 answers of the evaluation are the same (1)" in _doubt({"loss": 1.0}, logits, labels)
    assert "all 3 labels of the evaluation are the same (1)" in _doubt(
        {"loss": 1.0}, torch.eye(2)[[0, 1, 1]], labels * 0 + 1
    )
    assert "pearson cannot be computed" in _doubt({"loss": 1.0, "pearson": float("nan")}, logits, labels)
    assert _doubt({"loss": 1.0}, torch.eye(2)[[0, 1, 1]], labels) == ""
    assert _doubt({"loss": 1.0}, torch.ones(3), torch.ones(3)) == "", "sums and counts of tokens"
    found = doubts(Progress(done=4, num_skipped=2), 4, Judged({"loss": 1.0}, "all 3 answers are the same"))
    assert [each.kind for each in found] == ["skipped_steps", "doubtful_figures"]
    assert doubts(Progress(done=4, num_skipped=1), 4, Judged({"loss": 1.0}, "")) == []
