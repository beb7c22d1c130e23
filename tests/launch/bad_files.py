"""Files and folders that a user may give by mistake, each wrong in one way, for the table in test_bad_inputs.py."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.launch.conftest import Bench, write_rte

ROW = "0\tthe cat\tthe dog\tentailment\n"
HEADER = "index\tsentence1\tsentence2\tlabel\n"


def write_bad_files(bench: Bench) -> dict[str, Path]:
    """Everything that the table names in braces."""
    folder = bench.folder / "bad"
    folder.mkdir()
    return _plain_files(folder) | _data(folder) | _models(folder, bench.folder / "model", bench.folder / "decoder")


def _plain_files(folder: Path) -> dict[str, Path]:
    """YAML and DeepSpeed files, a file in the place of a folder, the ledger of another run."""
    contents = {
        "file": "not a folder",
        "binary": b"\x00\xff\xfe\x01" * 9,
        "broken.yaml": "train: {epochs: 1\n",
        "list.yaml": "- train\n- model\n",
        "text.yaml": "just a sentence\n",
        "key.yaml": "train:\n  batchsize: 8\n",
        "section.yaml": "trainer:\n  batch_size: 8\n",
        "twice.yaml": "seed: 1\ntrain:\n  batch_size: 8\nseed: 2\n",
        "null.yaml": "train: null\n",
        "bf16.json": '{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}',
        "broken.json": '{"zero_optimization": ',
        "list.json": "[1, 2]",
        "stage4.json": '{"zero_optimization": {"stage": 4}}',
        "no_stage.json": '{"bf16": {"enabled": "auto"}}',
        "nvme.json": '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "auto"}}}',
        "stage.json": '{"zero_optimization": {"stage": "two"}}',
        "flat.json": '{"zero_optimization": 2}',
        "precision.json": '{"bf16": true, "zero_optimization": {"stage": 2}}',
        "batch.json": '{"train_batch_size": 64, "zero_optimization": {"stage": 2}}',
        "clip.json": '{"gradient_clipping": 5.0, "zero_optimization": {"stage": 2}}',
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "folder").mkdir()
    (folder / "ledger").mkdir()
    save_file({"x": torch.zeros(1)}, folder / "ledger" / "switch-00000.safetensors")
    return {name: folder / name for name in (*contents, "folder", "ledger")}


def _data(folder: Path) -> dict[str, Path]:
    """RTE with another training or evaluation file, STS-B, and folders of text."""
    contents = {
        "no_bytes": b"",
        "header_only": HEADER,
        "short_row": HEADER + 9 * ROW + "9\tthe cat\tentailment\n",
        "nul": HEADER + ROW + "1\tthe\0cat\tthe dog\tentailment\n",
        "latin": HEADER.encode() + b"0\tcaf\xe9\tthe dog\tentailment\n",
    }
    for name, content in contents.items():
        write_rte(folder / name)
        (folder / name / "RTE" / "train.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())
    write_rte(folder / "no_dev")
    (folder / "no_dev" / "RTE" / "dev.tsv").write_text(HEADER)
    write_rte(folder / "columns", header="index\tpremise\thypothesis\tlabel")
    write_rte(folder / "labels", odd_label="perhaps")
    names = [*contents, "no_dev", "columns", "labels"]
    for name, score in (("words", "much"), ("nan_score", "nan")):
        (folder / name / "STS-B").mkdir(parents=True)
        for split in ("train", "dev"):
            (folder / name / "STS-B" / f"{split}.tsv").write_text(
                f"sentence1\tsentence2\tscore\na cat\ta dog\t{score}\n"
            )
        names.append(name)
    for name, text in (
        ("no_text", b""),
        ("blank_text", b" \n\t\n"),
        ("latin_text", b"caf\xe9\n"),
        ("nul_text", b"a\0cat\n"),
    ):
        (folder / name).mkdir()
        for split in ("train", "validation"):
            (folder / name / f"{split}.txt").write_bytes(text)
        names.append(name)
    return {name: folder / name for name in names}


def _models(folder: Path, encoder: Path, decoder: Path) -> dict[str, Path]:
    """Copies of the tiny models with one file changed or removed."""
    config = json.loads((encoder / "config.json").read_text())
    weights = load_file(encoder / "model.safetensors")
    changes = {
        "no_config": {"config.json": None},
        "broken_config": {"config.json": "{"},
        "list_config": {"config.json": "[1]"},
        "unknown_kind": {"config.json": json.dumps(config | {"model_type": "nopeformer"})},
        "odd_sizes": {"config.json": json.dumps(config | {"num_attention_heads": 5})},
        "text_sizes": {"config.json": json.dumps(config | {"hidden_size": "large"})},
        "own_code": {
            "config.json": json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}),
            "own.py": "raise SystemExit('ran code of the model')\n",
        },
        "no_weights": {"model.safetensors": None},
        "truncated": {"model.safetensors": (encoder / "model.safetensors").read_bytes()[:-999]},
        "pickle_named_safetensors": {"model.safetensors": pickle.dumps({"weight": [0.0]})},
        "no_tokenizer": {"tokenizer.json": None, "tokenizer_config.json": None},
        "broken_tokenizer": {"tokenizer.json": '{"model": 3}'},
        "cut_tokenizer": {"tokenizer.json": '{"model": '},
        "long_tokenizer": {"tokenizer.json": _with_long_vocabulary(encoder / "tokenizer.json")},
        "no_padding": {"tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}'},
        "garbage_gguf": {"x.gguf": b"not a GGUF file" * 9},
    }
    for name, files in changes.items():
        shutil.copytree(encoder, folder / name)
        for file, content in files.items():
            path = folder / name / file
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
    shutil.copytree(folder / "no_weights", folder / "pickled")
    torch.save(weights, folder / "pickled" / "pytorch_model.bin")
    shutil.copytree(encoder, folder / "nan_weights")
    dense = "encoder.layer.0.attention.self.query.weight"
    save_file(
        weights | {dense: torch.full_like(weights[dense], torch.nan)},
        folder / "nan_weights" / "model.safetensors",
        metadata={"format": "pt"},
    )
    shutil.copytree(decoder, folder / "other_model")
    return {name: folder / name for name in (*changes, "pickled", "nan_weights", "other_model")}


def _with_long_vocabulary(path: Path) -> str:
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3} | {
        word: 1000 + place for word, place in vocabulary.items() if place > 3
    }
    return json.dumps(content)
