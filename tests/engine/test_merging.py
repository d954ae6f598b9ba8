# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Folding adapters into base weights and taking them out again."""

import warnings

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.warning import PeftWarning

CASES = {
    "linear": (lambda: nn.Linear(8, 6), (3, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, dilation=2, padding=2, padding_mode="reflect"), (2, 4, 9, 9)),
    "conv2d_groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "conv2d_depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), (2, 2, 4, 4, 4)),
}


def adapted(base, names=("a",), **options):
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(base()), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **options), names[0]
    )
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **options))
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    with torch.no_grad():
        for magnitude in layer.lora_magnitude_vector.values():
            magnitude.weight.mul_(torch.linspace(0.5, 2, magnitude.weight.numel()).reshape(magnitude.weight.shape))
    return model.eval(), layer


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_merged_equals_unmerged_and_comes_back(case, use_dora, names):
    base, shape = CASES[case]
    model, layer = adapted(base, names, use_dora=use_dora)
    model.base_model.set_adapter(list(names))
    x = torch.randn(shape)
    weight = layer.base_layer.weight.clone()
    before = model(x)
    model.merge_adapter()
    assert layer.merged_adapters == list(names)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert not layer.merged
    torch.testing.assert_close(layer.base_layer.weight.data, weight.data, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_one_after_the_other_equals_merging_both(use_dora):
    base, shape = CASES["linear"]
    model, layer = adapted(base, ("a", "b"), use_dora=use_dora)
    model.base_model.set_adapter(["a", "b"])
    x = torch.randn(shape)
    before = model(x)
    layer.merge(adapter_names=["a"])
    with pytest.warns(UserWarning, match="Already merged: a"):
        layer.merge(adapter_names=["a", "b"])
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_merge_and_unload_gives_the_plain_module_back():
    base, shape = CASES["conv2d_groups"]
    model, _ = adapted(base, use_dora=True)
    x = torch.randn(shape)
    expected = model(x)
    plain = model.merge_and_unload()
    assert type(plain[0]) is nn.Conv2d
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
    assert not hasattr(plain, "peft_config")


def test_unload_leaves_the_base_weight_as_it_was():
    model, layer = adapted(CASES["linear"][0])
    weight = layer.base_layer.weight.data.clone()
    model.merge_adapter()
    with pytest.warns(PeftWarning, match=r"merge_and_unload\(\) leaves them in"):
        plain = model.unload()
    torch.testing.assert_close(plain[0].weight.data, weight)


@pytest.mark.parametrize("use_dora", [False, True])
def test_safe_merge_finds_broken_adapters_before_it_changes_anything(use_dora):
    model, layer = adapted(CASES["linear"][0], use_dora=use_dora)
    weight = layer.base_layer.weight.data.clone()
    with torch.no_grad():
        layer.lora_A["a"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="Merging adapter 'a' gives weights that are not finite"):
        model.merge_adapter(safe_merge=True)
    assert not layer.merged
    assert torch.equal(layer.base_layer.weight.data, weight)


def test_lora_bias_goes_into_the_bias_and_out_again():
    model, layer = adapted(CASES["linear"][0], lora_bias=True)
    with torch.no_grad():
        layer.lora_B["a"].bias.uniform_()
    bias, x = layer.base_layer.bias.data.clone(), torch.randn(3, 8)
    before = model(x)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), before)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias.data, bias)


def test_lora_bias_without_a_base_bias_is_refused_before_any_layer_is_merged():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    with pytest.warns(UserWarning, match="but not merged"):
        model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "1"], lora_bias=True, init_lora_weights=True))
    with pytest.raises(RuntimeError, match="has no bias"):
        model.merge_adapter()
    assert not any(module.merged for module in model.modules() if isinstance(module, LoraLayer))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights_are_rounded_once(dtype):
    model, layer = adapted(lambda: nn.Linear(64, 32).to(dtype), use_dora=True)
    exact, _ = None, None
    weight = layer.base_layer.weight.data.double()
    a, b = layer.lora_A["a"].weight.double(), layer.lora_B["a"].weight.double()
    merged = weight + layer.scaling["a"] * b @ a
    exact = merged * (layer.lora_magnitude_vector["a"].weight.double() / merged.norm(dim=1))[:, None]
    model.merge_adapter()
    error = (layer.base_layer.weight.data.double() - exact).abs()
    assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 * 1.01 + 1e-7).all()


def test_a_zero_magnitude_can_be_unmerged():
    model, layer = adapted(CASES["linear"][0], use_dora=True)
    with torch.no_grad():
        layer.lora_magnitude_vector["a"].weight[2] = 0.0
    weight = layer.base_layer.weight.data.clone()
    model.merge_adapter()
    assert (layer.base_layer.weight.data[2] == 0).all()
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight.data, weight, rtol=1e-4, atol=1e-6)


def test_merging_twice_and_unmerging_twice_only_warn():
    model, _ = adapted(CASES["linear"][0])
    model.merge_adapter()
    with pytest.warns(UserWarning, match="nothing to do"):
        model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unmerge_adapter()
    with pytest.warns(UserWarning, match="nothing to undo"):
        model.unmerge_adapter()


def test_merging_a_trained_copy_of_a_tied_layer_unties_the_config():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    with torch.no_grad():
        model.get_input_embeddings().modules_to_save["default"].weight.add_(1.0)
    with pytest.warns(UserWarning, match="tie_word_embeddings=False"):
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    assert not torch.equal(merged.get_input_embeddings().weight, merged.lm_head.weight)
