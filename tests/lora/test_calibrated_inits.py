# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Starts that look at data first: CorDA's covariances and LoRA-GA's gradients, and what the adapters make of them."""

import pytest
import torch
from torch import nn

from peft import LoraConfig, LoraGAConfig, PeftWarning, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(8, 16)
        self.b = nn.Linear(16, 12)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def data():
    torch.manual_seed(1)
    return torch.randn(40, 8), torch.randn(40, 12)


def corda_config(**settings):
    return LoraConfig(
        r=2,
        lora_alpha=8,
        target_modules=["a", "b"],
        rank_pattern={"b": 3},
        init_lora_weights="corda",
        corda_config=CordaConfig(**settings),
    )


def run(net):
    x, _ = data()

    def forward():
        for part in x.chunk(2):
            net(part)

    return forward


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_starts_from_the_weight_times_the_covariance(method):
    net, x = Net(), data()[0]
    before, old = net(x).detach(), net.a.weight.detach().clone()
    config = corda_config(corda_method=method, prune_temporary_fields=False)
    preprocess_corda(net, config, run(net))
    c = net.a.covariance_matrix
    c = c + 0.01 * c.diagonal().mean() * torch.eye(8)
    model = get_peft_model(net, config)
    layer = model.base_model.model.a
    u, s, vt = torch.linalg.svd(old @ c, full_matrices=False)
    taken = slice(0, 2) if method == "ipm" else slice(6, 8)
    expected = u[:, taken] * s[taken] @ vt[taken] @ torch.linalg.inv(c)
    torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert not hasattr(layer.base_layer, "eigens")


def test_corda_covariance_is_the_mean_over_calls():
    net, x = Net(), data()[0]
    preprocess_corda(net, corda_config(prune_temporary_fields=False), run(net))
    expected = sum(part.t() @ part / part.max() ** 2 for part in x.chunk(2)) / 2
    torch.testing.assert_close(net.a.covariance_matrix, expected)
    pruned = Net()
    preprocess_corda(pruned, corda_config(), run(pruned))
    assert not hasattr(pruned.a, "covariance_matrix")
    assert pruned.b.eigens.S_WC.shape == (3,)


def test_corda_files_stand_in_for_running_the_model(tmp_path):
    cache, covariance = str(tmp_path / "cache.pt"), str(tmp_path / "covariance.pt")
    first = Net()
    preprocess_corda(first, corda_config(cache_file=cache, covariance_file=covariance), run(first))
    for settings in ({"cache_file": cache}, {"covariance_file": covariance}):
        again = Net()
        preprocess_corda(again, corda_config(**settings))
        torch.testing.assert_close(again.b.eigens.V_WC, first.b.eigens.V_WC)


def test_corda_survives_inputs_that_do_not_span_the_space():
    net = Net()
    preprocess_corda(net, corda_config(), lambda: net(data()[0] * torch.tensor([1.0] * 4 + [0.0] * 4)))
    assert torch.isfinite(net.a.eigens.V_WC).all()


@pytest.mark.parametrize(
    ("config", "forward", "message"),
    [
        (corda_config(), None, "run_model is missing"),
        (corda_config(), lambda: None, "did not call a"),
        (corda_config(corda_method="other"), None, "other"),
    ],
)
def test_corda_says_what_is_missing(config, forward, message):
    with pytest.raises(ValueError, match=message):
        preprocess_corda(Net(), config, forward)


def ga_config(**settings):
    return LoraConfig(
        r=2,
        lora_alpha=8,
        target_modules=["a", "b"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(**settings),
    )


def step(net):
    x, target = data()

    def backward():
        for part, wanted in zip(x.chunk(2), target.chunk(2), strict=True):
            (net(part) - wanted).square().mean().backward()

    return backward


def test_lora_ga_averages_gradients_and_leaves_flags_and_grads_alone(tmp_path):
    net = Net()
    net.b.weight.requires_grad_(False)
    net.a.bias.grad = torch.ones(16)
    cache = str(tmp_path / "gradients.pt")
    preprocess_loraga(net, ga_config(), step(net), cache_file=cache)
    other = Net()
    step(other)()
    torch.testing.assert_close(net.a._peft_loraga_grad, other.a.weight.grad / 2)
    assert not net.b.weight.requires_grad
    assert net.a.weight.grad is None
    assert torch.equal(net.a.bias.grad, torch.ones(16))
    again = Net()
    preprocess_loraga(again, ga_config(), lambda: pytest.fail("the file was there"), cache_file=cache)
    torch.testing.assert_close(again.b._peft_loraga_grad, net.b._peft_loraga_grad)


@pytest.mark.parametrize(
    ("direction", "for_a", "for_b"),
    [("ArBr", [1, 3], [0, 2]), ("A2rBr", [2, 3], [0, 1]), ("ArB2r", [0, 1], [2, 3])],
)
def test_lora_ga_directions_choose_singular_vectors(direction, for_a, for_b):
    net, x = Net(), data()[0]
    before = net(x).detach()
    preprocess_loraga(net, ga_config(direction=direction, scale="unit"), step(net))
    u, s, vt = torch.linalg.svd(net.a._peft_loraga_grad)
    model = get_peft_model(net, ga_config(direction=direction, scale="unit"))
    a, b = model.base_model.model.a.factors("default")
    torch.testing.assert_close((a @ vt[for_a].t()).abs(), torch.eye(2), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((u[:, for_b].t() @ b).abs(), torch.diag(s[for_b]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scale", "a_norm", "b_factor"), [("stable", 1.0, 0.5), ("gd_scale", 0.25, 0.25), ("unit", 1.0, 1.0)]
)
def test_lora_ga_scales(scale, a_norm, b_factor):
    net = Net()
    preprocess_loraga(net, ga_config(scale=scale), step(net))
    s = torch.linalg.svdvals(net.a._peft_loraga_grad)
    a, b = get_peft_model(net, ga_config(scale=scale)).base_model.model.a.factors("default")
    torch.testing.assert_close(a.norm(dim=1), torch.full((2,), a_norm), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(b.norm(dim=0), b_factor * s[2:4], rtol=1e-3, atol=1e-4)


def test_lora_ga_gives_b_the_norm_of_the_weight():
    net = Net()
    largest = torch.linalg.svdvals(net.a.weight.detach())[0]
    preprocess_loraga(net, ga_config(scale="weight_svd"), step(net))
    b = get_peft_model(net, ga_config(scale="weight_svd")).base_model.model.a.factors("default")[1]
    torch.testing.assert_close(b.norm(dim=0).max(), largest, rtol=1e-2, atol=0)


def test_lora_ga_without_gradients_warns_and_starts_plainly():
    with pytest.warns(PeftWarning, match="preprocess_loraga"):
        model = get_peft_model(Net(), ga_config())
    assert not model.base_model.model.a.factors("default")[1].any()


def test_lora_ga_says_when_no_gradient_came():
    with pytest.raises(ValueError, match="gave a no gradient"):
        preprocess_loraga(Net(), ga_config(), lambda: None)
