"""The training loop, the same for every method and engine."""

from __future__ import annotations

import platform
import resource
import sys
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from srlora_dist.config import RunConfig
from srlora_dist.engine import build_accelerator, require_engine, together
from srlora_dist.figures import draw
from srlora_dist.ledger import SwitchReport
from srlora_dist.methods import build_method
from srlora_dist.plan import SampleOrder, by_length, due_evaluations, warm_up_and_decay
from srlora_dist.precision import require_precision, train_in_
from srlora_dist.runlog import RunLog, Window
from srlora_dist.sites import keep_payloads_
from srlora_dist.tasks import Task, check_task, load_task


def train(config: RunConfig) -> dict[str, object]:
    """Run one training and leave its results in ``config.output_dir``.

    Collective: every process of the launch calls it.

    Returns:
        The content of ``summary.json``, on every process.

    Raises:
        ValueError: The options, the task, the launch or the output folder cannot be worked with; the message names
            the value and the remedy.
    """
    accelerator, engine = build_accelerator(config)
    log = together(lambda: _begin(config, accelerator))
    ledger_dir = config.srlora.ledger_dir or str(Path(config.output_dir) / "ledger")
    config = replace(config, engine=engine, srlora=replace(config.srlora, ledger_dir=ledger_dir))
    set_seed(config.seed)
    # Under ZeRO-3 loading sends weights from rank to rank already.
    task = load_task(config) if engine == "zero3" else together(lambda: load_task(config))
    trainer = Trainer(config, accelerator, task, log)
    summary = trainer.run()
    if log is not None:
        log.summary(summary)
        draw(log.folder)
    accelerator.end_training()
    return summary


def _begin(config: RunConfig, accelerator: Accelerator) -> RunLog | None:
    """What can fail is tried before anything that takes long; gives the main process its log."""
    check_task(config)
    return RunLog(Path(config.output_dir), config) if accelerator.is_main_process else None


