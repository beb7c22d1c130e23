"""Causal language modelling: the next token of plain text, from a folder or from the sentences of the demo.

In training the loss is the mean over the tokens of a rank, then over the ranks. Ranks whose rows differ in length
weigh a token differently, so unlike the other tasks a run is not quite the same run on another number of processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from srlora_dist.config import RunConfig
from srlora_dist.tasks.files import read_lines

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers.utils import ModelOutput

    from srlora_dist.tasks import Task

SPLITS = ("train", "validation")
IGNORED = -100  # the label that Transformers leaves out of a loss


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
    files = [Path(data_dir).expanduser() / f"{split}.txt" for split in SPLITS]
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"task.data_dir is {data_dir!r}, but there is no file {file}: give a folder with train.txt and "
                "validation.txt, one document a line"
            )
    return files


def _read_documents(path: Path) -> list[str]:
    return [line.strip() for line in read_lines(path) if line.strip()]


def _lm_task(config: RunConfig, train: list[str], evaluation: list[str]) -> Task:
    from transformers import AutoModelForCausalLM, DataCollatorWithPadding

    from srlora_dist.tasks import Task
    from srlora_dist.tasks.models import check_length, check_tokens, load_model, quiet, require_decoder
    from srlora_dist.tasks.text import encode

    options, splits = config.task, []
    with quiet():
        model, tokenizer = load_model(config, AutoModelForCausalLM)
        require_decoder(config, model)
        check_length(config, model, tokenizer, least=2)
        for name, texts, most in (
            ("train", train, options.max_train_samples),
            ("validation", evaluation, options.max_eval_samples),
        ):
            # A single token has nothing before it to be predicted from.
            rows = encode(tokenizer, {"text": texts}, options.max_length, most)
            splits.append(rows.filter(lambda tokens: len(tokens) > 1, input_columns="input_ids", keep_in_memory=True))
            if len(splits[-1]) == 0:
                raise ValueError(
                    f"task.data_dir is {options.data_dir!r}, whose {name} split has no document of two tokens or more"
                )
            check_tokens(config, model, tokenizer, splits[-1])
    pad = DataCollatorWithPadding(tokenizer)

    def collate(rows: list[dict]) -> dict[str, Tensor]:
        batch = dict(pad([{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows]))
        # By the mask, not by the token: the padding token may be the one that ends a document.
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        return batch

    return Task(
        model,
        tokenizer,
        *splits,
        collate=collate,
        answers=sums_and_counts,
        loss=token_loss,
        metrics=perplexity,
        main_metric="perplexity",
        peft_type="CAUSAL_LM",
    )


def sums_and_counts(output: ModelOutput, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each row, summed over its tokens, and their number: both of shape (rows,)."""
    from torch import nn

    labels = batch["labels"][:, 1:]
    # (rows, vocabulary, tokens), as cross_entropy wants it
    scores = output.logits[:, :-1].float().transpose(1, 2)
    losses = nn.functional.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="none")
    return losses.double().sum(1), (labels != IGNORED).sum(1)


def token_loss(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean over all tokens of a split."""
    return sums.sum() / counts.sum()


def perplexity(sums: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """The exponential of the loss; lower is better."""
    import numpy as np

    with np.errstate(over="ignore"):
        return {"perplexity": float(np.exp(sums.sum() / counts.sum()))}
