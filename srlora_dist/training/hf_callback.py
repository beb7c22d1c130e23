"""The door for ``transformers.Trainer`` and TRL's ``SFTTrainer``: a callback that makes a LoRA run an SRLoRA run.

The Trainer keeps its loop, its engine and its checkpoints. What it does not save, what was fused above all, the
callback writes into a folder of each ``checkpoint-N``; it resumes from there, and exports the adapter at the end.
"""

from __future__ import annotations

import logging
import uuid
from functools import partial
from pathlib import Path

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import SaveStrategy
from typing_extensions import override

from srlora_dist.checkpoint.export import export_checkpoint
from srlora_dist.checkpoint.folder_lock import FolderLock
from srlora_dist.checkpoint.format import Checkpoint, checkpoint_folders
from srlora_dist.checkpoint.ledger import SwitchReport
from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.engine.precision import require_deepspeed_type
from srlora_dist.engine.process import launched_by_deepspeed
from srlora_dist.layers.adapter import find_peft_model
from srlora_dist.method.second_adapter import activate_again_
from srlora_dist.method.switcher import Switcher
from srlora_dist.storage.collectives import run_together
from srlora_dist.storage.quantized import require_cuttable
from srlora_dist.storage.unconnected import require_connected
from srlora_dist.training.hf_arguments import (
    asks_for_fsdp,
    deepspeed_dtype,
    refuse_arguments,
    refuse_reference,
    require_launched_engine,
)

logger = logging.getLogger(__name__)

IN_USE = "output_dir of the Trainer", "choose another output_dir"
FOLDER = "srlora"
"""In each ``checkpoint-N``: what the Trainer does not save."""