class Trainer:
    """One run: model, data, optimizer and method, prepared for the engine.

    Args:
        config: The run, with the name of its engine.
        accelerator: On that engine.
        task: What is learnt.
        log: The output folder, on the main process; None elsewhere.

    Collective: prepares the model and performs switch 0.

    Raises:
        ValueError: The data, the adapter or the storage cannot be worked with.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, task: Task, log: RunLog | None) -> None:
        self.config, self.accelerator, self.task, self.log = config, accelerator, task, log
        options = config.train
        self.steps_per_epoch = len(task.train) // options.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"the training split has {len(task.train)} samples, fewer than train.batch_size {options.batch_size}: "
                "choose a smaller batch"
            )
        self.num_steps = options.max_steps or max(1, round(options.epochs * self.steps_per_epoch))
        set_seed(config.seed)
        self.method = build_method(config, task.model, task.peft_type, self.num_steps, config.engine)
        self.num_trainable = _num_trainable(self.method.model)
        keep_payloads_(self.method.model)
        # DeepSpeed keeps a float32 copy of its own, and cuts parameters of one type alone.
        train_in_(self.method.model, config.model.dtype if config.engine.startswith("zero") else "float32")
        together(lambda: log.start() if log is not None else None)
        self._prepare()
        require_precision(self.model, config.model)
        self._record_switch(self.method.bind(self.model, self.optimizer))
        require_engine(config.engine, self.method.storage_name, "the model is held as")
        set_seed(config.seed, device_specific=True)  # dropout must differ between ranks
        self.best: dict[str, object] | None = None
        self.final: dict[str, object] = {}

    def _prepare(self) -> None:
        options, task, accelerator = self.config.train, self.task, self.accelerator
        order = SampleOrder(len(task.train), options.batch_size, self.num_steps, self.config.seed)
        micro_batch_size = options.batch_size // options.accumulation_steps
        train_loader = DataLoader(
            task.train, batch_size=micro_batch_size, sampler=order, collate_fn=task.collate, drop_last=True
        )
        eval_loader = DataLoader(by_length(task.eval), batch_size=options.eval_batch_size, collate_fn=task.collate)
        model = self.method.model
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=options.weight_decay)
        scheduler = LambdaLR(optimizer, warm_up_and_decay(self.num_steps, options.warmup_ratio))
        self.model, self.optimizer, self.train_loader, self.eval_loader, self.scheduler = accelerator.prepare(
            model, optimizer, train_loader, eval_loader, scheduler
        )
        # FSDP2 has put others in their place.
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def run(self) -> dict[str, object]:
        """Train to the last step; gives the summary. Collective: every rank calls it."""
        options, window, done = self.config.train, Window(), 0
        due = due_evaluations(self.num_steps, options.eval_every)
        train_seconds = 0.0
        bar = self._progress_bar()
        self.model.train()
        for batch in self.train_loader:
            loss, grad_norm, learning_rate = self._micro_step(batch, done + 1)
            window.add(loss, batch)
            if not self.accelerator.sync_gradients:
                continue
            done += 1
            window.num_steps += 1
            bar.update()
            if done % options.log_every == 0 or done == self.num_steps:
                window.pause()
                train_seconds += window.seconds
                figures = {"learning_rate": learning_rate, **window.means(self.accelerator)}
                figures |= {} if grad_norm is None else {"grad_norm": _number(grad_norm)}
                bar.set_postfix(loss=f"{figures['loss']:.4f}", refresh=False)
                self._record("train", done, figures)
                window.restart()
            if done in due:
                window.pause()
                self._evaluate_and_export(done)
                window.resume()
        bar.close()
        return self._summary(train_seconds)

    def _micro_step(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, Tensor | float | None, float]:
        """One micro-batch, and at the end of an accumulation the optimizer step and the switch if one is due."""
        accelerator, max_norm, norm = self.accelerator, self.config.train.max_grad_norm, None
        learning_rate = self.scheduler.get_last_lr()[0]
        with accelerator.accumulate(self.model):
            loss = self.model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients and max_norm > 0:
                norm = accelerator.clip_grad_norm_(self.trainable, max_norm)
            self.optimizer.step()
            self.scheduler.step()
            if accelerator.sync_gradients:
                self._record_switch(self.method.step(step))
            self.optimizer.zero_grad()
        return loss, norm, learning_rate

    def _progress_bar(self) -> tqdm:
        # A log file keeps every refresh, a terminal only the last.
        pause = 0.1 if sys.stderr.isatty() else 10.0
        return tqdm(
            total=self.num_steps, desc=self.config.method, unit="step", disable=self.log is None, mininterval=pause
        )

    def _record_switch(self, report: SwitchReport | None) -> None:
        if report is not None and self.log is not None:
            self.log.switch(report)

    def _record(self, split: str, step: int, figures: dict[str, object]) -> None:
        if self.log is not None:
            self.log.metrics({"step": step, "epoch": step / self.steps_per_epoch, "split": split, **figures})

    def _evaluate_and_export(self, step: int) -> None:
        """Evaluate; export the adapter if it is the best so far, and in any case after the last step."""
        figures = evaluate(self.accelerator, self.model, self.eval_loader, self.task)
        self._record("eval", step, figures)
        self.final = figures
        folder = Path(self.config.output_dir)
        if self.best is None or figures["loss"] < self.best["loss"]:
            self.best = {"step": step, **figures}
            self.method.export(folder / "adapter")
        if step == self.num_steps:
            self.method.export(folder / "adapter_last")

    def _summary(self, train_seconds: float) -> dict[str, object]:
        """The content of ``summary.json``. Collective: one gather of a number."""
        best = dict(self.best)
        seconds = self.method.seconds()
        return {
            "method": self.config.method,
            "task": self.config.task.name,
            "model": self.task.model.name_or_path,
            "weights": self.config.model.stored_as,
            "seed": self.config.seed,
            "world_size": self.accelerator.num_processes,
            "storage": self.method.storage_name,
            "steps": self.num_steps,
            "best_step": best.pop("step"),
            "best": best,
            "final": self.final,
            "main_metric": self.task.main_metric,
            "trainable_parameters": self.num_trainable,
            "train_seconds": train_seconds,
            **{f"{name}_seconds": value for name, value in asdict(seconds).items()},
            "peak_memory_bytes": _peak_memory(self.accelerator),
            "extra_memory_bytes": self.method.extra_memory(),
            "versions": _versions(),
        }


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader, task: Task) -> dict[str, float]:
    """Loss and figures over the whole evaluation split, each sample counted once on any world size.

    The loss is computed from the gathered outputs, not averaged over ranks: the last batch is filled up with repeated
    samples, which would weigh in.

    Collective: every rank calls it; gathers the task's answers batch by batch.
    """
    model.eval()
    gathered = []
    for batch in loader:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        answers = task.answers(model(**inputs), batch)
        answers = accelerator.gather_for_metrics(tuple(part.contiguous() for part in answers))
        gathered.append([part.cpu() for part in answers])
    model.train()
    outputs, labels = (torch.cat(parts) for parts in zip(*gathered, strict=True))
    outputs = outputs.double()
    return {"loss": task.loss(outputs, labels).item(), **task.metrics(outputs.numpy(), labels.numpy())}


def _number(norm: Tensor | float) -> float:
    """A gradient's norm, of which every rank holds a part under FSDP2. Collective there: one all-reduce."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _num_trainable(model: nn.Module) -> int:
    # Under ZeRO-3 a parameter is a placeholder that knows its size.
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def _peak_memory(accelerator: Accelerator) -> int:
    """Of the rank that needed most, in bytes: of the GPU, or resident where there is none."""
    if accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return int(accelerator.gather(torch.tensor([peak], dtype=torch.int64, device=accelerator.device)).max())


def _versions() -> dict[str, str]:
    names = ("torch", "accelerate", "deepspeed", "transformers", "peft", "bitsandbytes", "srlora_dist")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
