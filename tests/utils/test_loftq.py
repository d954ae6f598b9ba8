# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoftQ: quantising and repairing in turn, and repairing a model that is quantised already."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from toys import llama
from transformers import AutoModelForCausalLM

from peft import LoraConfig, get_peft_model
from peft.utils import replace_lora_weights_loftq
from peft.utils.loftq_utils import loftq_init

bnb = pytest.importorskip("bitsandbytes")


def _nf4(weight: torch.Tensor) -> torch.Tensor:
    packed, state = bnb.functional.quantize_4bit(weight.contiguous(), quant_type="nf4", blocksize=64)
    return bnb.functional.dequantize_4bit(packed, state)


def _int8(weight: torch.Tensor) -> torch.Tensor:
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / step).round() * step


@pytest.mark.parametrize(("bits", "quantise"), [(4, _nf4), (8, _int8)])
@pytest.mark.parametrize("rounds", [1, 3])
def test_algorithm(bits, quantise, rounds):
    weight = torch.randn(32, 64) * 0.02
    repair = torch.zeros_like(weight)
    for _ in range(rounds):
        quantised = quantise(weight - repair)
        u, s, vt = torch.linalg.svd((weight - quantised).double(), full_matrices=False)
        repair = (u[:, :4] * s[:4] @ vt[:4]).float()
    got, lora_a, lora_b = loftq_init(weight, bits, 4, rounds)
    assert lora_a.shape == (4, 64)
    assert lora_b.shape == (32, 4)
    torch.testing.assert_close(got, quantised)
    torch.testing.assert_close(lora_b @ lora_a, repair, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(lora_a.norm(), lora_b.norm())
    assert (weight - got - lora_b @ lora_a).norm() < (weight - quantise(weight)).norm()


def test_dtype_and_zero_rows():
    weight = torch.randn(8, 64).to(torch.bfloat16)
    weight[0] = 0
    got, lora_a, _ = loftq_init(nn.Parameter(weight), 8, 2)
    assert got.dtype == torch.bfloat16
    assert lora_a.dtype == torch.float32
    assert got.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 4, 1), "num_bits=2"),
        ((4, 0, 1), "reduced_rank=0"),
        ((4, 4, 0), "num_iter=0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        loftq_init(torch.randn(8, 64), *arguments)
    with pytest.raises(ValueError, match=r"shape \[2, 2, 2\]"):
        loftq_init(torch.randn(2, 2, 2), 4, 1)


# ---- a model that is quantised already -----------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path):
    base = llama(hidden_size=64)
    base.save_pretrained(tmp_path)
    return base, tmp_path


def _quantised(path):
    """The saved model with its linear layers but the output layer in NF4."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            bias = module.bias is not None
            packed = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias, quant_type="nf4", compute_dtype=torch.float32
            )
            packed.load_state_dict(module.state_dict())
            model.set_submodule(name, packed.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("lora_alpha", [4, 16])
def test_repairs_the_model(saved, use_dora, lora_alpha):
    base, path = saved
    rank = 24
    config = LoraConfig(r=rank, lora_alpha=lora_alpha, target_modules="all-linear", use_dora=use_dora)
    model = get_peft_model(_quantised(path), config).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    truth = base(ids).logits
    before = (model(ids).logits - truth).norm()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    packed = layer.base_layer.weight.data.clone()
    replace_lora_weights_loftq(model, path)
    assert torch.equal(layer.base_layer.weight.data, packed)
    after = (model(ids).logits - truth).norm()
    assert after < before / 2
    delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    error = base.model.layers[0].self_attn.q_proj.weight - layer.get_base_weight()
    u, s, vt = torch.linalg.svd(error.detach(), full_matrices=False)
    torch.testing.assert_close(delta, u[:, :rank] * s[:rank] @ vt[:rank], atol=1e-5, rtol=1e-3)
    if use_dora:
        norm = (layer.get_base_weight() + delta).norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.detach(), norm.detach())


def test_the_path_is_the_models_own(saved):
    _, path = saved
    model = get_peft_model(_quantised(path), LoraConfig(r=8))
    replace_lora_weights_loftq(model)
    assert model.base_model.model.model.layers[0].self_attn.v_proj.lora_B["default"].weight.any()


def test_callback_takes_replacements_back(saved):
    _, path = saved
    model = get_peft_model(_quantised(path), LoraConfig(r=8, use_dora=True))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    seen = []

    def keep_values(_, name):
        seen.append(name)
        return name.endswith("v_proj")

    replace_lora_weights_loftq(model, path, callback=keep_values)
    assert len(seen) == 2
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert torch.equal(parameter, before[name]) is ("v_proj" not in name)
        if "q_proj" in name:
            assert torch.equal(parameter, before[name])


def test_model_refusals(saved, tmp_path):
    base, path = saved
    with pytest.raises(ValueError, match="no LoRA layer with an adapter 'other'"):
        replace_lora_weights_loftq(get_peft_model(_quantised(path), LoraConfig(r=8)), path, adapter_name="other")
    with pytest.raises(ValueError, match="on 4-bit weights"):
        replace_lora_weights_loftq(get_peft_model(base, LoraConfig(r=8)), path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no safetensors file"):
        replace_lora_weights_loftq(get_peft_model(_quantised(path), LoraConfig(r=8)), tmp_path / "empty")
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "empty" / "model.safetensors")
    with pytest.raises(KeyError, match="no tensor"):
        replace_lora_weights_loftq(get_peft_model(_quantised(path), LoraConfig(r=8)), tmp_path / "empty")
