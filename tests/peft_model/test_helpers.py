# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The helpers: scaling, dtype casting, signatures, and the choice of modules by condition number."""

from __future__ import annotations

import inspect

import pytest
import torch
from tiny_models import IDS, adapted, llama, logits
from torch import nn

from peft import helpers
from peft.tuners.lora import LoraLayer, dora


def first(model):
    return next(module for module in model.modules() if isinstance(module, LoraLayer))


def test_rescaling():
    model = adapted()
    before, base = logits(model), logits(llama())
    with helpers.rescale_adapter_scale(model, 0.5):
        assert first(model).scaling == {"default": 2.0}
        assert not torch.allclose(logits(model), before, atol=1e-3)
    assert first(model).scaling == {"default": 4.0} and torch.equal(logits(model), before)
    with pytest.raises(KeyError), helpers.rescale_adapter_scale(model, 0):
        assert torch.allclose(logits(model), base, atol=1e-6)
        raise KeyError
    assert first(model).scaling == {"default": 4.0}


def test_rescaling_refusals():
    with pytest.raises(TypeError, match="got str"), helpers.rescale_adapter_scale(adapted(), "2"):
        pass
    with pytest.raises(ValueError, match="no LoRA layer"), helpers.rescale_adapter_scale(llama(), 2.0):
        pass


