# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""`add_weighted_adapter`: what each combination promises of the product BA, the magnitude, the bias and the config."""

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, PeftWarning, get_peft_model
from peft.utils.merge_utils import ties

WEIGHTS = [0.7, -0.4]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.a = nn.Linear(8, 16)
        self.b = nn.Linear(16, 8)
        self.conv = nn.Conv1d(8, 6, 3)

    def forward(self, ids):
        x = self.emb(ids)
        y = self.b(torch.relu(self.a(x)))
        return y.sum() + self.conv(x.transpose(1, 2)).sum()


def model_with(*settings, targets=("a", "b")):
    torch.manual_seed(0)
    model = None
    for number, extra in enumerate(settings):
        config = LoraConfig(
            **{"r": 2, "lora_alpha": 8, "target_modules": list(targets), "init_lora_weights": False, **extra}
        )
        if model is None:
            model = get_peft_model(Net(), config, adapter_name="ad0")
        else:
            model.add_adapter(f"ad{number}", config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(
                    torch.rand_like(parameter) + 0.1 if "magnitude" in name else torch.randn_like(parameter)
                )
    return model


def mix(model, weights=WEIGHTS, **options):
    model.add_weighted_adapter([f"ad{i}" for i in range(len(weights))], weights, "mix", **options)
    return {name: getattr(model.base_model.model, name) for name in ("emb", "a", "b", "conv")}


def weighted_delta(layer, weights=WEIGHTS):
    return sum(w * layer.get_delta_weight(f"ad{i}") for i, w in enumerate(weights) if layer.has_adapter(f"ad{i}"))


@pytest.mark.parametrize("settings", [({}, {"r": 3}), ({"rank_pattern": {"a": 3}}, {"rank_pattern": {"b": 4}})])
def test_cat_is_the_exact_sum_with_any_ranks(settings):
    layers = mix(model_with(*settings, targets=("a", "b", "emb", "conv")), combination_type="cat")
    for layer in layers.values():
        torch.testing.assert_close(layer.get_delta_weight("mix"), weighted_delta(layer), atol=1e-4, rtol=1e-4)
        assert layer.r["mix"] == layer.r["ad0"] + layer.r["ad1"]
        assert layer.scaling["mix"] == 1.0


@pytest.mark.parametrize("target", ["a", "emb", "conv"])
def test_svd_of_full_rank_is_the_exact_sum(target):
    layer = mix(model_with({}, {}, targets=(target,)), combination_type="svd", svd_rank=4)[target]
    torch.testing.assert_close(layer.get_delta_weight("mix"), weighted_delta(layer), atol=1e-4, rtol=1e-4)


def test_svd_keeps_the_largest_rank_and_its_best_approximation():
    layer = mix(model_with({}, {"r": 3}))["a"]
    exact = weighted_delta(layer)
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    assert layer.r["mix"] == 3
    torch.testing.assert_close(layer.get_delta_weight("mix"), u[:, :3] * s[:3] @ vh[:3], atol=1e-4, rtol=1e-4)


def test_linear_adds_up_factors_by_the_roots_of_the_weights():
    layer = mix(model_with({}, {}), combination_type="linear")["a"]
    (a0, b0), (a1, b1), (a, b) = (layer.factors(name) for name in ("ad0", "ad1", "mix"))
    torch.testing.assert_close(a, (0.7 * 4) ** 0.5 * a0 - (0.4 * 4) ** 0.5 * a1)
    torch.testing.assert_close(b, (0.7 * 4) ** 0.5 * b0 + (0.4 * 4) ** 0.5 * b1)


@pytest.mark.parametrize("combination_type", ["dare_linear", "magnitude_prune"])
@pytest.mark.parametrize("suffix", ["", "_svd"])
def test_full_density_prunes_nothing(combination_type, suffix):
    layer = mix(
        model_with({}, {}), weights=[0.7, 0.0], combination_type=combination_type + suffix, density=1.0, svd_rank=4
    )["a"]
    torch.testing.assert_close(layer.get_delta_weight("mix"), weighted_delta(layer, [0.7, 0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_ties_elects_signs_in_both_factors(method):
    model = model_with({}, {})
    layer = mix(model, combination_type="ties", density=0.5, majority_sign_method=method)["a"]
    names, roots = ("ad0", "ad1"), torch.tensor([(0.7 * 4) ** 0.5, (0.4 * 4) ** 0.5])
    (a0, b0), (a1, b1), (a, b) = (layer.factors(name) for name in (*names, "mix"))
    torch.testing.assert_close(a, ties([a0, a1], roots * torch.tensor([1.0, -1.0]), 0.5, method))
    torch.testing.assert_close(b, ties([b0, b1], roots, 0.5, method))


@pytest.mark.parametrize("combination_type", ["linear", "svd", "cat", "ties"])
def test_one_adapter_is_copied_and_scaled(combination_type):
    options = {"density": 0.5} if combination_type == "ties" else {}
    layer = mix(model_with({"use_dora": True}), weights=[1.0], combination_type=combination_type, **options)["a"]
    torch.testing.assert_close(layer.get_delta_weight("mix"), layer.get_delta_weight("ad0"))
    magnitudes = layer.lora_magnitude_vector
    torch.testing.assert_close(magnitudes["mix"].weight, magnitudes["ad0"].weight)


@pytest.mark.parametrize("combination_type", ["linear", "svd", "cat", "dare_ties_svd"])
def test_magnitudes_add_up_as_changes_of_the_norm(combination_type):
    layers = mix(model_with({"use_dora": True}, {"use_dora": True}), combination_type=combination_type, density=0.5)
    for layer in (layers["a"], layers["b"]):
        norm = layer.get_base_layer().weight.norm(dim=1)
        first, second, both = (layer.lora_magnitude_vector[name].weight for name in ("ad0", "ad1", "mix"))
        torch.testing.assert_close(both, norm + 0.7 * (first - norm) - 0.4 * (second - norm))


def test_a_plain_adapter_counts_with_the_norm_that_it_gives():
    model = model_with({}, {"use_dora": True})
    layer = mix(model, weights=[1.0, 0.0], combination_type="cat")["a"]
    expected = (layer.get_base_layer().weight + layer.get_delta_weight("ad0")).norm(dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector["mix"].weight, expected)
    assert model.peft_config["mix"].use_dora


def test_biases_add_up():
    layer = mix(model_with({"lora_bias": True}, {"lora_bias": True}), combination_type="cat")["a"]
    expected = sum(w * layer.scaling[n] * layer.lora_B[n].bias for w, n in zip(WEIGHTS, ["ad0", "ad1"], strict=True))
    torch.testing.assert_close(layer.lora_B["mix"].bias, expected)


def test_svd_clamp_bounds_the_entries():
    a, b = mix(model_with({}, {}), svd_clamp=0.9)["a"].factors("mix")
    u, s, vh = torch.linalg.svd(weighted_delta(mix(model_with({}, {}))["a"]))
    largest = torch.quantile(torch.cat([(u[:, :2] * s[:2]).flatten(), vh[:2].flatten()]), 0.9)
    torch.testing.assert_close(b.max(), largest)


def test_a_module_that_one_adapter_lacks_takes_the_other_alone():
    layers = mix(model_with({}, {"target_modules": ["a"]}), combination_type="cat")
    torch.testing.assert_close(layers["b"].get_delta_weight("mix"), 0.7 * layers["b"].get_delta_weight("ad0"))
    assert layers["b"].r["mix"] == 2
    assert layers["a"].r["mix"] == 4


def test_the_combination_can_be_saved_and_loaded(tmp_path):
    model = model_with({"rank_pattern": {"a": 3}}, {"r": 4})
    mix(model, combination_type="cat")
    model.set_adapter("mix")
    ids = torch.arange(8).reshape(2, 4)
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "mix").eval()
    torch.testing.assert_close(loaded(ids), model.eval()(ids), rtol=1e-5, atol=1e-4)


def test_only_the_active_adapter_stays_active_and_trainable():
    model = model_with({}, {})
    layer = mix(model)["a"]
    assert model.active_adapters == ["ad0"]
    assert layer.lora_A["ad0"].weight.requires_grad
    assert not layer.lora_A["mix"].weight.requires_grad


def test_the_module_that_one_adapter_saves_is_kept():
    model = model_with({"target_modules": ["a"], "modules_to_save": ["b"]}, {"target_modules": ["a"]})
    model.base_model.model.b.modules_to_save["ad0"].weight.data.fill_(0.5)
    mix(model)
    assert (model.base_model.model.b.modules_to_save["mix"].weight == 0.5).all()


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (({}, {"r": 3}), {"combination_type": "linear"}, "ranks 2, 3 in a"),
        (({}, {}), {"combination_type": "bogus"}, "bogus"),
        (({}, {}), {"combination_type": "ties"}, "density"),
        (({}, {}), {"weights": [0.7, 0.2, 0.1]}, "ad2"),
        (({"target_modules": "a|b"}, {}), {}, "regular expression"),
        (({"modules_to_save": ["conv"]}, {"modules_to_save": ["conv"]}), {}, "modules_to_save"),
    ],
)
def test_what_cannot_be_combined_says_why_and_leaves_nothing(settings, options, message):
    model = model_with(*settings)
    with pytest.raises(ValueError, match=message):
        mix(model, **options)
    assert "mix" not in model.peft_config
    assert not model.base_model.model.a.has_adapter("mix")


def test_weights_and_adapters_must_be_as_many():
    with pytest.raises(ValueError, match="1 weights"):
        model_with({}, {}).add_weighted_adapter(["ad0", "ad1"], [1.0], "mix")
    with pytest.raises(ValueError, match="empty"):
        model_with({}, {}).add_weighted_adapter([], [], "mix")


def test_an_existing_name_is_left_alone_with_a_warning():
    model = model_with({}, {})
    before = model.base_model.model.a.get_delta_weight("ad1")
    with pytest.warns(PeftWarning, match="ad1"):
        model.add_weighted_adapter(["ad0"], [1.0], "ad1")
    torch.testing.assert_close(model.base_model.model.a.get_delta_weight("ad1"), before)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_mutated_start_can_be_saved_for_the_unchanged_weight(tmp_path, kind):
    torch.manual_seed(0)
    net = Net()
    original = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["a", "b"], init_lora_weights=kind)
    model = get_peft_model(net, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.1).add_(0.05)
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ids = torch.arange(8).reshape(2, 4)
    expected = model.eval()(ids)
    plain = Net()
    plain.load_state_dict(original)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "end").eval()
    assert loaded.peft_config["default"].r == 4
    torch.testing.assert_close(loaded(ids), expected, rtol=1e-4, atol=1e-4)
