"""The door: refusals with remedies, ledger and export over many switches, what a switch leaves alone."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import srlora_dist.checkpoint.ledger_files
from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.checkpoint.ledger import Ledger
from srlora_dist.method.budget import window_length
from tests.ranks.engines import Net, make_batch, make_net


def bound(tmp_path, model=None, steps: int = 20, optimizer=None, **options):
    model = make_net() if model is None else model
    switcher = Switcher(model, SRLoRAConfig(svd_cache=str(tmp_path / "svd"), **options), steps)
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    switcher.bind(model, optimizer)
    return model, optimizer, switcher


def take_steps(model, optimizer, switcher, count: int) -> list:
    reports = []
    for step in range(count):
        x, y = make_batch(step)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        reports.append(switcher.step())
    return [report for report in reports if report is not None]


def wide_net(shape: tuple[int, int], rank: int) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(shape[1], shape[0]), nn.Tanh(), nn.Linear(shape[0], 3))
    return get_peft_model(net, LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]))


def unfrozen(model: nn.Module, name: str = "base_layer", trains: bool = True) -> nn.Module:
    for key, parameter in model.named_parameters():
        if f"first.{name}" in key and "weight" in key:
            parameter.requires_grad_(trains)
    return model


def merged(model: nn.Module) -> nn.Module:
    model.merge_adapter()
    return model


BAD_MODELS = {
    "not a PEFT model": (lambda: Net(), "no LoRA layers"),
    "dropout": (lambda: make_net(lora_dropout=0.1), "dropout.*first.*lora_dropout=0"),
    "DoRA": (lambda: make_net(use_dora=True), "DoRA.*use_dora=False"),
    "LoRA bias": (lambda: make_net(lora_bias=True), "lora_bias=False"),
    "float64": (lambda: make_net().double(), "first is stored as torch.float64.*float32, bfloat16, float16"),
    "rank above the target": (lambda: make_net(rank=9), "target_rank 8 is below the LoRA rank of first .r=9."),
    "trainable W": (lambda: unfrozen(make_net()), "trainable pretrained weight: first; freeze it"),
    "frozen A": (lambda: unfrozen(make_net(), "lora_A", False), "frozen A or B: first"),
    "scale": (lambda: make_net(alpha=-1), "scale of 0 or less.*lora_alpha above 0"),
    "merged": (lambda: merged(make_net()), "is merged"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_model_that_cannot_be_worked_on_is_refused(name: str) -> None:
    make, message = BAD_MODELS[name]
    with pytest.raises(ValueError, match=message):
        Switcher(make(), SRLoRAConfig(target_rank=8), 100)


def test_a_shared_weight_is_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    net[1].weight = net[0].weight
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="shares its weight with others: 0"):
        Switcher(model, SRLoRAConfig(target_rank=4), 100)


def test_an_adapter_in_use_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="first is not freshly initialised"):
        bound(tmp_path, make_net(init_lora_weights=False), target_rank=6)


def test_another_adapter_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'other', but the model has \['default'\]"):
        Switcher(make_net(), SRLoRAConfig(adapter_name="other"), 100)


@pytest.mark.parametrize(
    "options",
    [
        {"fusion_ratio": 0},
        {"fusion_ratio": 1.1},
        {"beta1": 1},
        {"beta2": -0.1},
        {"target_rank": 0},
        {"score_reset": "none"},
        {"importance_window": 0},
        {"importance_window": "some"},
        {"optimizer_reset": "zeros"},
        {"fusion": "merge"},
        {"fused_rank": 0},
        {"residual_device": "disk"},
    ],
)
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SRLoRAConfig(**options)


def test_a_small_matrix_clamps_its_target_with_one_warning(tmp_path) -> None:
    with pytest.warns(UserWarning, match=r"clamped: first \(17, 13\): 13; second \(11, 17\): 11") as caught:
        _, _, switcher = bound(tmp_path, target_rank=40)
    assert len([w for w in caught if "clamped" in str(w.message)]) == 1
    assert [site.state.target_rank for site in switcher.sites] == [13, 11]


@pytest.mark.filterwarnings("ignore:srlora.target_rank")
def test_directions_that_run_out_end_the_switches_not_the_training(tmp_path, caplog) -> None:
    model, optimizer, switcher = bound(tmp_path, steps=40, target_rank=30, fusion_ratio=0.25)
    with caplog.at_level(logging.INFO):
        reports = take_steps(model, optimizer, switcher, 40)
    assert [site.state.num_taken for site in switcher.sites] == [12, 11]  # the ninth switch would fall on the end
    assert [part.site for part in reports[-1].sites] == ["first"]  # only the larger one had a direction to give
    assert "second took the last directions; 1 of 2 sites have none left" in caplog.text
    assert switcher.num_steps == 40


@pytest.mark.filterwarnings("ignore:srlora.target_rank")
def test_a_rank_above_the_matrix_keeps_the_surplus_pairs_as_plain_lora(tmp_path) -> None:
    model, x = wide_net((3, 20), rank=5), torch.randn(7, 20)
    before = model(x)
    with pytest.raises(ValueError, match="below"):
        Switcher(model, SRLoRAConfig(target_rank=4), 10)
    _, _, switcher = bound(tmp_path, model, target_rank=5)
    assert switcher.sites[0].state.held == [0, 1, 2, -1, -1]
    assert switcher.due_steps == []
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize(
    ("options", "scale"), [({"lora_alpha": 3}, 0.75), ({"lora_alpha": 8, "use_rslora": True}, 4.0)]
)
def test_any_lora_scale_keeps_the_function_and_exports(tmp_path, options: dict, scale: float) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        Net(), LoraConfig(r=4, target_modules=["first", "second"], modules_to_save=["head"], **options)
    )
    x, _ = make_batch(99)
    before = model(x).detach()
    model, optimizer, switcher = bound(tmp_path, model, target_rank=10, fusion_ratio=0.25)
    assert switcher.sites[0].scale == scale
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert len(take_steps(model, optimizer, switcher, 20)) == 5
    switcher.export(tmp_path / "adapter")
    torch.manual_seed(0)
    torch.testing.assert_close(
        PeftModel.from_pretrained(Net(), tmp_path / "adapter")(x), model(x), rtol=1e-4, atol=1e-5
    )


def test_a_truncated_export_logs_its_error_and_gets_better_with_rank(tmp_path, caplog) -> None:
    model, optimizer, switcher = bound(tmp_path, target_rank=10)
    take_steps(model, optimizer, switcher, 20)
    x, _ = make_batch(99)
    errors = []
    for rank in (1, 6, 13):
        with caplog.at_level(logging.INFO):
            switcher.export(tmp_path / f"adapter-{rank}", max_rank=rank)
        torch.manual_seed(0)
        exported = PeftModel.from_pretrained(Net(), tmp_path / f"adapter-{rank}")
        assert max(exported.peft_config["default"].rank_pattern.values(), default=rank) <= rank
        errors.append((exported(x) - model(x)).norm().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4  # the smaller side of the larger matrix is 13
    assert "first: truncated to rank 6, relative error" in caplog.text
    assert "export to rank 1: relative error of the change of W" in caplog.text


@pytest.mark.long
def test_w_equals_w0_plus_ledger_after_500_switches(tmp_path) -> None:
    torch.manual_seed(1)
    model = wide_net((530, 510), rank=2)
    start = model.base_model.model[0].base_layer.weight.detach().double()
    switcher = Switcher(
        model, SRLoRAConfig(target_rank=503, svd_cache=str(tmp_path), ledger_dir=str(tmp_path / "l")), 502
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    switcher.bind(model, optimizer)
    x, y = torch.randn(4, 510), torch.randn(4, 3)
    outputs = []
    for _ in range(501):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        before = model(x).detach()
        if switcher.step() is not None:
            outputs.append(((model(x) - before).norm() / before.norm()).item())
    assert switcher.num_switches == 501
    assert len(outputs) == 500
    assert max(outputs) < 1e-5
    left, right = switcher.ledger.factors(["0"])["0"]
    expected = start + switcher.sites[0].scale * left.double() @ right.double()
    weight = model.base_model.model[0].base_layer.weight
    assert float((weight - expected).norm() / expected.norm()) < 1e-6
    assert len(list((tmp_path / "l").glob("switch-*.safetensors"))) == 501


def test_a_ledger_folder_in_use_is_refused(tmp_path) -> None:
    (tmp_path / "switch-00000.safetensors").touch()
    with pytest.raises(ValueError, match="ledger of another run"):
        Ledger(tmp_path)


@pytest.mark.parametrize(("reset", "first", "second"), [("zero", 0, 0), ("first_moment", 0, 1), ("keep", 1, 1)])
def test_a_switch_resets_the_chosen_slots_only(tmp_path, reset: str, first: int, second: int) -> None:
    model, optimizer, switcher = bound(
        tmp_path, target_rank=8, optimizer_reset=reset, score_reset="restarted", steps=16
    )
    take_steps(model, optimizer, switcher, switcher.due_steps[0] - 1)
    x, y = make_batch(50)
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()
    site = switcher.sites[0]
    state = {key: optimizer.state[site.lora_a][key].clone() for key in ("exp_avg", "exp_avg_sq")}
    factors = site.lora_a.detach().clone(), site.lora_b.detach().clone()
    head = optimizer.state[model.base_model.model.head.modules_to_save["default"].weight]["exp_avg"].clone()
    scores = switcher.statistics.of(switcher.storage.tracked[0], "mean").view(4, -1).clone()
    report = switcher.step()
    chosen = report.sites[0].slots
    others = [slot for slot in range(4) if slot not in chosen]
    for key, kept in (("exp_avg", first), ("exp_avg_sq", second)):
        now = optimizer.state[site.lora_a][key]
        assert torch.equal(now[others], state[key][others])
        assert torch.equal(now[chosen], state[key][chosen] * kept)
    assert torch.equal(site.lora_a[others], factors[0][others])
    assert torch.equal(site.lora_b[:, others], factors[1][:, others])
    assert not torch.equal(site.lora_a[chosen], factors[0][chosen])
    assert torch.equal(optimizer.state[model.base_model.model.head.modules_to_save["default"].weight]["exp_avg"], head)
    now = switcher.statistics.of(switcher.storage.tracked[0], "mean").view(4, -1)
    assert torch.equal(now[others], scores[others])
    assert not now[chosen].any()


def test_an_optimizer_without_the_pairs_is_refused(tmp_path) -> None:
    model = make_net()
    head = model.base_model.model.head.modules_to_save["default"]
    with pytest.raises(ValueError, match="does not hold the LoRA parameters of first"):
        bound(tmp_path, model, optimizer=torch.optim.AdamW(head.parameters()), target_rank=8)


def test_binding_another_model_is_refused(tmp_path) -> None:
    switcher = Switcher(make_net(), SRLoRAConfig(target_rank=8, svd_cache=str(tmp_path)), 20)
    other = wide_net((30, 20), rank=4)
    with pytest.raises(ValueError, match="another model than"):
        switcher.bind(other, torch.optim.AdamW(other.parameters()))


def test_a_forgotten_bind_is_noticed(tmp_path) -> None:
    switcher = Switcher(make_net(), SRLoRAConfig(target_rank=8), 20)
    for forgotten in (switcher.step, lambda: switcher.export(tmp_path)):
        with pytest.raises(RuntimeError, match="switcher.bind"):
            forgotten()


def test_a_run_longer_than_planned_warns_once(tmp_path, caplog) -> None:
    model, optimizer, switcher = bound(tmp_path, target_rank=8, steps=4)
    take_steps(model, optimizer, switcher, 7)
    assert caplog.text.count("this is step 5 of 4") == 1


@pytest.mark.parametrize("options", [{}, {"task_type": "FEATURE_EXTRACTION"}])
def test_a_new_head_that_is_adapted_is_exported(tmp_path, options: dict) -> None:
    def base() -> nn.Module:
        net = nn.Sequential()
        net.classifier = nn.Linear(13, 3)  # another one each time
        return net

    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["classifier"], **options))
    with pytest.warns(UserWarning, match=r"the export will hold classifier\..*not in the checkpoint"):
        model, optimizer, switcher = bound(tmp_path, model, target_rank=3)
    take_steps(model.base_model, optimizer, switcher, 20)  # PEFT's wrapper wants tokens for this type of task
    switcher.export(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    x, _ = make_batch(0)
    torch.testing.assert_close(loaded.base_model(x), model.base_model(x), rtol=1e-5, atol=1e-5)


def test_what_is_trained_around_the_peft_model_warns() -> None:
    net = nn.Sequential(make_net())
    net.head = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match=r"head.weight, head.bias is trained outside of the PEFT model"):
        Switcher(net, SRLoRAConfig(target_rank=8), 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Switcher(nn.Sequential(make_net()), SRLoRAConfig(target_rank=8), 20)


class DTensor(nn.Parameter):
    """What tensor parallelism makes of a weight, in as far as it is told from a whole one."""

    def to_local(self) -> torch.Tensor:
        return self.data


ELSEWHERE = {
    "tensor parallelism": (
        lambda weight: DTensor(weight.data, requires_grad=False),
        "first is cut by tensor parallelism",
    ),
    "offload": (
        lambda weight: nn.Parameter(weight.to("meta"), requires_grad=False),
        "first is on meta, where a device_map",
    ),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_weight_that_is_not_here_whole_is_refused(name: str, tmp_path) -> None:
    move, message = ELSEWHERE[name]
    model = make_net()
    layer = model.base_model.model.first.base_layer
    layer.weight = move(layer.weight)
    with pytest.raises(ValueError, match=message):
        bound(tmp_path, model, target_rank=8)


def test_a_forgotten_step_is_noticed(tmp_path) -> None:
    model, optimizer, switcher = bound(tmp_path, target_rank=8)
    model(make_batch(0)[0]).square().mean().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="after every optimizer.step"):
        optimizer.step()


def test_a_ledger_entry_is_there_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    def half(tensors: dict, path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(srlora_dist.checkpoint.ledger_files, "save_file", half)
    with pytest.raises(ValueError, match="cannot append switch 0 to the ledger: no space left"):
        bound(tmp_path, target_rank=8, ledger_dir=str(tmp_path / "ledger"))
    assert not list((tmp_path / "ledger").glob("*.safetensors"))


@pytest.mark.parametrize("rank", [0, -1])
def test_a_truncation_to_nothing_is_refused(tmp_path, rank: int) -> None:
    _, _, switcher = bound(tmp_path, target_rank=8)
    with pytest.raises(ValueError, match=f"max_rank is {rank}"):
        switcher.export(tmp_path / "adapter", max_rank=rank)


def test_an_export_without_its_ledger_names_it(tmp_path) -> None:
    _, _, switcher = bound(tmp_path, target_rank=8, ledger_dir=str(tmp_path / "ledger"))
    for path in (tmp_path / "ledger").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="ledger .*ledger has no entry for first"):
        switcher.export(tmp_path / "adapter")


def test_a_module_with_buffers_is_exported_whole(tmp_path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(13, 8), nn.BatchNorm1d(8))

    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    x = torch.randn(9, 13)
    model(x)  # moves the running statistics
    _, _, switcher = bound(tmp_path, model, target_rank=4)
    switcher.export(tmp_path / "adapter")
    exported = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    torch.testing.assert_close(exported(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_a_switch_is_exact_where_training_multiplies_in_lower_precision(tmp_path) -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        model = wide_net((512, 384), rank=16)
        start = model.base_model.model[0].base_layer.weight.detach().clone()
        _, _, switcher = bound(tmp_path, model, target_rank=16)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    left, right = switcher.ledger.factors(["0"])["0"]
    change = switcher.sites[0].scale * left.double() @ right.double()
    assert (model.base_model.model[0].base_layer.weight - start - change).norm() < 1e-5 * change.norm()


def test_a_step_that_does_not_happen_counts_for_nothing(tmp_path) -> None:
    model, optimizer, switcher = bound(tmp_path, target_rank=8)
    for _ in range(30):
        assert switcher.step() is None
    assert switcher.num_steps == 0
    take_steps(model, optimizer, switcher, 3)
    assert switcher.num_steps == 3


@pytest.mark.long
@pytest.mark.parametrize("reset", ["all", "restarted"])
def test_a_window_makes_the_choices_of_all_steps(tmp_path, reset: str) -> None:
    """Over a long run, in which about half of the steps are not observed."""
    length, options = window_length("auto", 0.7, 0.7), {"beta1": 0.7, "beta2": 0.7, "score_reset": reset}
    seen = {}
    for window in ("all", "auto", 10):
        options |= {"target_rank": 11, "fusion_ratio": 0.25, "importance_window": window}
        model, optimizer, switcher = bound(tmp_path, steps=630, **options)
        observed, observe = [], switcher.statistics.observe_

        def note(owners: list, observed=observed, switcher=switcher, observe=observe) -> None:
            observed.append(switcher.num_steps)
            observe(owners)

        switcher.statistics.observe_ = note
        reports = take_steps(model, optimizer, switcher, 630)
        choices = [(part.site, part.slots) for report in reports for part in report.sites]
        seen[window] = choices, observed, [s for report in reports for part in report.sites for s in part.scores]
    due = switcher.due_steps
    assert len(due) >= 5
    assert seen["all"][1] == list(range(due[-1]))
    assert due[0] > 1.5 * length
    for window, most in (("auto", length), (10, 10)):
        assert seen[window][1] == [step for step in range(due[-1]) if min(d for d in due if d > step) - step <= most]
    assert seen["auto"][0] == seen["all"][0]
    torch.testing.assert_close(torch.tensor(seen["auto"][2]), torch.tensor(seen["all"][2]), rtol=1e-5, atol=0)
    assert seen[10][2] != seen["all"][2]


def test_a_window_as_long_as_the_interval_forgets_nothing(tmp_path) -> None:
    scores = {}
    for window in ("all", 4, 9):  # switches after steps 6 and 13
        model, optimizer, switcher = bound(
            tmp_path, target_rank=10, steps=20, importance_window=window, score_reset="restarted"
        )
        reports = take_steps(model, optimizer, switcher, 20)
        scores[window] = [score for report in reports for part in report.sites for score in part.scores]
    assert scores[9] == scores["all"]
    assert scores[4] != scores["all"]


def test_only_the_steps_of_a_window_count(tmp_path) -> None:
    """The scores of a switch from the last 4 steps alone, by the formulas, also of pairs that outlive a switch."""
    model, optimizer, switcher = bound(
        tmp_path, target_rank=10, steps=20, importance_window=4, score_reset="restarted", beta1=0.9, beta2=0.8
    )
    observe, seen = switcher.statistics.observe_, []
    factors = [run.owner for run in switcher.storage.tracked if run.site == 0]

    def note(owners: list) -> None:
        seen.append([(factor.detach() * factor.grad).abs() for factor in factors])
        observe(owners)

    switcher.statistics.observe_ = note
    for switch in range(2):
        del seen[:]
        (report,) = take_steps(model, optimizer, switcher, switcher.due_steps[switch] - switcher.num_steps)
        assert len(seen) == 4
        score = 0
        for j, factor in enumerate(factors):
            mean = deviation = torch.zeros_like(factor)
            for sensitivities in seen:
                mean = 0.9 * mean + 0.1 * sensitivities[j]
                deviation = 0.8 * deviation + 0.2 * (sensitivities[j] - mean).abs()
            score = score + (mean * deviation).mean(1 if factor.shape[0] == 4 else 0)
        torch.testing.assert_close(torch.tensor(report.sites[0].scores), score.detach(), rtol=1e-4, atol=0)
