# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""MonteCLoRA: what varies in training, what is added to the loss, checkpointing, merging, saving."""

import copy

import pytest
import torch
from torch import nn
from torch.distributions import Dirichlet, MultivariateNormal, Wishart, kl_divergence
from torch.utils.checkpoint import checkpoint

from peft import LoraConfig, MontecloraConfig, PeftModel, get_peft_model
from peft.helpers import MontecloraTrainerMixin
from peft.tuners.lora.monteclora import MontecloraSampler

X = torch.randn(4, 8)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))


def tuned(targets=("0", "1"), **options):
    settings = MontecloraConfig(**{"num_samples": 4, "sample_scaler": 0.5, "kl_loss_weight": 1.0, **options})
    torch.manual_seed(1)
    config = LoraConfig(r=3, target_modules=list(targets), init_lora_weights=False, monteclora_config=settings)
    return get_peft_model(net(), config)


def sampler_of(model, layer=0):
    return model.base_model.model[layer].lora_monteclora_sampler["default"]


def test_a_varies_in_training_and_stands_still_in_evaluation():
    model = tuned(["0"])
    layer = model.base_model.model[0]
    x = torch.randn(4, 8)
    assert not torch.equal(layer(x), layer(x))
    drawn = sampler_of(model).sampler.get()
    sampler_of(model).sampler.get = lambda: drawn
    samples, weights = sampler_of(model)()
    a = layer.lora_A["default"].weight + torch.einsum("k,kir->ri", weights, samples)
    expected = layer.base_layer(x) + layer.scaling["default"] * x @ a.t() @ layer.lora_B["default"].weight.t()
    torch.testing.assert_close(layer(x), expected)
    model.eval()
    a = layer.lora_A["default"].weight
    expected = layer.base_layer(x) + layer.scaling["default"] * x @ a.t() @ layer.lora_B["default"].weight.t()
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(model.merge_and_unload()[0](x), expected)


def test_samples_have_the_covariance_that_they_say():
    torch.manual_seed(0)
    sampler = MontecloraSampler(20000, 3, 2, sample_scaler=0.5)
    samples, weights = sampler()
    torch.testing.assert_close(samples[0].t().cov(), 0.25 * sampler.gaussian_var_prior.detach(), rtol=0.1, atol=0.02)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    draws = torch.stack([sampler.sampler.get()["z_wishart"] for _ in range(400)])
    torch.testing.assert_close(draws.mean(0), 3 * torch.eye(3), rtol=0.2, atol=0.5)


def test_divergences_are_those_of_the_distributions():
    sampler = MontecloraSampler(8, 3, 4, dirichlet_prior=0.3)
    alpha, std = torch.tensor([0.2, 0.5, 0.9, 1.4]), torch.diag(torch.tensor([0.5, 0.8, 0.1]))
    prior = Dirichlet(torch.full((4,), 0.3))
    torch.testing.assert_close(sampler.dirichlet_kl(alpha), kl_divergence(Dirichlet(alpha), prior))
    three = torch.tensor(3.0)
    wishart = kl_divergence(Wishart(three, std @ std.t()), Wishart(three, torch.eye(3)))
    torch.testing.assert_close(sampler.wishart_kl(std), wishart, rtol=1e-4, atol=1e-5)
    variance = torch.diag(torch.tensor([2.0, 0.3, 1.1]))
    normal = kl_divergence(
        MultivariateNormal(torch.zeros(3), variance), MultivariateNormal(torch.zeros(3), torch.eye(3))
    )
    torch.testing.assert_close(sampler.multivariate_kl(variance), 4 * normal)


def test_the_loss_is_the_last_passs_and_trains_the_priors():
    model = tuned(use_entropy=True)
    assert sampler_of(model).get_variational_loss() == (0.0, 0.0)
    model(X)
    divergence, entropy = sampler_of(model).get_variational_loss()
    torch.testing.assert_close(entropy, sampler_of(model).expert_weights.square().sum())
    (divergence + entropy).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in sampler_of(model).parameters())
    model.eval()
    model(X)
    assert sampler_of(model).get_variational_loss() == (0.0, 0.0)


class Loop:
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(inputs["x"])
        loss = outputs.square().sum()
        return (loss, outputs) if return_outputs else loss


class WithLoss(MontecloraTrainerMixin, Loop):
    pass


def test_a_trainer_adds_the_mean_over_the_samplers():
    model = tuned(sample_scaler=0.0, use_entropy=True)
    loss, outputs = WithLoss().compute_loss(model, {"x": X}, return_outputs=True)
    added = [sum(sampler_of(model, i).get_variational_loss()) for i in (0, 1)]
    torch.testing.assert_close(loss, outputs.square().sum() + sum(added) / 2)
    torch.testing.assert_close(loss, WithLoss().compute_loss(model, {"x": X}), rtol=10, atol=1e3)
    plain = get_peft_model(net(), LoraConfig(r=3, target_modules=["0"]))
    torch.testing.assert_close(WithLoss().compute_loss(plain, {"x": X}), plain(X).square().sum())


def test_activation_checkpointing_repeats_the_samples():
    model = tuned()
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        torch.manual_seed(4)
        run(X).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(low_cpu_mem_usage, tmp_path):
    model = tuned()
    model(X)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for one, other in zip(
        sampler_of(loaded).state_dict().values(), sampler_of(model).state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)
    torch.testing.assert_close(loaded.eval()(X), model.eval()(X))
    copy.deepcopy(loaded.train())(X)


def test_it_goes_on_linear_layers_alone():
    config = LoraConfig(r=2, target_modules=["0"], monteclora_config=MontecloraConfig())
    with pytest.raises(ValueError, match="monteclora_config"):
        get_peft_model(nn.Sequential(nn.Embedding(4, 4)), config)
    with pytest.raises(ValueError, match="num_samples"):
        tuned(num_samples=0)
