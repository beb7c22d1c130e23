"""The files of a model: a local folder is looked at, and a GGUF file unpacked, before the model is loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError, safe_open

from srlora_dist.config.paths import cache_dir
from srlora_dist.errors import first_sentence

# In a process of its own: within a group of processes Transformers saves on rank 0 alone, which may not be the one that
# converts, and under ZeRO-3 it cuts every model that it makes.
UNPACK = """
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
file, dtype, folder = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
options = {"dtype": dtype, "quantization_config": GgufConfig(dequantize=True)}
AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options).save_pretrained(folder)
AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
"""


def unpack_gguf(name: str, gguf_file: str, dtype: str) -> str:
    """De-quantise a GGUF file into a folder that ``from_pretrained`` reads, once for each state of the file.

    Transformers can neither quantise while it reads a GGUF file nor train one that stays packed.

    Args:
        name: Folder, or name on the hub.
        gguf_file: The file in it.
        dtype: Type of the weights in the new folder.

    Returns:
        The folder, in the cache folder; it can be deleted.

    Raises:
        ValueError: The file cannot be found or read, or the package gguf is not installed.
    """
    from transformers.utils import cached_file  # seconds of imports that check_model_folder does without

    if find_spec("gguf") is None:
        raise ValueError(f"model.gguf_file is {gguf_file!r}, which needs the package gguf: pip install gguf")
    with reading(name, f"model.gguf_file {gguf_file}", "name a file of that folder"):
        file = Path(cached_file(name, gguf_file)).resolve()
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"model.gguf_file is {gguf_file!r}, but {file} does not begin as one: fetch it again")
    state = f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"
    digest = hashlib.sha256(state.encode()).hexdigest()[:12]
    folder = cache_dir() / "gguf" / f"{Path(gguf_file).stem}-{dtype}-{digest}"
    folder.parent.mkdir(exist_ok=True)
    part = folder.parent / f"{folder.name}.part"
    with FileLock(f"{folder}.lock"):  # the other processes of a machine wait for the one that converts
        if not folder.exists():
            shutil.rmtree(part, ignore_errors=True)
            command = [sys.executable, "-c", UNPACK, str(file), dtype, str(part)]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            if ended.returncode:
                shutil.rmtree(part, ignore_errors=True)
                reason = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
                raise ValueError(f"model.gguf_file is {gguf_file!r}, which cannot be read ({reason}): fetch it again")
            part.rename(folder)  # whole or not at all
    return str(folder)


@contextmanager
def reading(name: str, part: str, remedy: str) -> Iterator[None]:
    """Name the model and the part where a library fails on its files: each raises errors of its own kind."""
    try:
        yield
    except RuntimeError:  # of memory or of the other ranks, not of a file
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            remedy = "it comes with code of its own; read that, then set model.trust_remote_code to true"
        raise ValueError(
            f"model.name_or_path is {name!r}, whose {part} cannot be read ({first_sentence(error)}): {remedy}"
        ) from error


def check_model_folder(name: str) -> None:
    """Look at a local model's configuration and at the headers of its weights, which takes no time.

    Under ZeRO-3 the ranks load a model together, so that a file which one of them cannot read has to be found before.

    Args:
        name: ``model.name_or_path``; what looks like a name on the hub is let pass.

    Raises:
        ValueError: There is no such folder, or a file in it is missing or broken.
    """
    folder, this = Path(name), f"model.name_or_path is {name!r}"
    if not folder.is_dir():
        if folder.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise ValueError(f"{this}, which is no folder: give that of a model, or a name on the hub")
        return
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{this}, whose config.json cannot be read ({error}): fetch it again") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{this}, whose config.json is not a JSON object: fetch it again")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{this}, which has no weights in safetensors files; pickles, such as pytorch_model.bin, are not opened "
            "because they can run code: convert them with save_pretrained"
        )
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{this}, whose {file.name} is broken or no safetensors file ({error}): fetch it again"
            ) from error
