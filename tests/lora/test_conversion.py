# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Adapters written as plain LoRA: how close they are, which ranks they get, and that they load."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora, save_as_lora


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(8, 16)
        self.b = Conv1D(12, 16)
        self.emb = nn.Embedding(10, 8)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def tuned(**settings):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["a", "b"], "init_lora_weights": False, **settings}
    model = get_peft_model(Net(), LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("rank", [4, 6, 1.0])
def test_enough_rank_gives_the_same_model(tmp_path, rank):
    model = tuned()
    save_as_lora(tmp_path, model, rank)
    loaded = PeftModel.from_pretrained(Net(), tmp_path).eval()
    x = torch.randn(5, 8)
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=1e-3, atol=1e-3)


def test_a_lower_rank_is_the_best_approximation():
    model = tuned(target_modules=["a"])
    config, state = convert_to_lora(model, 2)
    a, b = state["base_model.model.a.lora_A.weight"], state["base_model.model.a.lora_B.weight"]
    u, s, vt = torch.linalg.svd(model.base_model.model.a.get_delta_weight("default"), full_matrices=False)
    torch.testing.assert_close(b @ a, u[:, :2] * s[:2] @ vt[:2], rtol=1e-4, atol=1e-4)
    assert (config.r, config.lora_alpha) == (2, 2)


def test_a_share_of_the_energy_chooses_each_rank():
    model = tuned(target_modules=["a"])
    energy = torch.linalg.svdvals(model.base_model.model.a.get_delta_weight("default")).square()
    share = float(energy[:2].sum() / energy.sum())
    for asked, expected in ((share - 1e-3, 2), (share + 1e-3, 3)):
        config, state = convert_to_lora(model, asked)
        assert config.rank_pattern == config.alpha_pattern == {"a": expected}
        assert len(state["base_model.model.a.lora_A.weight"]) == expected


@pytest.mark.parametrize(
    ("settings", "rank", "error"),
    [
        ({}, 0, ValueError),
        ({}, 1.5, ValueError),
        ({}, 100, ValueError),
        ({"target_modules": ["a"], "bias": "all"}, 2, ValueError),
        ({"target_modules": ["a"], "kasa_config": KasaConfig()}, 2, TypeError),
        ({"target_modules": ["emb"]}, 2, TypeError),
    ],
)
def test_what_cannot_be_converted_is_refused(settings, rank, error):
    with pytest.raises(error):
        convert_to_lora(tuned(**settings), rank)


def test_a_model_without_the_adapter_is_refused():
    with pytest.raises(TypeError, match="no layer"):
        convert_to_lora(Net(), 2)
    with pytest.raises(TypeError, match="'other'"):
        convert_to_lora(tuned(), 2, adapter_name="other")
