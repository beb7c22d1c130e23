"""The HF Trainer saves the live pairs alone as an adapter; this keeps that from being taken for the trained one."""

from __future__ import annotations

import logging
from pathlib import Path
from types import MethodType

from peft import PeftModel

logger = logging.getLogger(__name__)

NOTE = """The adapter file here is not for use: it holds the live pairs of an SRLoRA run without what was fused into the
pretrained weights. The Trainer needs it to resume; adapter_config.json was renamed so that nothing else loads it.

The adapter that gives the trained model's outputs on the untouched base is written at the end of training to
`adapter/` in the output folder of the run, and by `callback.export(folder)`. That of a checkpoint:

    srlora export checkpoint-N/srlora folder
"""


def mark_saves_(model: PeftModel, adapter_name: str) -> None:
    """From now on, keep what ``model.save_pretrained`` writes from being taken for the trained adapter."""

    def save_pretrained(self: PeftModel, save_directory: str, *args: object, **kwargs: object) -> None:
        type(self).save_pretrained(self, save_directory, *args, **kwargs)
        folder = Path(save_directory) / (adapter_name if adapter_name != "default" else "")
        config = folder / "adapter_config.json"
        if not kwargs.get("is_main_process", True) or not config.exists():
            return
        config.replace(folder / "adapter_config.live_pairs.json")
        (folder / "LIVE_PAIRS.md").write_text(NOTE)
        if not Path(save_directory).name.startswith("checkpoint-"):
            logger.warning(
                "%s holds the live pairs without what was fused, so it was made not to load: the adapter is in "
                "adapter/ of the output folder after training, or write it with callback.export(folder)",
                save_directory,
            )

    model.save_pretrained = MethodType(save_pretrained, model)
