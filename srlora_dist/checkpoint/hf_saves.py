"""Marks what PEFT itself saves during a run: the live pairs alone, which must not be taken for the trained adapter."""

from __future__ import annotations

import inspect
import logging
from functools import partial
from pathlib import Path

from peft import PeftModel
from peft.utils import CONFIG_NAME

logger = logging.getLogger(__name__)

RENAMED, NOTE = "adapter_config.live_pairs.json", "LIVE_PAIRS.md"
"""Name of PEFT's ``adapter_config.json`` in a marked folder, so that PEFT does not load it, and the note beside it."""

TEXT = """The adapter file here is not for use: it holds the live pairs of an SRLoRA run without what was fused into the
pretrained weights. It may be needed to resume; adapter_config.json was renamed so that nothing else loads it.

The adapter that gives the trained model's outputs on the untouched base is written by `switcher.export(folder)`; with
the HF Trainer it is in `adapter/` of the output folder at the end of training, and `callback.export(folder)` writes it.
That of a checkpoint:

    srlora export checkpoint folder        # the HF Trainer's: checkpoint-N/srlora
"""


def mark_saves_(model: PeftModel, adapter_name: str) -> None:
    """From now on, mark every folder that ``model.save_pretrained`` writes."""
    # A partial can be copied and pickled with the model; a nested function cannot.
    model.save_pretrained = partial(_save_marked, model, adapter_name)


def unmark_folder(folder: Path) -> None:
    """Remove the mark from a folder that now holds the trained adapter."""
    for name in (RENAMED, NOTE):
        (folder / name).unlink(missing_ok=True)


def _save_marked(model: PeftModel, adapter_name: str, *args: object, **kwargs: object) -> None:
    given = inspect.signature(type(model).save_pretrained).bind(model, *args, **kwargs)
    type(model).save_pretrained(*given.args, **given.kwargs)
    given.apply_defaults()
    options = given.arguments
    saved = options["selected_adapters"] or list(model.peft_config)
    if not options["is_main_process"] or adapter_name not in saved or adapter_name not in model.peft_config:
        return
    folder = Path(options["save_directory"]) / (adapter_name if adapter_name != "default" else "")
    try:
        (folder / CONFIG_NAME).replace(folder / RENAMED)
    except FileNotFoundError:  # every process saves, and another one came first
        return
    (folder / NOTE).write_text(TEXT)
    if not Path(options["save_directory"]).name.startswith("checkpoint-"):
        logger.warning(
            "%s holds the live pairs without what was fused, so it was made not to load: write the adapter with "
            "switcher.export(folder), or callback.export(folder); the HF Trainer has it in adapter/ at the end",
            folder,
        )
