# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on `nn.MultiheadAttention`: what it computes, also inside a transformer layer, merging, saving, refusals."""

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, PeftWarning, get_peft_model


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x, **kwargs):
        return self.attn(x, x, x, **kwargs)[0]


def tuned(net=None, **settings):
    settings = {"r": 2, "lora_alpha": 8, "target_modules": ["attn"], "init_lora_weights": False, **settings}
    model = get_peft_model(Net() if net is None else net, LoraConfig(**settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


def reference(model, adapters=("default",)):
    """The attention with the updates written into its weights and biases."""
    net = Net().eval()
    layer = model.base_model.model.attn
    with torch.no_grad():
        for name in adapters:
            for part, weight, bias in (
                (layer, net.attn.in_proj_weight, net.attn.in_proj_bias),
                (layer.out_proj, net.attn.out_proj.weight, net.attn.out_proj.bias),
            ):
                weight.add_(part.get_delta_weight(name))
                if part.lora_B[name].bias is not None:
                    bias.add_(part.scaling[name] * part.lora_B[name].bias)
    return net


X = torch.randn(3, 5, 8)


@pytest.mark.parametrize("lora_bias", [False, True])
def test_both_projections_get_their_updates(lora_bias):
    model = tuned(lora_bias=lora_bias)
    torch.testing.assert_close(model(X), reference(model)(X))
    with torch.no_grad():
        torch.testing.assert_close(model(X), reference(model)(X))
    mask = torch.ones(5, 5).triu(1).bool()
    torch.testing.assert_close(model(X, attn_mask=mask), reference(model)(X, attn_mask=mask))


def test_gradients_reach_all_factors():
    model = tuned().train()
    model(X).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name)


def test_the_base_layer_is_left_as_it_was():
    model = tuned(lora_bias=True)
    names = [name for name, _ in model.named_parameters()]
    before = model.state_dict()
    model(X)
    assert [name for name, _ in model.named_parameters()] == names
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("lora_bias", [False, True])
def test_merging_disabling_and_unloading(lora_bias):
    model = tuned(lora_bias=lora_bias)
    y = model(X)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), Net()(X))
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-5)
    plain = model.merge_and_unload()
    assert not any("lora" in name for name, _ in plain.named_modules())
    torch.testing.assert_close(plain(X), y, rtol=1e-4, atol=1e-5)


def test_many_forwards_do_not_change_the_weights():
    model = tuned().train()
    weight = model.base_model.model.attn.in_proj_weight.detach().clone()
    for _ in range(10):
        model(X)
    assert torch.equal(model.base_model.model.attn.in_proj_weight, weight)


def test_several_adapters_add_up_and_one_can_go():
    model = tuned()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["attn"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(model(X), reference(model, ["default", "second"])(X))
    model.delete_adapter("default")
    torch.testing.assert_close(model(X), reference(model, ["second"])(X))


def test_a_saved_adapter_gives_the_same_output(tmp_path):
    model = tuned()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path).eval()(X), model(X))


def test_a_transformer_layer_does_not_read_past_the_adapter():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = tuned(nn.Sequential(layer), target_modules=["self_attn"])
    y = model.train()(X)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X), y.detach())


def test_dropout_warns_that_it_does_nothing():
    with pytest.warns(PeftWarning, match="lora_dropout"):
        tuned(lora_dropout=0.1)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="pissa"):
        tuned(init_lora_weights="pissa")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_bias_that_is_trained_is_saved(bias, tmp_path):
    """The out-projection's; the packed one is no parameter of a layer that `bias` speaks of."""
    model = tuned(bias=bias)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {"base_model.model.attn.base_layer.out_proj.base_layer.bias"}
    with torch.no_grad():
        model.get_parameter(*trained).normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path).eval()
    torch.testing.assert_close(loaded(X), model(X))
    assert not torch.equal(loaded(X), tuned()(X))


def test_an_out_projection_that_is_named_too_is_adapted_once():
    model = tuned(target_modules=["attn", "out_proj"])
    names = [name for name, _ in model.named_parameters() if "out_proj.lora_" in name]
    assert names == [f"base_model.model.attn.base_layer.out_proj.lora_{side}.default.weight" for side in "AB"]
    torch.testing.assert_close(model(X), reference(model)(X))