class SRLoRACallback(TrainerCallback):
    """Does in a Trainer what :class:`Switcher` does in a loop of one's own; give it to ``Trainer(callbacks=[...])``.

    It switches after the optimizer steps that are due; adds ``checkpoint-N/srlora`` to the Trainer's checkpoints, and
    goes on from there with ``train(resume_from_checkpoint=...)``; notes each switch in ``trainer.state.log_history``;
    and at the end of training exports the adapter to ``<output_dir>/adapter``, and that of the best checkpoint to
    ``<output_dir>/adapter_best`` if ``metric_for_best_model`` is set.

    What the Trainer itself saves as an adapter are the live pairs without what was fused. It needs them to resume; so
    that nobody serves them, their ``adapter_config.json`` gets another name, and a note lies beside them.

    Args:
        config: Options.
        resume_from: The ``checkpoint-N`` that is resumed, where the callback cannot know it: it looks in
            ``args.resume_from_checkpoint`` and in ``args.output_dir``, for a callback is not told what ``train()`` got.

    Attributes:
        switcher: What does the work; None before the Trainer is built.

    Collective: every rank runs the Trainer; see :class:`Switcher` for what is sent.

    Raises:
        ValueError: While the Trainer is built, or when training begins: the model, the options or the arguments of the
            Trainer cannot be worked with, or a resumed checkpoint holds nothing of SRLoRA. Raised on every rank.
    """

    def __init__(self, config: SRLoRAConfig | None = None, resume_from: str | Path | None = None) -> None:
        self.config = config or SRLoRAConfig()
        self.resume_from = resume_from
        self.switcher: Switcher | None = None
        self._lock: FolderLock | None = None

    @override
    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Give quantised layers their second adapter, for which it is too late once the model is prepared."""
        refuse_arguments(args)
        if args.world_size == 1:
            require_connected()
        require_deepspeed_type(deepspeed_dtype(args) or "float32", "the type of the training")
        if launched_by_deepspeed() and args.deepspeed_plugin is None:
            logger.warning(
                "the command deepspeed has started this, but TrainingArguments have no deepspeed=, so that the Trainer "
                "runs DDP: give it a file such as ds_configs/zero2.json, or start torchrun"
            )
        if args.push_to_hub:
            logger.warning(
                "push_to_hub uploads the live pairs, which nobody can use without what was fused: upload the exported "
                "adapter from %s instead",
                Path(args.output_dir) / "adapter",
            )
        if args.save_total_limit == 1 and args.save_strategy != "no":
            logger.warning(
                "save_total_limit 1 removes the old checkpoint before SRLoRA is told of the new one: a run that is "
                "killed between the two has none to resume, so set it to 2"
            )
        self._has_evaluated = False
        self.switcher = Switcher(model, self.config)
        for site in self.switcher.sites if asks_for_fsdp(args) else ():
            require_cuttable(site)
        self._peft_model = peft_model = find_peft_model(model)
        edited = [site.name for site in self.switcher.sites if site.fused_a is None]
        refuse_reference(args, peft_model, edited)
        # Else a resuming Trainer turns 16-bit pairs into float32, TRL's of a quantised model above all.
        peft_model.load_adapter = partial(peft_model.load_adapter, autocast_adapter_dtype=False)

    @override
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: object = None,
        **kwargs: object,
    ) -> None:
        """Perform switch 0 on the prepared model, or resume."""
        self._require_fresh(args, state, model)
        # Rank 0 alone writes what is not the Trainer's.
        holds = args.process_index == 0
        self._lock = run_together(lambda: FolderLock(args.output_dir, *IN_USE) if holds else None)
        self.switcher.set_num_steps(state.max_steps)
        resumes = state.global_step > 0
        # Where a model has several adapters or one of another name, a Trainer that resumes leaves one active.
        activate_again_(self.switcher.sites)
        source = run_together(
            lambda: self._find_checkpoint(args, state) if resumes and args.process_index == 0 else None
        )
        try:
            report = self.switcher.bind(model, optimizer, source, will_save=args.save_strategy != SaveStrategy.NO)
            require_launched_engine(args, self.switcher.storage.name)
        except BaseException:
            self._let_go()
            raise
        # Another one for each start, for two that resume the same checkpoint come to the same steps in two ways.
        self._run = self.switcher.storage.broadcast_object(uuid.uuid4().hex)
        _log(state, {"srlora_run": self._run})
        self._note(state, report)

    @override
    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remember that the Trainer has prepared the model for an evaluation."""
        self._has_evaluated = True

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Count the optimizer step, if a loss scaler did not skip it, and switch if that is due."""
        self._note(state, self.switcher.step())

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Write beside what the Trainer has just saved; its ``save_total_limit`` removes both."""
        parent = _checkpoint_of(args, state.global_step) / FOLDER
        self.switcher.save_checkpoint(parent, {"run": self._run}, state.global_step)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Export the adapter of the last step, and that of the best checkpoint if the Trainer knows one."""
        folder = Path(args.output_dir)
        self.export(folder / "adapter")
        # Rank 0 alone looks, for others may not see its files.
        best = folder / "adapter_best"
        self.switcher.storage.on_rank_0(f"export the best checkpoint to {best}", lambda: _export_best(state, best))
        self._let_go()

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def export(self, folder: str | Path, max_rank: int | None = None) -> None:
        """Write a plain PEFT adapter that gives the trained model's outputs on the untouched base.

        Args:
            folder: Where to write.
            max_rank: Truncate each site to this rank by SVD and log the relative error; None keeps it exact.

        Collective: see :meth:`Switcher.export`.

        Raises:
            RuntimeError: Training has not begun.
        """
        if self.switcher is None or self.switcher.storage is None:
            raise RuntimeError("there is nothing to export yet: call trainer.train() first")
        self.switcher.export(folder, max_rank)

    def _require_fresh(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Stop where the model is not the untouched one of ``on_init_end``, prepared for training."""
        if self.switcher is None:
            raise ValueError(
                "SRLoRACallback came after the Trainer was built: pass it as Trainer(..., callbacks=[SRLoRACallback()])"
            )
        if self.switcher.storage is not None:
            raise ValueError(
                "train() was called before, and SRLoRA has edited the weights of this model since: load the model anew "
                "and build a new Trainer with a new SRLoRACallback; it can resume from the checkpoints of this one"
            )
        if self.resume_from is not None and state.global_step == 0:
            raise ValueError(
                f"SRLoRACallback(resume_from=...) names {self.resume_from}, but the Trainer begins anew: call "
                "trainer.train(resume_from_checkpoint=...) with it"
            )
        if self._has_evaluated and (args.world_size > 1 or args.deepspeed_plugin is not None):
            raise ValueError(
                "evaluate() or predict() was called before train(), after which the Trainer trains without its engine, "
                "each process by itself: set eval_on_start=True instead, or evaluate after training"
            )
        if state.is_hyper_param_search or find_peft_model(model) is not self._peft_model:
            raise ValueError(
                "the Trainer trains another model than it was built with, as model_init and hyperparameter_search make "
                "it do: pass model=..., and build a Trainer for each run"
            )

    def _find_checkpoint(self, args: TrainingArguments, state: TrainerState) -> Checkpoint:
        """Where the Trainer resumes, and is not said to a callback."""
        name, run = f"{FOLDER}/step-{state.global_step}", next(reversed(_runs(state)), None)
        given = [place for place in (self.resume_from, args.resume_from_checkpoint) if isinstance(place, (str, Path))]
        places = [Path(place) for place in (*given, _checkpoint_of(args, state.global_step))]
        found = [Checkpoint(place / name) for place in places if (place / name).is_dir()]
        same = [checkpoint for checkpoint in found if checkpoint.state["extra"].get("run") == run]
        if not found:
            usable = [path.parent.parent for path in Path(args.output_dir).glob(f"checkpoint-*/{FOLDER}/step-*")]
            usable.sort(key=lambda folder: int(folder.name.rpartition("-")[2]))
            raise ValueError(
                f"the Trainer resumes after step {state.global_step}, but {' and '.join(map(str, places))} hold no "
                f"{name}: what was fused would be lost. A checkpoint that was saved without SRLoRACallback, or cut off "
                f"while it was saved, cannot be resumed: take {usable[-1] if usable else 'none, and start anew'}; or "
                "name the folder in SRLoRACallback(resume_from=...) if it lies elsewhere"
            )
        if not same:
            raise ValueError(
                f"the Trainer resumed a checkpoint of another run than {' and '.join(str(c.folder) for c in found)}: "
                "name the folder that is resumed in SRLoRACallback(resume_from=...), or take an earlier checkpoint if "
                "this one was cut off while it was saved"
            )
        if args.deepspeed_plugin is None and not (same[0].folder.parents[1] / SCHEDULER_NAME).exists():
            raise ValueError(
                f"{same[0].folder.parents[1]} was saved with save_only_model, so that the Trainer would begin its "
                "learning rate anew: take a checkpoint that was saved without it"
            )
        return same[0]

    def _note(self, state: TrainerState, report: SwitchReport | None) -> None:
        if report is None:
            return
        num_pairs = sum(len(site.slots) for site in report.sites)
        what = "undone" if report.undone else f"{num_pairs} pairs of {len(report.sites)} sites restarted"
        logger.info("step %d: switch %d, %s", state.global_step, report.switch, what)
        _log(state, {"srlora_switch": report.switch, "srlora_pairs": 0 if report.undone else num_pairs})


def _log(state: TrainerState, entry: dict[str, object]) -> None:
    state.log_history.append({"step": state.global_step, "epoch": state.epoch or 0.0, **entry})


def _runs(state: TrainerState) -> list[str]:
    """What each start of this run was called, the last one last."""
    return [entry["srlora_run"] for entry in state.log_history if "srlora_run" in entry]


def _export_best(state: TrainerState, folder: Path) -> None:
    """Export the best checkpoint, if the Trainer knows one and did not take another run's for it."""
    if state.best_model_checkpoint is None:
        return
    saved = [Checkpoint(path) for path in checkpoint_folders(Path(state.best_model_checkpoint) / FOLDER)]
    if not saved or saved[-1].state["extra"].get("run") not in _runs(state):
        logger.warning(
            "%s, which the Trainer calls the best checkpoint, is not of this run, so %s is not written: choose a new "
            "output_dir for each run, and save_steps so that each evaluated step is saved",
            *(state.best_model_checkpoint, folder),
        )
        return
    export_checkpoint(saved[-1], folder)


def _checkpoint_of(args: TrainingArguments, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}"
