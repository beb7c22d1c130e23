"""``srlora merge`` makes one plain checkpoint of a base and its adapter."""

from __future__ import annotations

from pathlib import Path

from srlora_dist.commands.arguments import Arguments
from srlora_dist.engine.process import prepare_process

LARGE = 0.01
"""Relative difference of the logits from which on rounding is worth a word."""


def run(argv: list[str]) -> None:
    """Merge, and say how far the logits are from those of base and adapter.

    Raises:
        ValueError: The adapter, the base or the folder cannot be worked with.
        OSError: The folder cannot be written.
    """
    parser = Arguments("merge", "Write base and adapter as one checkpoint that plain Transformers loads.")
    parser.add_argument("adapter", type=Path, help="folder of the adapter, as a run or srlora export writes it")
    parser.add_argument("folder", type=Path, help="where to write; new or empty")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; else the base's")
    parser.add_argument("--base", help="folder or name of the base, where it is not where the adapter says")
    parser.add_argument("--weights", help="the type that the adapter belongs to, where it does not say")
    options = parser.parse(argv)
    prepare_process()
    from srlora_dist.commands.merge.merger import Merger  # seconds of imports

    try:
        merger = Merger(options.adapter, options.base, options.weights)
        about = merger.merge(options.folder, options.dtype)
    except (ValueError, OSError):
        raise
    except Exception as error:  # of PEFT or Transformers, about something in the files of the adapter or of the base
        raise ValueError(
            f"{options.adapter} cannot be merged ({type(error).__name__}: {error}); SRLORA_DEBUG=1 shows where"
        ) from error
    quantised = merger.weights.quantization != "none"
    print(f"base: {merger.base} in {about['weights']}{', which was dequantised' if quantised else ''}")
    print(f"merged in {about['dtype']}: {options.folder}, {about['bytes'] / 1e6:.1f} MB")
    print(f"logits of random inputs: relative difference {about['relative_difference']:.1e} from base and adapter")
    if about["relative_difference"] > LARGE and about["dtype"] != "float32":
        print(f"that is what {about['dtype']} rounds away of the change: --dtype float32 keeps it")
