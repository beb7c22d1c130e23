"""The methods that the training loop can run, all behind one interface, :class:`Method`.

:class:`SRLoRA` is the method of this project; PiSSA is SRLoRA without switches. :class:`LoRA` and :class:`AdaLoRA` are
the baselines, made by PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from accelerate import PartialState
from peft import AdaLoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import override

from srlora_dist.checkpoint.export import export_adapter
from srlora_dist.checkpoint.export_parts import ExportParts
from srlora_dist.checkpoint.files import Put, fill_folder
from srlora_dist.checkpoint.format import Checkpoint, require_same_base
from srlora_dist.checkpoint.ledger import SwitchReport
from srlora_dist.checkpoint.save import open_run, save_run
from srlora_dist.checkpoint.training_state import require_same_training, restore_training_state_
from srlora_dist.config.run import RunConfig
from srlora_dist.layers.discovery import find_sites
from srlora_dist.method.switcher import Switcher
from srlora_dist.storage.find import find_storage, release_gathered
from srlora_dist.training.adapter import adapt, adapter_options, add_adapter


@dataclass
class Seconds:
    """Seconds that a method adds to plain LoRA training."""

    svd: float = 0.0
    switch: float = 0.0
    tracking: float = 0.0


class Method:
    """What the training loop asks of a method. A function that is empty here does nothing by default.

    Attributes:
        model: The base model with its adapter, for ``accelerator.prepare``.
        storage_name: The name of the storage, known after ``bind``.
        can_save: Whether the method writes checkpoints.
    """

    model: PeftModel
    storage_name: str
    can_save = True

    def bind(
        self, model: nn.Module, optimizer: object, resume_from: str | Checkpoint | None = None
    ) -> SwitchReport | None:
        """Take over the prepared model and optimizer, and resume if there is a checkpoint.

        Args:
            model: The model that ``accelerator.prepare`` returned.
            optimizer: The optimizer that it returned.
            resume_from: The checkpoint on the main process, its folder elsewhere; None for a new run.

        Collective: every rank calls it.

        Returns:
            The report of switch 0, if it was performed.
        """

    def step(self, num_steps_done: int) -> SwitchReport | None:
        """Follow an optimizer step, before the gradients are cleared. Collective: every rank calls it."""

    def save_checkpoint(self, parent: Path, extra: dict[str, object], step: int) -> int | None:
        """Write the checkpoint ``step-N``.

        Args:
            parent: The folder of the run's checkpoints.
            extra: What the training loop wants to find again when it resumes.
            step: Optimizer steps that were done.

        Collective: every rank calls it.

        Returns:
            Its size in bytes, on the main process.
        """

    def export(self, folder: Path, put: Put = fill_folder) -> None:
        """Write a PEFT adapter for the untouched base. Collective: every rank calls it.

        Args:
            folder: Folder of the adapter.
            put: Called on the main process with the folder and the files, to write them.
        """

    def finish(self) -> None:
        """Write what a full disk has refused before. Collective: every rank calls it.

        Raises:
            ValueError: It still cannot be written.
        """

    def seconds(self) -> Seconds:
        """Seconds spent on this rank so far."""
        return Seconds()

    def extra_memory(self) -> dict[str, int]:
        """Bytes that the method holds on this rank beyond what LoRA needs, by their purpose."""
        return {}


def build_method(
    config: RunConfig,
    base: PreTrainedModel,
    peft_type: str | None,
    num_steps: int,
    engine: str,
    heads: Sequence[str] = (),
) -> Method:
    """Put an adapter on the base model, as the method of the run wants it.

    Args:
        config: The options of the run.
        base: The untouched model.
        peft_type: The task type, by PEFT's name.
        num_steps: Optimizer steps of the run.
        engine: Name of the engine of the run.
        heads: See :func:`~srlora_dist.training.adapter.adapt`.

    Raises:
        ValueError: No layer matches ``lora.target_modules``, or the method cannot run like this.
    """
    if config.method == "adalora":
        return AdaLoRA(config, base, adapter_options(config, base, peft_type, heads), num_steps, engine)
    model = adapt(config, base, peft_type, heads)
    return LoRA(config, model) if config.method == "lora" else SRLoRA(config, model, num_steps)


class LoRA(Method):
    """Plain LoRA, which trains one fixed subspace."""

    def __init__(self, config: RunConfig, model: PeftModel) -> None:
        self.model = model
        self.adapter_name = config.srlora.adapter_name
        sites = find_sites(model, self.adapter_name)  # fails early if a layer cannot be worked on
        self.names = [site.name for site in sites]
        self._parts = ExportParts(model, sites, self.adapter_name)

    @override
    def bind(self, model: nn.Module, optimizer: object, resume_from: str | Checkpoint | None = None) -> None:
        release_gathered(model)
        # They are looked up again, because preparing a model can replace its parameters.
        self.sites = find_sites(model, self.adapter_name, self.names)
        self.storage = find_storage(model, optimizer, self.sites)
        self.storage_name = self.storage.name
        self.digests = self.storage.digest_weights()
        self._parts.bind(model, self.sites, self.digests)
        if resume_from is not None:
            saved = open_run(self.storage, resume_from)
            require_same_base(saved.state, self.sites, self.digests)
            require_same_training(model, self.storage, saved.state)
            restore_training_state_(model, self.storage, saved.state, saved.read)

    @override
    def save_checkpoint(self, parent: Path, extra: dict[str, object], step: int) -> int | None:
        return save_run(
            parent,
            self.model,
            self.storage,
            self._parts,
            digests=self.digests,
            state={"step": step, "extra": extra},
            tensors={},
            ledger=None,
        )

    @override
    def export(self, folder: Path, put: Put = fill_folder) -> None:
        export_adapter(self.model, self.storage, self.sites, None, folder, self._parts, put=put)


class SRLoRA(Method):
    """SRLoRA. For PiSSA the target rank is the rank itself, so that switch 0 is the only switch."""

    def __init__(self, config: RunConfig, model: PeftModel, num_steps: int) -> None:
        self.model = model
        options = config.srlora
        if config.method == "pissa":
            options = replace(options, target_rank=config.lora.rank, num_switches=None)
        full = config.checkpoint.if_disk_full
        self.switcher = Switcher(model, options, num_training_steps=num_steps, if_disk_full=full)

    @override
    def bind(
        self, model: nn.Module, optimizer: object, resume_from: str | Checkpoint | None = None
    ) -> SwitchReport | None:
        report = self.switcher.bind(model, optimizer, resume_from)
        self.storage_name = self.switcher.storage.name
        return report

    @override
    def save_checkpoint(self, parent: Path, extra: dict[str, object], step: int) -> int | None:
        return self.switcher.save_checkpoint(parent, extra, step)

    @override
    def step(self, num_steps_done: int) -> SwitchReport | None:
        return self.switcher.step()

    @override
    def export(self, folder: Path, put: Put = fill_folder) -> None:
        self.switcher.export(folder, is_last=False, put=put)  # the loop counts the steps itself

    @override
    def finish(self) -> None:
        self.switcher.write_ledger()

    @override
    def seconds(self) -> Seconds:
        switcher = self.switcher
        return Seconds(switcher.svd_seconds, switcher.switch_seconds, switcher.tracking_seconds)

    @override
    def extra_memory(self) -> dict[str, int]:
        return asdict(self.switcher.extra_memory)


class AdaLoRA(Method):
    """PEFT's AdaLoRA. It starts at ``lora.rank``, which trains as much as LoRA does, and prunes to 2/3 of that.

    The ratio of 1.5 between the first and the final budget is that of the AdaLoRA paper. The schedule is close to that
    paper's schedule for GLUE: it trains all ranks for a tenth of the run, prunes until half of it is done, and then
    keeps the ranks. The training loss contains the orthogonality penalty, the validation loss does not. It writes no
    checkpoints.
    """

    can_save = False

    def __init__(
        self, config: RunConfig, base: PreTrainedModel, options: dict[str, object], num_steps: int, engine: str
    ) -> None:
        # Without these two checks PEFT would fail in the middle of the run.
        if config.lora.rank < 2:
            raise ValueError(f"lora.rank is {config.lora.rank}, but method adalora prunes pairs: choose at least 2")
        if num_steps < 3:
            raise ValueError(
                f"method adalora prunes during a run, and this one has {num_steps} steps: train at least 3"
            )
        self.storage_name = engine
        adapter = AdaLoraConfig(
            init_r=config.lora.rank,
            target_r=max(1, round(config.lora.rank / 1.5)),
            tinit=num_steps // 10,
            tfinal=num_steps // 2,
            deltaT=max(1, num_steps // 100),
            total_step=num_steps,
            **options,
        )
        self.model = add_adapter(base, adapter, config)

    @override
    def step(self, num_steps_done: int) -> None:
        self.model.base_model.update_and_allocate(num_steps_done)

    @override
    def export(self, folder: Path, put: Put = fill_folder) -> None:  # noqa: ARG002 (a full disk stops it)
        if PartialState().is_main_process:
            self.model.save_pretrained(folder)
