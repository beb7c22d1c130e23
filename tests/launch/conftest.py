"""A tiny BERT and a few rows of RTE in the official layout, and ways to start real runs on them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from tests.launch.forks import ENGINES, OPTIONS, Forks

ROOT = Path(__file__).parents[2]
WORDS = ["the", "cat", "dog", "sat", "ran", "on", "a", "mat", "it", "was", "good", "bad", "not", "very", "we", "saw"]
NUM_TRAIN, NUM_DEV = 41, 13  # neither divides by a batch or by two ranks


@dataclass
class Ended:
    """A process that has ended."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines that the program prints for its user."""
        return [line for line in self.stderr.splitlines() if "srlora_dist: error:" in line]


@dataclass
class Case:
    """One call of launch/train.py without a launcher."""

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    figures: bool = False


@dataclass
class Bench:
    """A folder with a model and data; runs go into ``runs/``."""

    folder: Path

    def __post_init__(self) -> None:
        self.forks = Forks(self.environment())

    def arguments(self, name: str, **options: object) -> list[str]:
        """The command line of a short run into ``runs/name``; ``train__epochs=3`` becomes ``--train.epochs=3``."""
        chosen = {
            "output_dir": self.run_folder(name),
            "task.name": "rte",
            "task.data_dir": self.folder / "glue",
            "task.max_length": 32,
            "model.name_or_path": self.folder / "model",
            "lora.rank": 4,
            "lora.alpha": 4,
            "srlora.target_rank": 8,
            "srlora.svd_cache": self.folder / "svd",
            "train.max_steps": 6,
            "train.batch_size": 8,
            "train.eval_batch_size": 6,
            "train.accumulation_steps": 2,
            "train.learning_rate": 0.01,
            "train.max_grad_norm": 0.1,
            "train.log_every": 1,
            "train.eval_every": 1,
        }
        chosen |= {key.replace("__", "."): value for key, value in options.items()}
        return [f"--{key}={value}" for key, value in chosen.items()]  # "--key -1" would be two options

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def environment(self) -> dict[str, str]:
        return os.environ | {
            "SRLORA_CACHE": str(self.folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def launch(self, *arguments: str, script: Path = ROOT / "launch" / "train.py", before: tuple = ()) -> Ended:
        """``accelerate launch [before] script [arguments]`` from the root of the repository."""
        command = [sys.executable, "-m", "accelerate.commands.launch", *before, str(script), *arguments]
        return _run(command, self.environment(), limit=240)

    def launch_yaml(self, yaml: str, *arguments: str, **more: object) -> Ended:
        return self.launch(*arguments, before=("--config_file", f"launch/accelerate/{yaml}.yaml"), **more)

    def run_all(self, cases: dict[str, Case]) -> dict[str, Ended]:
        """Each case in a plain process of its own, which is forked after the imports."""
        results = self.forks.run_cases({name: asdict(case) for name, case in cases.items()})
        return {name: Ended(**result) for name, result in results.items()}


def _run(command: list[str], environment: dict[str, str], limit: int) -> Ended:
    began = time.perf_counter()
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit, check=False
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr, time.perf_counter() - began)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    write_model(folder / "model")
    write_decoder(folder / "decoder")
    write_rte(folder / "glue")
    write_text(folder / "text")
    bench = Bench(folder)
    yield bench
    bench.forks.kill()


@pytest.fixture(scope="session")
def forks(bench: Bench) -> Forks:
    return bench.forks


@pytest.fixture(scope="session")
def undisturbed(bench: Bench, forks: Forks) -> dict[str, float]:
    """Seconds that a run takes on each engine."""
    seconds = {}
    for yaml in ENGINES:
        # The first one may wait for DeepSpeed's compiler.
        ended = forks.start(limit=240, yaml=yaml, arguments=bench.arguments(f"whole {yaml}", **OPTIONS))
        assert ended["statuses"] == {"0": 0, "1": 0}, ended["stderr"]
        seconds[yaml] = ended["seconds"]
    return seconds


def write_model(folder: Path, num_layers: int = 2, width: int = 32, inner_width: int = 64) -> None:
    """A BERT without dropout, so that every engine has the same losses."""
    from transformers import BertConfig, BertModel, set_seed

    vocab_size = write_tokenizer(folder, single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1")
    set_seed(0)
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=inner_width,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)


def write_decoder(folder: Path) -> None:
    """A Llama of two layers whose head is its embedding; 64 is the block of a 4-bit weight."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    vocab_size = write_tokenizer(folder, single="[CLS] $A", pair="[CLS] $A $B")
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=32, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def write_tokenizer(folder: Path, **template: str) -> int:
    """Of whole words; gives the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(names + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(special_tokens=[("[CLS]", 2), ("[SEP]", 3)], **template)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special).save_pretrained(folder)
    return len(names + WORDS)


def write_text(folder: Path) -> None:
    """Documents of 1 to 12 words, one a line."""
    draw = random.Random(1)
    folder.mkdir()
    for name, count in (("train", NUM_TRAIN), ("validation", NUM_DEV)):
        documents = (" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(count))
        (folder / f"{name}.txt").write_text("\n".join(documents) + "\n")


def write_rte(folder: Path, header: str = "index\tsentence1\tsentence2\tlabel", odd_label: str | None = None) -> Path:
    """Rows in the official layout, of which the last training row may get an odd label."""
    draw = random.Random(0)
    (folder / "RTE").mkdir(parents=True)
    for name, count in (("train", NUM_TRAIN), ("dev", NUM_DEV)):
        rows = [header]
        for index in range(count):
            first, second = (" ".join(draw.choices(WORDS, k=draw.randint(2, 8))) for _ in range(2))
            label = "entailment" if ("good" in first) == ("good" in second) else "not_entailment"
            if odd_label is not None and name == "train" and index == count - 1:
                label = odd_label
            rows.append(f"{index}\t{first}\t{second}\t{label}")
        (folder / "RTE" / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    return folder
