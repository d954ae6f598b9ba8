# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""`reduce_intruder_dimension`: which singular vectors count as intruders, and what is left of them."""

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(12, 16)
        self.emb = nn.Embedding(10, 12)

    def forward(self, ids):
        return self.a(self.emb(ids))


def tuned(**settings):
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["a", "emb"], "init_lora_weights": False, **settings}
    model = get_peft_model(Net(), LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    return model


def expected_delta(layer, top_k, epsilon, keep):
    weight, delta = layer.base_layer.weight.detach(), layer.get_delta_weight("default").detach()
    own = torch.linalg.svd(weight, full_matrices=False)[0]
    u, s, vt = torch.linalg.svd(weight + delta, full_matrices=False)
    for i in range(min(top_k, len(s))):
        if (own.t() @ u[:, i]).abs().max() < epsilon:
            delta = delta - (1 - keep) * s[i] * torch.outer(u[:, i], vt[i])
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :3] * s[:3] @ vt[:3]


@pytest.mark.parametrize(("top_k", "epsilon", "keep"), [(10, 0.9, 0.75), (2, 0.9, 0.5), (10, 0.9, 0.0)])
def test_intruders_are_scaled_down_and_the_rank_is_kept(top_k, epsilon, keep):
    model, lines = tuned(), []
    reduce_intruder_dimension(
        model, top_k=top_k, threshold_epsilon=epsilon, mitigation_lambda=keep, logging_sink=lines.append
    )
    layer = model.base_model.model.a
    expected = expected_delta(layer, top_k, epsilon, keep)
    torch.testing.assert_close(layer.get_delta_weight("intruder_reduced"), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected, layer.get_delta_weight("default"), atol=0.1)
    assert model.active_adapters == ["intruder_reduced"]
    assert "base_model.model.a" in lines[0]


def test_without_intruders_the_adapter_is_copied():
    model = tuned()
    reduce_intruder_dimension(model, threshold_epsilon=0.0, logging_sink=None)
    for layer in (model.base_model.model.a, model.base_model.model.emb):
        torch.testing.assert_close(layer.get_delta_weight("intruder_reduced"), layer.get_delta_weight("default"))


def test_what_it_cannot_reduce_is_refused():
    with pytest.raises(ValueError, match="already"):
        reduce_intruder_dimension(tuned(), new_adapter_name="default")
    with pytest.raises(ValueError, match="no adapter 'other'"):
        reduce_intruder_dimension(tuned(), old_adapter_name="other")
    with pytest.raises(ValueError, match="DoraLinearVariant"):
        reduce_intruder_dimension(tuned(target_modules=["a"], use_dora=True))
