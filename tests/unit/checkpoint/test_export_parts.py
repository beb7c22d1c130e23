"""What is exported is what was trained: the adapter on the untouched base gives the logits of the live model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import srlora_dist.layers.discovery
import srlora_dist.method.bound_model
import srlora_dist.method.switcher
from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.checkpoint.base_label import BaseLabel
from srlora_dist.checkpoint.export import export_checkpoint
from srlora_dist.checkpoint.format import find_checkpoint
from srlora_dist.layers.site import Site

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.randint(4, 40, (8, 6), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with tied embeddings, one without, a mixture, and an encoder without a head, as on the hub."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    options = {**SIZES, "num_key_value_heads": 2, "vocab_size": 40}
    for tied in (False, True):
        model = LlamaForCausalLM(LlamaConfig(**options, tie_word_embeddings=tied))
        model.save_pretrained(folder / ("tied" if tied else "decoder"))
    BertModel(BertConfig(**SIZES, vocab_size=40), add_pooling_layer=False).save_pretrained(folder / "encoder")
    mixture = {"num_local_experts": 2, "num_experts_per_tok": 2}
    MixtralForCausalLM(MixtralConfig(**options, **mixture)).save_pretrained(folder / "mixture")
    return folder


def train(
    model: nn.Module,
    tmp_path: Path,
    call: Callable[[nn.Module], Tensor],
    steps: int = 6,
    resume_from: Path | None = None,
    **options: object,
) -> Switcher:
    """A short run with switches; leaves the model in evaluation mode."""
    options = {"target_rank": 8, "svd_cache": str(tmp_path / "svd"), **options}
    switcher = Switcher(model, SRLoRAConfig(**options), 6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    switcher.bind(model, optimizer, resume_from)
    model.train()
    for _ in range(steps):
        call(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        switcher.step()
    model.eval()
    return switcher


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def difference(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def require_exact(
    switcher: Switcher, model: nn.Module, base: Callable[[], nn.Module], tmp_path: Path, call: Callable = logits
) -> None:
    """What is exported, by the Switcher and from a checkpoint, gives the live logits on the base; so does the merge."""
    switcher.export(tmp_path / "adapter")
    switcher.save_checkpoint(tmp_path / "checkpoints")
    export_checkpoint(find_checkpoint(tmp_path / "checkpoints"), tmp_path / "later")
    with torch.no_grad():
        expected = call(model)
        for folder in ("adapter", "later"):
            loaded = PeftModel.from_pretrained(base(), tmp_path / folder).eval()
            assert difference(call(loaded), expected) < 1e-5, folder
            assert difference(call(loaded.merge_and_unload()), expected) < 1e-5, folder


def load(folder: Path, rows: int | None = None) -> Callable[[], nn.Module]:
    def base() -> nn.Module:
        model = LlamaForCausalLM.from_pretrained(folder)
        if rows is not None:
            model.resize_token_embeddings(rows)
        return model

    return base


def lora(**options: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options})


@pytest.mark.long
@pytest.mark.parametrize("which", ["decoder", "tied"])
@pytest.mark.parametrize("more", ["nothing", "lm_head", "modules_to_save", "tokens"])
def test_resized_embeddings(folders: Path, tmp_path: Path, which: str, more: str, monkeypatch) -> None:
    """New rows are random, so another load of the base has others; offline PEFT would not have looked either."""
    if (which, more) == ("tied", "lm_head"):
        pytest.skip("a site whose weight is shared is refused")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = {
        "nothing": {},
        "lm_head": {"target_modules": ["q_proj", "lm_head"]},
        "modules_to_save": {"modules_to_save": ["embed_tokens"]},
        "tokens": {"trainable_token_indices": [41, 42]},
    }[more]
    base = load(folders / which, 44)
    model = get_peft_model(base(), lora(**options))
    with pytest.warns(UserWarning, match="beside the adapter the export will hold .*lm_head|embed_tokens"):
        switcher = train(model, tmp_path, logits)
    require_exact(switcher, model, base, tmp_path)


UNFROZEN = {
    "norms": ("decoder", lambda name: "norm" in name),
    "embeddings": ("decoder", lambda name: "embed" in name),
    "tied embeddings": ("tied", lambda name: "embed" in name),
    "output": ("decoder", lambda name: name.endswith("lm_head.weight")),
}


@pytest.mark.long
@pytest.mark.parametrize("what", UNFROZEN)
def test_what_is_unfrozen_after_get_peft_model(folders: Path, tmp_path: Path, what: str) -> None:
    which, is_unfrozen = UNFROZEN[what]
    base = load(folders / which)
    model = get_peft_model(base(), lora(target_modules=["q_proj", "up_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or is_unfrozen(name))
    with pytest.warns(UserWarning, match="beside the adapter the export will hold .*weight"):
        switcher = train(model, tmp_path, logits)
    require_exact(switcher, model, base, tmp_path)
    # A resumed run goes on from there, and an export holds what is frozen by then, too.
    again = get_peft_model(base(), lora(target_modules=["q_proj", "up_proj"]))
    for name, parameter in again.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or is_unfrozen(name))
    resumed = train(again, tmp_path, logits, 0, tmp_path / "checkpoints")
    assert torch.equal(logits(again), logits(model))
    again.requires_grad_(False)
    resumed.export(tmp_path / "frozen")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "frozen").eval()
    assert difference(logits(loaded), logits(model)) < 1e-5


def test_a_second_adapter_that_is_trained_is_refused(folders: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(folders / "decoder")(), lora())
    model.add_adapter("second", lora(target_modules=["v_proj"]))
    switcher = train(model, tmp_path, logits, 1)  # one that is not active is none of our business
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    layer.set_adapter(["default", "second"])
    message = r"'second' is trained beside 'default' in model.layers.1.self_attn.v_proj.*set_adapter\('default'\)"
    for wrong in (
        lambda: switcher.export(tmp_path / "adapter"),
        lambda: switcher.save_checkpoint(tmp_path / "checkpoints"),
        lambda: Switcher(model, SRLoRAConfig(target_rank=8), 6),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    assert not (tmp_path / "adapter").exists()
    layer.set_adapter("second")
    for factors in (layer.lora_A, layer.lora_B):
        factors["default"].requires_grad_(True)
    with pytest.raises(ValueError, match="'default' is not active in model.layers.1.self_attn.v_proj"):
        Switcher(model, SRLoRAConfig(target_rank=8), 6)
    layer.set_adapter(["default", "second"])
    for factors in (layer.lora_A, layer.lora_B):
        factors["second"].requires_grad_(False)
    with pytest.warns(UserWarning, match="'second' is active beside 'default' in .*v_proj and frozen"):
        switcher.export(tmp_path / "adapter")


@pytest.mark.long
@pytest.mark.parametrize("fusion", ["auto", "adapter"])
@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION", "SEQ_CLS"])
def test_a_head_that_no_checkpoint_holds(folders: Path, tmp_path: Path, task_type: str | None, fusion: str) -> None:
    """Its random start is another one at the next load, be it adapted, trained whole, or frozen like the pooler."""

    def base() -> nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(folders / "encoder", num_labels=8)

    model = get_peft_model(base(), lora(task_type=task_type))
    with pytest.warns(UserWarning, match=r"beside the adapter the export will hold .*pooler"):
        switcher = train(model, tmp_path, logits, fusion=fusion)
    assert difference(logits(base()), logits(base())) > 0.1
    require_exact(switcher, model, base, tmp_path)


@pytest.mark.long
def test_a_head_that_is_unfrozen(folders: Path, tmp_path: Path) -> None:
    def base() -> nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(folders / "encoder", num_labels=3)

    model = get_peft_model(base(), lora(task_type="FEATURE_EXTRACTION", target_modules=["query", "value"]))
    model.base_model.model.classifier.requires_grad_(True)
    switcher = train(model, tmp_path, logits)
    require_exact(switcher, model, base, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_exported_as_peft_does(folders: Path, tmp_path: Path, bias: str) -> None:
    def base() -> nn.Module:
        return BertModel.from_pretrained(folders / "encoder", add_pooling_layer=False)

    def states(model: nn.Module) -> Tensor:
        return model(input_ids=IDS).last_hidden_state

    model = get_peft_model(base(), lora(bias=bias, target_modules=["query", "value"]))
    switcher = train(model, tmp_path, lambda model: states(model) - 0.5)
    require_exact(switcher, model, base, tmp_path, states)


def test_a_base_that_is_gone_is_said(folders: Path, caplog) -> None:
    model = load(folders / "decoder")()
    model.config.name_or_path = "gone/from/here"
    Switcher(get_peft_model(model, lora()), SRLoRAConfig(target_rank=8), 6)
    assert "gone/from/here has no configuration on this machine" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("saved", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_that_are_trained_whole(folders: Path, tmp_path: Path, saved: list[str]) -> None:
    base = load(folders / "tied")
    options = {"target_modules": ["q_proj"], "modules_to_save": saved, "ensure_weight_tying": True}
    model = get_peft_model(base(), lora(**options))
    switcher = train(model, tmp_path, logits)
    require_exact(switcher, model, base, tmp_path)
    again = get_peft_model(base(), lora(**options))
    train(again, tmp_path, logits, 0, tmp_path / "checkpoints")
    assert torch.equal(logits(again), logits(model))


class Moving(nn.Module):
    """Statistics of a batch norm, and a buffer of its own that training moves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("still", torch.ones(3))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.scale.mul_(1.1)
        return self.last(self.norm(self.first(x))) * self.scale


