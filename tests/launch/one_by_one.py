"""Runs ``srlora train`` for one command line after the other, each in a child that is forked after the imports."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

LIMIT_SECONDS = 60
LATER_IMPORTS = (
    *("docstring_parser", "rich.console", "sklearn.metrics", "scipy.stats", "PIL.PngImagePlugin", "bitsandbytes"),
    *("srlora_dist.tasks.text", "srlora_dist.tasks.causal_lm", "srlora_dist.tasks.metrics", "matplotlib.pyplot"),
    *("transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama"),
    *("peft.tuners.lora.bnb", "peft.utils.transformers_weight_conversion"),
)
"""What a run imports when it knows its options and its task, which takes seconds."""


def run_case(
    main: Callable[[list[str]], int], arguments: list[str], environment: dict[str, str], figures: bool
) -> dict[str, object]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        child = os.fork()
        if child == 0:
            signal.alarm(LIMIT_SECONDS)  # ends this child where it hangs
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.environ.update(environment)
            if not figures:
                leave_out_figures()
            status = 1
            try:
                status = main(["train", *arguments])
            except SystemExit as leaving:
                status = int(leaving.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        return {"returncode": status, "stdout": texts[0], "stderr": texts[1], "seconds": time.perf_counter() - began}


def load_main() -> Callable[[list[str]], int]:
    """``srlora_dist.commands.cli.main`` with what takes seconds to import, ready to be forked."""
    from srlora_dist.commands import train
    from srlora_dist.commands.cli import main
    from srlora_dist.engine.process import prepare_process

    prepare_process()
    importlib.import_module("srlora_dist.training.run")
    for module in LATER_IMPORTS:
        importlib.import_module(module)
    mapping = importlib.import_module("transformers.conversion_mapping")
    mapping.get_checkpoint_conversion_mapping("bert")  # compiles the patterns of all models, once
    train.GRACE_SECONDS = 0  # there is no other rank to wait for
    return main


def leave_out_figures() -> None:
    """For this process; they take a third of the time of a short run."""
    importlib.import_module("srlora_dist.training.run").draw = lambda folder, summary: []
