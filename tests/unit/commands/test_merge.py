"""``srlora merge``: what plain Transformers loads from the folder is base and adapter, with its head and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.checkpoint.base_label import BaseLabel
from srlora_dist.commands.cli import main
from srlora_dist.commands.merge.load_options import load_options
from srlora_dist.config.weight_type import WeightType
from srlora_dist.layers.digest import digest_span
from srlora_dist.layers.site import quantisation
from srlora_dist.storage.quantized import digest_layer_scales
from tests.launch.conftest import write_decoder, write_model

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
TOKENS = {"input_ids": torch.tensor([[2, 7, 9, 4, 5, 3]]), "attention_mask": torch.ones(1, 6, dtype=torch.long)}


def trained(base: torch.nn.Module, folder: Path, stored_as: str | None, **lora: object) -> PeftModel:
    """Put an adapter of random pairs and a changed head on a model, saved as srlora_dist does."""
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **lora})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    if stored_as is not None:
        label(folder, BaseLabel(stored_as, digests(model)))
    return model


def digests(model: PeftModel) -> dict[str, str]:
    """Of the weights of all adapted layers, as an export holds them."""
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            linear = layer.get_base_layer()
            kind = quantisation(linear)
            found[name] = f"{digest_layer_scales(linear, kind) if kind else digest_span(linear.weight):016x}"
    return found


def label(folder: Path, base: BaseLabel) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", **base.metadata()})


def merge(capsys: pytest.CaptureFixture, *argv: str | Path) -> str:
    capsys.readouterr()
    status = main(["merge", *map(str, argv)])
    captured = capsys.readouterr()
    return captured.out if status == 0 else captured.err


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """The adapter of a classifier of 3 classes, and its logits."""
    folder = tmp_path_factory.mktemp("classifier")
    write_model(folder / "model")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=3)
    model = trained(base, folder / "adapter", "float32", task_type="SEQ_CLS")
    with torch.no_grad():
        return folder / "adapter", model(**TOKENS).logits


@pytest.mark.long
def test_a_classifier_keeps_its_head_and_its_tokenizer(classifier: tuple, tmp_path: Path, capsys) -> None:
    adapter, expected = classifier
    text = merge(capsys, adapter, tmp_path / "new" / "merged")
    loaded, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "new" / "merged", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.num_labels == 3
    with torch.no_grad():
        assert difference(loaded.eval()(**TOKENS).logits, expected) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new" / "merged")
    assert tokenizer.decode(tokenizer("the cat sat").input_ids) == "[CLS] the cat sat [SEP]"
    assert "merged in float32" in text
    assert float(text.split("relative difference ")[1].split()[0]) < 1e-5


@pytest.mark.long
def test_a_smaller_type_rounds_and_says_how_much(classifier: tuple, tmp_path: Path, capsys) -> None:
    adapter, expected = classifier
    text = merge(capsys, adapter, tmp_path, "--dtype", "bfloat16")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    said = float(text.split("relative difference ")[1].split()[0])
    assert 1e-4 < said < 0.1
    with torch.no_grad():
        assert difference(loaded(**TOKENS).logits.float(), expected) < 10 * said


@pytest.mark.long
def test_a_quantised_base_is_dequantised(tmp_path: Path, capsys) -> None:
    write_decoder(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=BitsAndBytesConfig(**NF4))
    model = trained(base, tmp_path / "adapter", "nf4 computing in float32", task_type="CAUSAL_LM").train()
    with torch.no_grad():
        expected = model(**TOKENS).logits
    text = merge(capsys, tmp_path / "adapter", tmp_path / "merged")
    assert "nf4 computing in float32, which was dequantised" in text
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(loaded.config, "quantization_config")
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear
    with torch.no_grad():
        assert difference(loaded(**TOKENS).logits, expected) < 1e-5
        # On the weights as they were before, the adapter gives something else.
        merge(capsys, tmp_path / "adapter", tmp_path / "other", "--weights", "float32")
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
        assert difference(other(**TOKENS).logits, expected) > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_layers_that_dequantising_transposes_are_put_back(kind: str, tmp_path: Path, capsys) -> None:
    """GPT-2's Conv1D; half of its layers are square, so that their shapes would not tell."""
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    settings = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=20, n_positions=32, **no_dropout)
    GPT2LMHeadModel(settings).save_pretrained(tmp_path / "model")
    quantised = BitsAndBytesConfig(**NF4) if kind == "nf4" else BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=quantised)
    stored_as = "nf4 computing in float32" if kind == "nf4" else "int8"
    model = trained(base, tmp_path / "adapter", stored_as, task_type="CAUSAL_LM").train()
    with torch.no_grad():
        expected = model(**TOKENS).logits
        merge(capsys, tmp_path / "adapter", tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert difference(merged(**TOKENS).logits, expected) < {"nf4": 1e-5, "int8": 0.02}[kind]


def test_a_quantised_base_stays_in_host_memory() -> None:
    """Transformers would put it on a GPU where there is one, and the inputs are not there."""
    options = load_options(WeightType("float32", "nf4"), AutoModelForCausalLM, GPT2Config())
    assert options["device_map"] == {"": "cpu"}


def test_a_decoders_output_layer_is_found_whatever_it_is_called() -> None:
    options = load_options(WeightType("float32", "nf4"), AutoModelForCausalLM, GPT2Config())
    assert options["quantization_config"].llm_int8_skip_modules is None  # as the tasks load it


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_trained_embeddings_are_not_tied_any_more(saved: list[str], tmp_path: Path, capsys) -> None:
    write_decoder(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    lora = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "modules_to_save": saved}
    model = trained(base, tmp_path / "adapter", "float32", **lora)
    merge(capsys, tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert difference(merged(**TOKENS).logits, model(**TOKENS).logits) < 1e-5


def test_an_adapter_of_a_shared_weight_is_refused(tmp_path: Path, capsys) -> None:
    write_decoder(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trained(base, tmp_path / "adapter", "float32", task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    assert "cannot be merged: the sum computes something else" in merge(capsys, tmp_path / "adapter", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_base_is_refused(classifier: tuple, tmp_path: Path, capsys) -> None:
    """Of another width, with fewer layers, which PEFT passes over in silence, and of another architecture."""
    write_model(tmp_path / "narrow", width=16)
    write_model(tmp_path / "short", num_layers=1)
    write_decoder(tmp_path / "decoder")
    for name, reason in {"narrow": "does not fit", "short": "has no place", "decoder": "nor the adapter has"}.items():
        message = merge(capsys, classifier[0], tmp_path / "merged", "--base", tmp_path / name)
        assert reason in message
        assert "with --base" in message


@pytest.mark.long
@pytest.mark.parametrize("kind", ["float32", "nf4", "nf4-double", "int8"])
def test_another_base_of_the_same_shape_is_refused(kind: str, tmp_path: Path, capsys) -> None:
    for number in (0, 1):
        write_decoder(tmp_path / f"model{number}")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model1")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn_like(parameter) * parameter.std()  # as after a short training
    other.save_pretrained(tmp_path / "model1")
    options = {"nf4-double": {**NF4, "bnb_4bit_use_double_quant": True}, "nf4": NF4, "int8": {"load_in_8bit": True}}
    quantised = {} if kind == "float32" else {"quantization_config": BitsAndBytesConfig(**options[kind])}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model0", dtype="float32", **quantised)
    stored_as = kind if kind in ("float32", "int8") else f"{kind} computing in float32"
    trained(base, tmp_path / "adapter", stored_as, task_type="CAUSAL_LM")
    message = merge(capsys, tmp_path / "adapter", tmp_path / "merged", "--base", tmp_path / "model1")
    assert "was trained on other weights than those of" in message
    assert "model.layers.0.self_attn.q_proj" in message
    assert not (tmp_path / "merged").exists()
    assert "merged in float32" in merge(capsys, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.long
def test_the_type_is_read_from_the_tensors_and_not_from_the_readme(tmp_path: Path, capsys, caplog) -> None:
    write_decoder(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    trained(base, tmp_path / "adapter", "bfloat16", task_type="CAUSAL_LM")
    (tmp_path / "adapter" / "README.md").write_text("the adapted weights in **int8**.\n")
    assert "in bfloat16\n" in merge(capsys, tmp_path / "adapter", tmp_path / "merged")
    merge(capsys, tmp_path / "adapter", tmp_path / "other", "--weights", "float32")
    assert "belongs to weights in bfloat16: in float32 it gives something else" in caplog.text


@pytest.mark.long
def test_an_exported_adapter_with_resized_embeddings_is_merged(tmp_path: Path, capsys) -> None:
    write_decoder(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    base.resize_token_embeddings(len(base.get_input_embeddings().weight) + 3)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    switcher = Switcher(model, SRLoRAConfig(target_rank=8, svd_cache=str(tmp_path / "svd")), 20)
    switcher.bind(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    switcher.export(tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer_config.json").write_text("{}")
    assert "merged in float32" in merge(capsys, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert difference(merged(**TOKENS).logits, model.eval()(**TOKENS).logits) < 1e-5
    assert (tmp_path / "merged" / "tokenizer_config.json").read_text() == "{}"


def test_a_base_that_lacks_more_than_the_adapter_brings_is_refused(classifier: tuple, tmp_path: Path, capsys) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(classifier[0].parent / "model")
    state = {name: weight for name, weight in base.state_dict().items() if "pooler" not in name}
    base.save_pretrained(tmp_path / "base", state_dict=state)
    message = merge(capsys, classifier[0], tmp_path / "merged", "--base", tmp_path / "base")
    assert "nor the adapter has bert.pooler.dense.bias, bert.pooler.dense.weight" in message


@pytest.mark.long
def test_inputs_end_as_an_encoder_and_decoder_wants_them(tmp_path: Path, capsys) -> None:
    sizes = {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes |= {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 20}
    settings = BartConfig(**sizes, max_position_embeddings=32, pad_token_id=0, eos_token_id=1, forced_eos_token_id=None)
    BartForSequenceClassification(settings).save_pretrained(tmp_path / "model")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    trained(base, tmp_path / "adapter", "float32", task_type="SEQ_CLS", modules_to_save=["classification_head"])
    assert "merged in float32" in merge(capsys, tmp_path / "adapter", tmp_path / "merged")


def test_a_classifier_of_pictures_from_elsewhere(tmp_path: Path, capsys, caplog) -> None:
    """Its adapter has neither a task type nor a README of ours; the base has another number of classes."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = ViTConfig(image_size=8, patch_size=4, num_labels=7, **sizes)
    ViTForImageClassification(settings).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps({"size": 8}))
    base = AutoModelForImageClassification.from_pretrained(
        tmp_path / "model", num_labels=4, ignore_mismatched_sizes=True
    )
    heads = {"modules_to_save": ["classifier"], "exclude_modules": ["classifier"]}
    model = trained(base, tmp_path / "adapter", None, **heads)
    (tmp_path / "adapter" / "README.md").unlink(missing_ok=True)
    merge(capsys, tmp_path / "adapter", tmp_path / "merged")
    assert "does not say which base it belongs to" in caplog.text
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    pictures = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert difference(loaded(pictures).logits, model(pictures).logits) < 1e-5
    assert (tmp_path / "merged" / "preprocessor_config.json").exists()


def test_what_is_there_is_never_overwritten(classifier: tuple, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    assert "is there already: choose a new folder" in merge(capsys, classifier[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.long
def test_a_merge_that_fails_leaves_nothing(classifier: tuple, tmp_path: Path, capsys) -> None:
    """The second base has the configuration, and weights that make NaN."""
    assert "give --base" in merge(capsys, classifier[0], tmp_path / "merged", "--base", tmp_path / "nowhere")
    base = AutoModelForSequenceClassification.from_pretrained(classifier[0].parent / "model")
    torch.nn.init.constant_(base.bert.embeddings.LayerNorm.weight, torch.inf)
    base.save_pretrained(tmp_path / "base")
    assert "NaN" in merge(capsys, classifier[0], tmp_path / "merged", "--base", tmp_path / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


TYPES = {
    "float32": WeightType("float32"),
    "int8": WeightType("float32", "int8"),
    "nf4 computing in bfloat16": WeightType("bfloat16", "nf4"),
    "fp4-double computing in float16": WeightType("float16", "fp4", True),
    "bfloat16 and int8": WeightType("bfloat16", "int8"),  # some layers are not quantised
}


@pytest.mark.parametrize("text", TYPES)
def test_types_are_read_as_they_are_written(text: str) -> None:
    assert WeightType.parse(text) == TYPES[text]


@pytest.mark.parametrize("text", ["", "int4", "float32 and bfloat16", "nf4 and int8", "float32 computing in float32"])
def test_a_type_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="give --weights as float32"):
        WeightType.parse(text)