def test_buffers_that_training_moves(tmp_path: Path, caplog) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return Moving()

    x = torch.randn(9, 12)
    model = get_peft_model(base(), lora(target_modules=["first", "last"]))
    with pytest.warns(UserWarning, match="the export will hold norm: .*statistics of a batch norm"):
        switcher = train(model, tmp_path, lambda model: model(x))
    require_exact(switcher, model, base, tmp_path, lambda model: model(x))
    assert "cache" not in caplog.text
    again = get_peft_model(base(), lora(target_modules=["first", "last"]))
    resumed = train(again, tmp_path, lambda model: model(x), 0, tmp_path / "checkpoints")
    assert torch.equal(again(x), model(x))
    model.base_model.model.cache += 1
    again.base_model.model.cache += 1
    resumed.export(tmp_path / "adapter")
    assert "base_model.model.cache moved in training, and no file can hold it" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("rslora", [False, True])
def test_layers_that_are_no_sites_keep_their_rank_and_scale(
    folders: Path, tmp_path: Path, rslora: bool, monkeypatch
) -> None:
    """Beside sites of scale 1 they are plain LoRA."""
    found = srlora_dist.layers.discovery.find_sites

    def some_sites(*args: object) -> list[Site]:
        return [site for site in found(*args) if "up_proj" not in site.name and "layers.1" in site.name]

    for module in (srlora_dist.method.switcher, srlora_dist.method.bound_model):
        monkeypatch.setattr(module, "find_sites", some_sites)
    base = load(folders / "decoder")
    ranks = {"rank_pattern": {"up_proj": 3, "q_proj": 2}, "alpha_pattern": {"v_proj": 1.5, "k_proj": 4}}
    model = get_peft_model(base(), lora(use_rslora=rslora, **ranks))
    switcher = train(model, tmp_path, logits)
    require_exact(switcher, model, base, tmp_path)