def test_input_dtype_casting():
    model = adapted()
    layer = first(model)
    x = torch.randn(2, 16, dtype=torch.bfloat16)
    layer.base_layer.to(torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    with helpers.disable_input_dtype_casting(model):
        assert layer.cast_input_dtype_enabled is False
        with helpers.disable_input_dtype_casting(model):
            pass
        assert layer.cast_input_dtype_enabled is False
    assert layer.cast_input_dtype_enabled is True and layer(x).dtype == torch.bfloat16
    with helpers.disable_input_dtype_casting(model, active=False):
        assert layer.cast_input_dtype_enabled is True


def test_check_if_peft_model(tmp_path):
    assert not helpers.check_if_peft_model(tmp_path)
    adapted().save_pretrained(tmp_path)
    assert helpers.check_if_peft_model(tmp_path) and helpers.check_if_peft_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{")
    assert not helpers.check_if_peft_model(tmp_path)


def test_signatures():
    base = type(llama())
    model = adapted(task_type=None)
    expected = logits(model)
    tokens = model.generate(IDS, max_new_tokens=2, do_sample=False)
    helpers.update_forward_signature(model)
    assert list(inspect.signature(model.forward).parameters) == list(inspect.signature(base.forward).parameters)[1:]
    assert "input_ids" not in inspect.signature(model.generate).parameters
    helpers.update_generate_signature(model)
    assert list(inspect.signature(model.generate).parameters) == list(inspect.signature(base.generate).parameters)[1:]
    assert torch.equal(logits(model), expected)
    assert torch.equal(model.generate(IDS, max_new_tokens=2, do_sample=False), tokens)
    assert "inputs" not in inspect.signature(type(model).generate).parameters


def test_signatures_of_task_classes_stay():
    model = adapted()
    before = inspect.signature(model.forward)
    helpers.update_signature(model)
    assert inspect.signature(model.forward) == before
    assert "generation_config" in inspect.signature(model.generate).parameters
    with pytest.raises(ValueError, match="method='x'"):
        helpers.update_signature(model, "x")


def test_dora_caching_nests_and_restores():
    initial = dora.ENABLE_DORA_CACHING
    with helpers.DoraCaching():
        assert dora.ENABLE_DORA_CACHING is True
        with helpers.DoraCaching(enabled=False):
            assert dora.ENABLE_DORA_CACHING is False
        assert dora.ENABLE_DORA_CACHING is True
    assert dora.ENABLE_DORA_CACHING is initial
    with pytest.raises(KeyError), helpers.DoraCaching():
        raise KeyError
    assert dora.ENABLE_DORA_CACHING is initial


def with_condition(kappa: float, size: int = 4) -> torch.Tensor:
    left, right = (torch.linalg.qr(torch.randn(size, size)).Q for _ in range(2))
    return left @ torch.diag(torch.linspace(kappa, 1.0, size)) @ right


class Kappas(nn.Module):
    def __init__(self):
        super().__init__()
        self.high, self.low, self.middle, self.large = (nn.Linear(n, n) for n in (4, 4, 4, 8))
        self.embedding = nn.Embedding(4, 4)
        for layer, kappa in ((self.high, 100.0), (self.low, 2.0), (self.middle, 10.0)):
            layer.weight.data = with_condition(kappa)
        self.large.weight.data = with_condition(1.0, 8)
        self.mlp = nn.Module()
        self.mlp.up_proj = nn.Parameter(torch.stack([with_condition(5.0), with_condition(9.0)]))
        self.mlp.down_proj = nn.Parameter(torch.stack([with_condition(3.0), with_condition(5.0)]))
        self.mlp.other = nn.Parameter(torch.stack([with_condition(1.0)]))


def test_condition_numbers():
    selector = helpers.KappaTuneSelector(Kappas(), max_dim_size_to_analyze=4, show_progress=False)
    assert selector.get_best_targets() == ["low", "middle", "high"]
    assert selector._condition_numbers == pytest.approx({"low": 2, "middle": 10, "high": 100}, rel=1e-3)
    assert selector.get_best_target_parameters() == ["mlp.down_proj", "mlp.up_proj"]
    assert selector._parameter_condition_numbers == pytest.approx({"mlp.down_proj": 4, "mlp.up_proj": 7}, rel=1e-3)


@pytest.mark.parametrize(
    ("limits", "number"),
    [
        ({"num_modules": 2}, 2),
        ({"num_modules": 0}, 0),
        ({"num_modules": 9}, 4),
        ({"top_p": 0.5}, 2),
        ({"top_p": 0.0}, 1),
        ({"top_p": 3.0}, 4),
        ({"threshold": 11.0}, 3),
        ({"threshold": 0.5}, 0),
        ({"top_p": 0.5, "num_modules": 3}, 3),
        ({"top_p": 0.5, "threshold": 1000.0}, 2),
        ({"num_modules": 1, "threshold": 1000.0}, 1),
    ],
)
def test_limits(limits, number):
    selector = helpers.KappaTuneSelector(Kappas(), show_progress=False)
    assert selector.get_best_targets(**limits) == ["large", "low", "middle", "high"][:number]


def test_kappa_refusals():
    model = Kappas()
    with pytest.raises(ValueError, match="num_modules=-1"):
        helpers.KappaTuneSelector(model, show_progress=False).get_best_targets(num_modules=-1)
    model.low.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'low'"):
        helpers.find_kappa_target_modules(model, show_progress=False)


def test_find_kappa_target_modules():
    found = helpers.find_kappa_target_modules(Kappas(), top_p=0.5, show_progress=False)
    assert found == {"target_modules": ["large", "low"], "target_parameters": ["mlp.down_proj"]}
    found = helpers.find_kappa_target_modules(
        Kappas(), top_p=0.5, moe_param_suffixes=(".other",), max_dim_size_to_analyze=4, show_progress=False
    )
    assert found == {"target_modules": ["low"], "target_parameters": ["mlp.other"]}
    assert helpers.find_kappa_target_modules(nn.Sequential(nn.Linear(2, 2)), show_progress=False) == {
        "target_modules": ["0"],
        "target_parameters": None,
    }


def test_kappa_of_quantised_layers():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight.data.copy_(with_condition(50.0, 64))
    model = nn.Sequential(layer).to("cpu")
    selector = helpers.KappaTuneSelector(model, show_progress=False)
    assert selector.get_best_targets() == ["0"]
    assert selector._condition_numbers["0"] == pytest.approx(50, rel=0.5)
