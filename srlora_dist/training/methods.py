"""The methods that the trainer can run, each behind the same four verbs.

``SRLoRA`` is the product (PiSSA is SRLoRA that never switches); ``LoRA`` and ``AdaLoRA`` are baselines of PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from accelerate import PartialState
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
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


@dataclass
class Seconds:
    """Time that a method adds to plain LoRA training."""

    svd: float = 0.0
    switch: float = 0.0
    tracking: float = 0.0


class Method:
    """What the trainer asks of a method; what is empty here does nothing.

    Attributes:
        model: The base model with its adapter, for ``accelerator.prepare``.
        storage_name: How the ranks hold its tensors, known after ``bind``.
        can_save: Whether it writes checkpoints.
    """

    model: PeftModel
    storage_name: str
    can_save = True

    def bind(
        self, model: nn.Module, optimizer: object, resume_from: str | Checkpoint | None = None
    ) -> SwitchReport | None:
        """Take what ``prepare`` returned, and resume; gives the report of switch 0. Collective: every rank calls it."""

    def step(self, num_steps_done: int) -> SwitchReport | None:
        """After an optimizer step and before the gradients are cleared. Collective: every rank calls it."""

    def save_checkpoint(self, parent: Path, extra: dict[str, object], step: int) -> int | None:
        """Write ``step-N`` into a folder; its size on the main process. Collective: every rank calls it."""

    def export(self, folder: Path, put: Put = fill_folder) -> None:
        """Write a PEFT adapter for the untouched base. Collective: every rank calls it.

        Args:
            folder: Where.
            put: Gets the folder and the files on the main process, to write them.
        """

    def finish(self) -> None:
        """Write what could not be written before. Collective: every rank calls it.

        Raises:
            ValueError: It still cannot be.
        """

    def seconds(self) -> Seconds:
        """Time spent on this rank so far."""
        return Seconds()

    def extra_memory(self) -> dict[str, int]:
        """Bytes that it holds on this rank beside what LoRA needs."""
        return {}


def build_method(
    config: RunConfig,
    base: PreTrainedModel,
    peft_type: str | None,
    num_steps: int,
    engine: str,
    heads: Sequence[str] = (),
) -> Method:
    """Put an adapter on the base model.

    Args:
        config: The run.
        base: The untouched model.
        peft_type: PEFT's ``task_type``.
        num_steps: Optimizer steps of the run.
        engine: The engine that it will run on.
        heads: As in :func:`adapt`.

    Raises:
        ValueError: No layer matches ``lora.target_modules``, or the method cannot run like this.
    """
    if config.method == "adalora":
        return AdaLoRA(config, base, _adapter_options(config, base, peft_type, heads), num_steps, engine)
    model = adapt(config, base, peft_type, heads)
    return LoRA(config, model) if config.method == "lora" else SRLoRA(config, model, num_steps)


def adapt(config: RunConfig, base: PreTrainedModel, peft_type: str | None, heads: Sequence[str] = ()) -> PeftModel:
    """Put a LoRA adapter on a model, which may be without weights, on the meta device.

    Args:
        config: The run.
        base: The untouched model.
        peft_type: PEFT's ``task_type``.
        heads: Modules that are trained whole and saved with the adapter; PEFT knows those of some types by itself.

    Raises:
        ValueError: No layer matches ``lora.target_modules``, or the rank is above that of every matrix.
    """
    options = _adapter_options(config, base, peft_type, heads)
    return _adapt(base, LoraConfig(r=config.lora.rank, use_rslora=config.lora.use_rslora, **options), config)


def _adapter_options(
    config: RunConfig, base: PreTrainedModel, peft_type: str | None, heads: Sequence[str]
) -> dict[str, object]:
    """What LoRA and AdaLoRA have in common in PEFT's words."""
    _require_rank(config.lora.rank, base)
    targets = config.lora.target_modules
    names = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    if targets != "all-linear":
        _require_targets(names, base)
    return {
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        "target_modules": names,
        "task_type": peft_type,
        "modules_to_save": list(heads) or None,
        "exclude_modules": list(heads) or None,  # all-linear takes a head in that PEFT does not know
    }


def _adapt(base: PreTrainedModel, adapter: LoraConfig, config: RunConfig) -> PeftModel:
    try:
        return get_peft_model(base, adapter, adapter_name=config.srlora.adapter_name)
    except ValueError as error:
        raise ValueError(f"lora.target_modules is {config.lora.target_modules!r}: {error}") from error


def _require_rank(rank: int, base: PreTrainedModel) -> None:
    """Stop where no matrix has that many directions: the pairs beyond would be waste, and may not fit into memory."""
    shapes = [(layer.in_features, layer.out_features) for layer in base.modules() if isinstance(layer, nn.Linear)]
    shapes += [(layer.nx, layer.nf) for layer in base.modules() if isinstance(layer, Conv1D)]
    most = max(map(min, shapes), default=rank)
    if rank > most:
        raise ValueError(
            f"lora.rank is {rank}, but no matrix of the model has a rank above {most}: choose a smaller one"
        )


def _require_targets(names: list[str], base: PreTrainedModel) -> None:
    """Stop where PEFT would leave out in silence a name that is misspelt among others."""
    modules = [f".{name}" for name, _ in base.named_modules() if name]
    for name in names:
        if not any(module.endswith(f".{name}") for module in modules):
            raise ValueError(
                f"lora.target_modules is {','.join(names)!r}, but the model has no module {name!r}: correct it, or "
                "choose all-linear"
            )


class LoRA(Method):
    """Plain LoRA: one fixed subspace."""

    def __init__(self, config: RunConfig, model: PeftModel) -> None:
        self.model = model
        self.adapter_name = config.srlora.adapter_name
        sites = find_sites(model, self.adapter_name)  # refuses early what cannot be worked on
        self.names = [site.name for site in sites]
        self._parts = ExportParts(model, sites, self.adapter_name)

    @override
    def bind(self, model: nn.Module, optimizer: object, resume_from: str | Checkpoint | None = None) -> None:
        release_gathered(model)
        # Preparing a model can replace its parameters.
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
    """SRLoRA, or PiSSA: then the target is the rank itself, so that switch 0 is the only one."""

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
        self.switcher.export(folder, is_last=False, put=put)  # the loop itself counts the steps

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
    """PEFT's AdaLoRA. It starts at ``lora.rank``, so that as much is trained as with LoRA, and prunes to 2/3 of it.

    The ratio of 1.5 between the first and the final budget is the AdaLoRA paper's; its schedule is close to the paper's
    for GLUE: all ranks for a tenth of the run, pruning until the half, then fixed ranks. The training loss contains
    its orthogonality penalty, the validation loss does not. It writes no checkpoints.
    """

    can_save = False

    def __init__(
        self, config: RunConfig, base: PreTrainedModel, options: dict[str, object], num_steps: int, engine: str
    ) -> None:
        # PEFT would fail in the middle of the run.
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
        self.model = _adapt(base, adapter, config)

    @override
    def step(self, num_steps_done: int) -> None:
        self.model.base_model.update_and_allocate(num_steps_done)

    @override
    def export(self, folder: Path, put: Put = fill_folder) -> None:  # noqa: ARG002 (it goes on from no full disk)
        if PartialState().is_main_process:
            self.model.save_pretrained(folder)