@pytest.mark.long
def test_expert_parameters_keep_their_rank_and_scale(folders: Path, tmp_path: Path) -> None:
    """PEFT wraps each parameter of the experts, one around the other, and looks their ranks up by parameter."""

    def base() -> nn.Module:
        return MixtralForCausalLM.from_pretrained(folders / "mixture")

    model = get_peft_model(base(), lora(r=2, lora_alpha=3))
    switcher = train(model, tmp_path, logits)
    assert [rank for rank, _ in switcher._parts.other_layers.values()] == [2, 2, 4] * 2  # router, down, gate and up
    require_exact(switcher, model, base, tmp_path)


@pytest.mark.long
def test_a_folder_of_live_pairs_does_not_load(folders: Path, tmp_path: Path, caplog) -> None:
    base = load(folders / "decoder")
    model = get_peft_model(base(), lora())
    model.save_pretrained(tmp_path / "before")
    switcher = train(model, tmp_path, logits)
    PeftModel.from_pretrained(base(), tmp_path / "before")
    model.save_pretrained(tmp_path / "adapter")
    assert "switcher.export(folder)" in caplog.text
    with pytest.raises(ValueError, match="adapter_config.json"):
        PeftModel.from_pretrained(base(), tmp_path / "adapter")
    # The mark goes where a whole adapter comes, and harms nothing else.
    require_exact(switcher, model, base, tmp_path)
    assert not list((tmp_path / "adapter").glob("*ive_pairs*"))
    model.add_adapter("other", lora(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter", selected_adapters=["other"])
    PeftModel.from_pretrained(base(), tmp_path / "adapter")
    PeftModel.from_pretrained(base(), tmp_path / "adapter" / "other")
    model.save_pretrained(str(tmp_path / "not_main"), True, None, "auto", False)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    twin.save_pretrained(tmp_path / "twin")
    assert (tmp_path / "twin" / "LIVE_PAIRS.md").exists()
    twin.delete_adapter("default")
    twin.save_pretrained(tmp_path / "second")
    PeftModel.from_pretrained(base(), tmp_path / "second" / "other")


@pytest.mark.long
def test_an_adapter_says_which_base_it_belongs_to(folders: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(folders / "decoder")().bfloat16(), lora())
    switcher = train(model, tmp_path, logits)
    switcher.export(tmp_path / "adapter")
    label = BaseLabel.read(tmp_path / "adapter" / "adapter_model.safetensors")
    assert label.weights == "bfloat16"
    assert len(label.digests) == len(switcher.sites)
    assert label.differing(load(folders / "decoder")().bfloat16()) == []
    other = load(folders / "decoder")().bfloat16()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 2] += 0.01
    assert label.differing(other) == ["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("way", ["eva", "gaussian", True])
def test_a_start_of_its_own_that_is_overwritten_is_said(folders: Path, way: object, recwarn) -> None:
    model = get_peft_model(load(folders / "decoder")(), lora(init_lora_weights=way))
    Switcher(model, SRLoRAConfig(target_rank=8), 6)
    said = [str(one.message) for one in recwarn if "init_lora_weights is 'eva', and switch 0" in str(one.message)]
    assert len(said) == (way == "eva")
