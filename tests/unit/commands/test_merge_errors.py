"""``srlora merge`` says in one line what is wrong with an adapter or a base, and ends with status 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from srlora_dist.commands.cli import main
from tests.launch.conftest import write_model
from tests.unit.commands.test_merge import trained


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    write_model(folder / "model", num_layers=1)
    base = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=3)
    trained(base, folder / "adapter", "float32", task_type="SEQ_CLS")
    return folder / "adapter"


SETTINGS = {
    "a text for alpha": ({"lora_alpha": "8"}, "has lora_alpha '8', where a finite number is wanted"),
    "no alpha": ({"lora_alpha": None}, "has lora_alpha null or left out"),
    "alpha in a list": ({"lora_alpha": [8]}, "has lora_alpha [8]"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "has lora_alpha nan"),
    "alpha infinite": ({"lora_alpha": float("inf")}, "has lora_alpha inf"),
    "alpha true": ({"lora_alpha": True}, "has lora_alpha True"),
    "rank 0": ({"r": 0}, "has r 0, where a positive whole number is wanted"),
    "a fraction for the rank": ({"r": 3.5}, "has r 3.5"),
    "a text for the rank": ({"r": "3"}, "has r '3'"),
    "another rank": ({"r": 5}, "of rank 3, but adapter_config.json has r 5"),
    "a bad regex": ({"target_modules": "(query"}, "has target_modules '(query', where a list of names, or a regular"),
    "a number for targets": ({"target_modules": 3}, "has target_modules 3"),
    "numbers in targets": ({"target_modules": [3]}, "has target_modules [3]"),
    "targets that are not there": ({"target_modules": ["nothing"]}, "does not fit the base"),
    "a bad regex for ranks": ({"rank_pattern": {"(a": 3}}, "has rank_pattern {'(a': 3}"),
    "texts for ranks": ({"rank_pattern": {"a": "3"}}, "has rank_pattern {'a': '3'}"),
    "a list for ranks": ({"rank_pattern": [3]}, "has rank_pattern [3]"),
    "texts for alphas": ({"alpha_pattern": {"query": "3"}}, "has alpha_pattern {'query': '3'}"),
    "modules that are no names": ({"modules_to_save": [3]}, "has modules_to_save [3]"),
    "a text for a flag": ({"use_rslora": "yes"}, "has use_rslora 'yes', where true or false is wanted"),
    "another type of adapter": ({"peft_type": "IA3"}, "is of peft_type 'IA3', and what can be merged is LORA"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, "is of peft_type 'PROMPT_TUNING'"),
    "an unknown type": ({"peft_type": "LORAX"}, "is of peft_type 'LORAX'"),
    "a type in a list": ({"peft_type": ["LORA"]}, "is of peft_type ['LORA']"),
    "no type": ({"peft_type": None}, "is of peft_type None"),
    "a number for the base": ({"base_model_name_or_path": 3}, "has base_model_name_or_path 3"),
    "no base": ({"base_model_name_or_path": None}, "does not name its base: give --base"),
    "another task": ({"task_type": "TOKEN_CLS"}, "is of PEFT's task type TOKEN_CLS"),
    "a bad bias": ({"bias": "some"}, "cannot be merged|does not fit"),
    "replicated layers": ({"layer_replication": [[0, "x"]]}, "cannot be merged|does not fit"),
    "layers in a text": ({"layers_to_transform": "x"}, "has layers_to_transform 'x'"),
}


def edit(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def without(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))

    return apply


def tensors(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)

    return apply


def metadata(text: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(load_file(path), path, metadata={"format": "pt", "srlora_base": text})

    return apply


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


TENSORS = "adapter_model.safetensors"
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
BASE = "base_model.model.classifier.weight"
FILES = {
    "no JSON": (write("adapter_config.json", b"{"), "adapter_config.json cannot be read"),
    "binary JSON": (write("adapter_config.json", b"\xff\xfe"), "adapter_config.json cannot be read"),
    "alpha left out": (without("lora_alpha"), "has lora_alpha null or left out"),
    "a list": (write("adapter_config.json", b"[]"), "is not a JSON object"),
    "an empty object": (write("adapter_config.json", b"{}"), "is of peft_type None"),
    "no tensors file": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "has no adapter_model.safetensors",
    ),
    "an empty tensors file": (write("adapter_model.safetensors", b""), "cannot be read as safetensors"),
    "no safetensors": (write("adapter_model.safetensors", b"PK" * 99), "cannot be read as safetensors"),
    "cut": (
        lambda folder: write("adapter_model.safetensors", (folder / "adapter_model.safetensors").read_bytes()[:-9])(
            folder
        ),
        "cannot be read as safetensors",
    ),
    "no tensors": (tensors(lambda old: {}), "has no tensors"),
    "a half of a pair": (
        tensors(lambda old: {k: v for k, v in old.items() if k != f"{QUERY}.lora_B.weight"}),
        f"has {QUERY}.lora_A.weight, but no {QUERY}.lora_B.weight",
    ),
    "no pair of a layer": (
        tensors(lambda old: {k: v for k, v in old.items() if QUERY not in k}),
        f"lacks {QUERY}.lora_A.weight, {QUERY}.lora_B.weight, for which its",
    ),
    "two ranks": (
        tensors(lambda old: old | {f"{QUERY}.lora_A.weight": torch.ones(2, 32)}),
        "of rank 2, and ",
    ),
    "a vector": (tensors(lambda old: old | {f"{QUERY}.lora_A.weight": torch.ones(32)}), "which is no matrix"),
    "another width": (tensors(lambda old: old | {f"{QUERY}.lora_A.weight": torch.ones(3, 7)}), "does not fit the base"),
    "whole numbers": (
        tensors(lambda old: old | {f"{QUERY}.lora_A.weight": torch.ones(3, 32, dtype=torch.int32)}),
        "in torch.int32, which is no type of a factor",
    ),
    "NaN": (
        tensors(lambda old: old | {f"{QUERY}.lora_A.weight": torch.full((3, 32), torch.nan)}),
        "with NaN or infinite values",
    ),
    "a head without classes": (
        tensors(lambda old: {k: v if "classifier.weight" not in k else torch.tensor(1.0) for k, v in old.items()}),
        "has base_model.model.classifier.weight of the shape (), which is no matrix",
    ),
    "a base of another type": (
        metadata('{"weights": "int3", "digests": {}}'),
        "belongs to weights in 'int3': give --weights",
    ),
    "metadata that are no JSON": (metadata("{"), "the metadata srlora_base of"),
    "metadata in a list": (metadata("[]"), "the metadata srlora_base of"),
    "metadata without digests": (metadata('{"weights": "float32"}'), "the metadata srlora_base of"),
    "a text for the vocabulary": (
        metadata('{"weights": "float32", "digests": {}, "vocab_size": "3"}'),
        "the metadata srlora_base of",
    ),
}


def refuse(capsys: pytest.CaptureFixture, *argv: object) -> str:
    capsys.readouterr()
    status = main(["merge", *map(str, argv)])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("srlora: error:")]
    assert (status, len(lines), "Traceback" in captured.err) == (2, 1, False), captured.err
    return lines[0]


@pytest.mark.parametrize("what", [*SETTINGS, *FILES])
def test_what_is_wrong_with_an_adapter_is_one_line(what: str, adapter: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    change, message = FILES[what] if what in FILES else (edit(**SETTINGS[what][0]), SETTINGS[what][1])
    change(tmp_path / "adapter")
    line = refuse(capsys, tmp_path / "adapter", tmp_path / "merged")
    assert any(part in line for part in message.split("|")), line
    assert not (tmp_path / "merged").exists()


BASES = {
    "config.json is no JSON": write("config.json", b"{"),
    "an unknown model": write("config.json", b'{"model_type": "nothing"}'),
    "no model": write("config.json", b'{"hidden_size": 3}'),
    "sizes of another kind": write("config.json", b'{"model_type": "bert", "hidden_size": "x"}'),
    "heads that do not divide": write("config.json", b'{"model_type": "bert", "hidden_size": 30}'),
    "cut weights": cut("model.safetensors"),
    "no safetensors": write("model.safetensors", b"PK" * 99),
    "no weights": remove("model.safetensors"),
}


@pytest.mark.parametrize("what", BASES)
def test_what_is_wrong_with_a_base_is_one_line(what: str, adapter: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(adapter.parent / "model", tmp_path / "base")
    BASES[what](tmp_path / "base")
    line = refuse(capsys, adapter, tmp_path / "merged", "--base", tmp_path / "base")
    assert str(tmp_path / "base") in line


def test_an_adapter_of_adalora_is_merged(adapter: Path, tmp_path: Path, capsys) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(adapter.parent / "model", num_labels=3)
    settings = AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_r=3, target_r=2, total_step=9)
    model = get_peft_model(base, settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0, capsys.readouterr().err
