"""Refuses arguments of the HF Trainer with which SRLoRA would go wrong, later or in silence."""

from __future__ import annotations

from collections.abc import Iterator

from accelerate.utils import parse_flag_from_env
from peft import PeftModel
from transformers import TrainingArguments

WITH_REFERENCE = {
    **dict.fromkeys(("DPOConfig", "KTOConfig", "OnlineDPOConfig"), ("beta", 0, "")),
    **dict.fromkeys(("GRPOConfig", "RLOOConfig"), ("beta", 0, ", or beta=0 to do without a reference")),
    **dict.fromkeys(("SDFTConfig", "SDPOConfig"), ("teacher_model_kind", "live", ", or teacher_model_kind='live'")),
}
"""Arguments of TRL that compare with the model without its adapter, unless an option (first) has a value (second).

The third part ends the message: what else the user could do."""

OF_REFERENCE = ("ref", "teacher")
"""Names of the adapters that TRL adds to a PEFT model, to switch to them for the comparison."""


def refuse_arguments(args: TrainingArguments) -> None:
    """Stop before anything is done if an argument of the Trainer would go wrong later, or in silence.

    Raises:
        ValueError: The message names the argument and the remedy.
    """
    for holds, what, remedy in (*_trainer_checks(args), *_engine_checks(args)):
        if holds:
            raise ValueError(f"SRLoRA cannot work like this: {what}; {remedy}")


Check = tuple[bool, str, str]
"""Whether something would go wrong, what that is, and the remedy."""


def _trainer_checks(args: TrainingArguments) -> Iterator[Check]:
    """What the Trainer itself does."""
    yield (
        args.load_best_model_at_end,
        "load_best_model_at_end would load the best pairs onto the last weights",
        "set it to False and keep metric_for_best_model: the best adapter is then exported to adapter_best/",
    )
    yield (
        args.auto_find_batch_size,
        "auto_find_batch_size starts training again on weights that SRLoRA has edited",
        "set per_device_train_batch_size yourself",
    )
    yield (
        args.enable_jit_checkpoint,
        "enable_jit_checkpoint saves without telling callbacks, so that what was fused would be lost",
        "set it to False, and save_steps to what you can afford to lose",
    )
    yield (
        "8bit" in args.optim and args.save_strategy != "no",
        f"optim {args.optim.value} keeps moments that a checkpoint cannot hold",
        "set optim='adamw_torch', or save_strategy='no'",
    )
    yield (
        args.save_only_model and args.save_strategy != "no",
        "save_only_model leaves out the learning rate and the random state, so that no checkpoint can be resumed",
        "set it to False, or save_strategy='no': the adapter is exported at the end of training anyway",
    )


def _engine_checks(args: TrainingArguments) -> Iterator[Check]:
    """What the engine does that the arguments or the launch ask for."""
    plugin = args.deepspeed_plugin
    yield (
        args.fp16 and plugin is None and args.optim == "adamw_torch_fused",
        "optim adamw_torch_fused unscales fp16 gradients itself, so that they cannot be observed",
        "set optim='adamw_torch', or bf16=True",
    )
    settings = plugin.deepspeed_config if plugin is not None else {}
    yield (
        settings.get("compile", {}).get("deepcompile") and plugin.zero_stage == 3,
        "DeepCompile under ZeRO-3 keeps copies of gathered weights that an edit of W does not reach",
        "set compile.deepcompile to false in the DeepSpeed file",
    )
    yield (
        args.n_gpu > 1,
        f"this process trains on {args.n_gpu} GPUs with nn.DataParallel, which is not supported",
        "start with accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES=0",
    )


def deepspeed_dtype(args: TrainingArguments) -> str | None:
    """The type in which DeepSpeed will train, as ``model.dtype`` names it; None without DeepSpeed."""
    if args.deepspeed_plugin is None:
        return None
    settings = args.deepspeed_plugin.hf_ds_config
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        enabled = settings.get_value(f"{name}.enabled", "auto")
        if getattr(args, name) if enabled == "auto" else enabled:
            return dtype
    return "float32"


def refuse_reference(args: TrainingArguments, model: PeftModel, edited: list[str]) -> None:
    """Stop if the Trainer compares with the model without its adapter, which is no longer the pretrained model.

    Args:
        args: Arguments of the Trainer.
        model: The model with its second adapters, which are switched off together with the first.
        edited: Names of the sites without a second adapter, whose weights are edited in place.

    Raises:
        ValueError: It does; the message names the remedy.
    """
    kinds = {kind.__name__ for kind in type(args).__mro__} & set(WITH_REFERENCE)
    for kind in kinds:
        name, without, instead = WITH_REFERENCE[kind]
        if getattr(args, name) == without:
            continue
        what = f"SRLoRA cannot work like this: {kind} compares with the model without its adapter"
        if edited:
            raise ValueError(
                f"{what}, whose weights are edited: set srlora.fusion to adapter, which never writes them{instead}"
            )
        if getattr(args, name) == "ema" or set(OF_REFERENCE) & set(model.peft_config):
            raise ValueError(
                f"{what}, for which TRL switches to another one and back, and leaves out what was fused: give the "
                f"trainer the plain model and peft_config=LoraConfig(...), and no teacher of kind 'ema'{instead}"
            )


def asks_for_fsdp(args: TrainingArguments) -> bool:
    """Whether the arguments or the launch ask for FSDP."""
    return bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def require_launched_engine(args: TrainingArguments, got: str) -> None:
    """Stop if the launch asks for an engine and Accelerate has dropped it in silence.

    Raises:
        ValueError: It has; the message names both engines.
    """
    deepspeed = args.deepspeed_plugin is not None
    for asked, is_asked, prefix in (("DeepSpeed", deepspeed, "zero"), ("FSDP", asks_for_fsdp(args), "fsdp")):
        if is_asked and not got.startswith(prefix):
            raise ValueError(
                f"the launch asks for {asked}, but the Trainer runs on {got}: Accelerate drops {asked} without a GPU; "
                "leave it out there, or see docs/trainer.md for DeepSpeed on a CPU"
            )
