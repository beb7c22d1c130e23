"""The options of a training run, each declared once: they are the YAML schema and the command line (see parse.py)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from srlora_dist.config.checks import BELOW_ONE, COUNT, COUNT_OR_NONE, MOST, POSITIVE, expand_home, require
from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.config.option import flatten, option, walk_options
from srlora_dist.config.weight_type import WeightType

RESUMABLE = ("lora", "pissa", "srlora")
"""The methods whose runs write checkpoints."""


@dataclass
class LoRAOptions:
    """The PEFT adapter.

    Args:
        rank: Pairs of each site.
        alpha: Numerator of the scale: ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``use_rslora``.
        dropout: Dropout in front of A; SRLoRA needs 0, because dropout breaks the preservation of the function.
        target_modules: ``all-linear`` or module names, comma separated.
        use_rslora: Rank-stabilised scale.
    """

    rank: int = 8
    alpha: float = 8
    dropout: float = 0.0
    target_modules: str = "all-linear"
    use_rslora: bool = False

    def __post_init__(self) -> None:
        require("lora.", self, {"rank": COUNT, "alpha": POSITIVE, "dropout": BELOW_ONE})


@dataclass
class ModelOptions:
    """The pretrained model.

    Args:
        name_or_path: Name on the hub or a local folder; ``null`` takes the task's own model.
        gguf_file: A GGUF file in that folder or repository; it is de-quantised once, into the cache folder.
        dropout: Sets every dropout of the model; ``null`` leaves the model as it was published.
        dtype: Storage of the pretrained weights, and the precision in which the forward pass computes. What is trained
            stays in float32, or has a float32 copy under DeepSpeed. Only a launch file that asks for mixed precision
            makes ``float32`` weights compute in another.
        quantization: Store the pretrained linear layers in 4 or 8 bits (bitsandbytes), all but the task's head.
        double_quantization: Quantise the constants of a 4-bit storage as well.
        trust_remote_code: Allow code that comes with the model to run.
    """

    name_or_path: str | None = option(None, free_on_resume=True)
    gguf_file: str | None = option(None, free_on_resume=True)
    dropout: float | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    double_quantization: bool = False
    trust_remote_code: bool = option(False, free_on_resume=True)

    def __post_init__(self) -> None:
        own = (BELOW_ONE[0], f"{BELOW_ONE[1]}, or null for the model's own")
        require("model.", self, {"dropout": own, "name_or_path": (bool, "a folder or a name on the hub, or null")})
        expand_home(self, "name_or_path")
        if self.double_quantization and self.quantization not in ("nf4", "fp4"):
            raise ValueError(
                f"model.double_quantization belongs to a 4-bit storage, but model.quantization is {self.quantization}: "
                "choose nf4 or fp4, or leave it out"
            )
        if self.gguf_file is not None and self.name_or_path is None:
            raise ValueError(
                f"model.gguf_file is {self.gguf_file!r} without a folder: set model.name_or_path to the one with it"
            )

    @property
    def stored_as(self) -> str:
        """The type of the pretrained linear layers, which an adapter belongs to."""
        return str(WeightType(self.dtype, self.quantization, self.double_quantization))


@dataclass
class TaskOptions:
    """What is learnt.

    Args:
        name: ``demo``, a GLUE task (``sst2 cola mrpc qnli rte stsb``), ``lm`` (the next token of plain text),
            ``instruct`` (of answers), pictures (``cifar100 stl10 mnist fashion_mnist images``), or a file of your own,
            ``path/to/task.py``; see docs/tasks.md.
        data_dir: GLUE: folder in the official layout (one folder a task), ``null`` loads from the hub. ``lm``: folder
            with ``train.txt`` and ``validation.txt``, one document a line, ``null`` takes the sentences of the demo.
            ``instruct``: folder with ``train.jsonl`` and ``validation.jsonl``. Pictures: folder of IDX files, or with
            ``train`` and ``validation`` or ``test``, each with a folder a class; ``null`` loads from the hub.
        max_length: Longest input in tokens; longer ones are cut.
        completion_only: ``instruct``: learn the answers alone, not the questions.
        packing: ``instruct`` and ``lm``: training rows hold several samples, which do not see each other.
        max_train_samples: Use only the first samples of the training split; ``null`` uses all.
        max_eval_samples: Use only the first samples of the evaluation split; ``null`` uses all.
    """

    name: str = "demo"
    data_dir: str | None = option(None, free_on_resume=True, names_run_in=())
    max_length: int = 128
    completion_only: bool = option(True, only_with=("task.name", ("instruct", "*.py")))
    packing: bool = option(False, only_with=("task.name", ("instruct", "lm", "*.py")))
    max_train_samples: int | None = None
    max_eval_samples: int | None = None


@dataclass
class TrainOptions:
    """The training loop.

    Args:
        epochs: Passes over the training split; ignored where ``max_steps`` is given.
        max_steps: Optimizer steps.
        batch_size: Samples of one optimizer step, over all ranks and accumulation steps together.
        eval_batch_size: Samples of one evaluation batch, over all ranks together.
        accumulation_steps: Micro-batches of one optimizer step.
        optimizer: ``adamw``, or ``sgd`` with ``momentum``.
        momentum: Momentum of ``sgd``.
        learning_rate: Peak of the schedule.
        schedule: How the rate goes on after the warm-up: it falls to 0 along a line (``linear``) or half a wave
            (``cosine``), or stays (``constant``).
        warmup_ratio: Share of the steps in which the rate rises linearly.
        weight_decay: The optimizer's, on the trainable weights. It shrinks pairs that start as a copy of part of W.
        max_grad_norm: Clip the gradient to this norm; 0 does not clip.
        eval_every: Steps between evaluations; ``null`` is five times a run. One more is before the first step.
        log_every: Steps between lines of ``metrics.jsonl``.
        max_bad_steps: Steps in a row whose gradient may be NaN or infinite, which are left out, before the run stops.
        timeout: Seconds that a rank waits for the others before the run stops; rank 0 factors a large weight in that
            time.
    """

    epochs: float = option(1.0, only_with=("train.max_steps", (None,)))
    max_steps: int | None = None
    batch_size: int = 32
    eval_batch_size: int = option(64, free_on_resume=True, names_run_in=("figure",))
    accumulation_steps: int = option(1, free_on_resume=True)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = option(0.9, only_with=("train.optimizer", ("sgd",)))
    learning_rate: float = 1e-3
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_every: int | None = option(None, free_on_resume=True)
    log_every: int = option(10, free_on_resume=True, names_run_in=("figure",))
    max_bad_steps: int = option(20, free_on_resume=True)
    timeout: int = option(1800, free_on_resume=True, names_run_in=())

    def __post_init__(self) -> None:
        counts = ("max_steps", "batch_size", "eval_batch_size", "accumulation_steps", "log_every", "eval_every")
        counts += ("max_bad_steps", "timeout")
        rules = dict.fromkeys(counts, COUNT) | dict.fromkeys(("epochs", "learning_rate"), POSITIVE)
        rules["momentum"] = (BELOW_ONE[0], f"{BELOW_ONE[1]}, such as 0.9")
        rules["weight_decay"] = (lambda value: 0 <= value <= MOST, f"0 to {MOST:g}")
        rules["max_grad_norm"] = (lambda value: 0 <= value < math.inf, "a positive finite number, or 0 for no clipping")
        rules["warmup_ratio"] = (lambda value: 0 <= value <= 1, "a share of the steps in [0, 1], such as 0.06")
        require("train.", self, rules)
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"train.batch_size {self.batch_size} is not a multiple of train.accumulation_steps "
                f"{self.accumulation_steps}: choose another"
            )


@dataclass
class CheckpointOptions:
    """What a run writes so that it can be resumed, and what it resumes from.

    Args:
        every: Steps between checkpoints; ``null`` writes one with each evaluation, 0 only if the run is asked to stop.
        keep: Newest checkpoints to keep; that of the lowest validation loss stays as well.
        resume: ``auto`` goes on from the last good checkpoint in the output folder if the run there has not ended,
            ``must`` insists on one, ``never`` starts anew; or the folder of a checkpoint.
        if_disk_full: Whether to ``stop`` where a checkpoint cannot be written, or ``go_on`` without it.
    """

    every: int | None = option(None, free_on_resume=True, names_run_in=(), methods=RESUMABLE)
    keep: int = option(2, free_on_resume=True, names_run_in=(), methods=RESUMABLE)
    resume: str = option("auto", free_on_resume=True, names_run_in=(), methods=RESUMABLE)
    if_disk_full: Literal["stop", "go_on"] = option("stop", free_on_resume=True, names_run_in=(), methods=RESUMABLE)

    def __post_init__(self) -> None:
        require(
            "checkpoint.", self, {"every": COUNT_OR_NONE, "keep": COUNT, "resume": (bool, "auto, never or a folder")}
        )
        expand_home(self, "resume")


@dataclass
class RunConfig:
    """One training run; ``config.yaml`` in the output folder is this, resolved.

    Args:
        method: ``srlora``, or a baseline in the same trainer: ``lora``, ``pissa``, ``adalora``.
        output_dir: Folder for everything that the run leaves behind; an ended run that is there is moved to
            ``<output_dir>.1``. ``null`` is ``runs/<task>-<method>``.
        seed: Seed of the data order, the adapter and the task's head.
        engine: The storage that the run must get; ``auto`` takes what ``accelerate launch`` gives.
        model: The pretrained model.
        task: What is learnt.
        lora: The adapter.
        srlora: How pairs are scored, fused and restarted.
        train: The training loop.
        checkpoint: What is written to be resumed.
    """

    method: Literal["lora", "pissa", "srlora", "adalora"] = "srlora"
    output_dir: str | None = option(None, free_on_resume=True, names_run_in=())
    seed: int = 0
    engine: Literal["auto", "plain", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2"] = option(
        "auto", free_on_resume=True, names_run_in=()
    )
    model: ModelOptions = field(default_factory=ModelOptions)
    task: TaskOptions = field(default_factory=TaskOptions)
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    srlora: SRLoRAConfig = field(default_factory=SRLoRAConfig)
    train: TrainOptions = field(default_factory=TrainOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)

    def __post_init__(self) -> None:
        # The generators of NumPy take 32 bits, and a rank adds its number.
        seed = (lambda value: 0 <= value < 2**31, "0 to 2147483647")
        require("", self, {"seed": seed, "output_dir": (bool, "a folder, or null for one named after the run")})
        if self.method == "adalora" and self.lora.use_rslora:
            raise ValueError("lora.use_rslora has no meaning for method adalora: leave it out")
        if self.output_dir is None:
            self.output_dir = f"runs/{Path(self.task.name).stem}-{self.method}"
        expand_home(self, "output_dir")

    def without_effect(self) -> list[str]:
        """Name the options that were changed and do nothing in this run."""
        values, names = flatten(asdict(self)), []
        for name, each in walk_options(RunConfig):
            if values[name] == each.default:
                continue
            other, effective = each.metadata.get("only_with") or ("method", ("*",))
            if self.method not in (each.metadata.get("methods") or (self.method,)):
                names.append(name)
            elif not any(fnmatch(str(values[other]), str(value)) for value in effective):
                names.append(f"{name} ({other} is {values[other]})")
        return names
