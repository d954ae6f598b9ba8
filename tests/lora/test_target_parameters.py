# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on bare parameters: stacked experts, several parameters of a module, merging, saving, and what is refused."""

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.error import NoMatchingPeftModuleError


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 16))
        self.down = nn.Parameter(torch.randn(3, 16, 8))
        self.gate = nn.Parameter(torch.randn(3, 16))

    def forward(self, x):
        weights = torch.softmax(x @ self.gate.t(), -1)
        return sum(weights[..., e : e + 1] * (x @ self.up[e].t() @ self.down[e].t()) for e in range(3))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = Experts()
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.experts(x))


def tuned(*parameters, **settings):
    settings = {"r": 2, "lora_alpha": 8, "init_lora_weights": False, "target_modules": [], **settings}
    config = LoraConfig(target_parameters=list(parameters) or ["experts.up", "experts.down"], **settings)
    return get_peft_model(Net(), config)


def wrappers(model):
    return {m.parameter_name: m for m in model.modules() if isinstance(m, ParamWrapper)}


def reference(model, x):
    """The model with the updates written into its parameters."""
    net = Net()
    with torch.no_grad():
        for name, wrapper in wrappers(model).items():
            getattr(net.experts, name).add_(wrapper.get_delta_weight("default"))
    return net(x)


X = torch.randn(5, 16)


@pytest.mark.parametrize("parameters", [("experts.up",), ("experts.down", "experts.up"), ("gate", "experts.down")])
def test_the_module_sees_its_parameters_with_the_updates(parameters):
    model = tuned(*parameters)
    assert sorted(model.base_model.targeted_parameter_names) == sorted(
        name if "." in name else f"experts.{name}" for name in parameters
    )
    torch.testing.assert_close(model(X), reference(model, X), rtol=1e-4, atol=1e-3)


def test_each_expert_has_its_own_factors():
    wrapper = wrappers(tuned("experts.up"))["up"]
    assert wrapper.lora_A["default"].weight.shape == (6, 16)
    assert wrapper.lora_B["default"].weight.shape == (8, 6)
    b, a, scaling = wrapper.get_delta_factors("default")
    stored_a, stored_b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    torch.testing.assert_close(a[1], stored_a[2:4])
    torch.testing.assert_close(b[1], stored_b[:, [1, 4]])
    torch.testing.assert_close(wrapper.get_delta_weight("default")[1], scaling * stored_b[:, [1, 4]] @ stored_a[2:4])


def test_gradients_reach_the_factors_and_nothing_else():
    model = tuned()
    model(X).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name)


def test_a_call_leaves_the_module_as_it_was():
    model = tuned("experts.up")
    before = list(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    model(X)
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 7))
    assert list(model.state_dict()) == before
    assert [name for name, _ in model.named_parameters()] == names


def test_merging_disabling_and_unloading():
    model = tuned().eval()
    y, base = model(X), Net()(X)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), base)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-3)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-3)
    plain = model.merge_and_unload()
    assert type(plain.experts) is Experts
    torch.testing.assert_close(plain(X), y, rtol=1e-4, atol=1e-3)
    assert type(tuned().unload().experts) is Experts


def test_a_saved_adapter_gives_the_same_output(tmp_path):
    model = tuned().eval()
    y = model(X)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path).eval()(X), y)


def test_several_adapters_add_up_and_may_target_other_parameters():
    model = tuned("experts.up")
    config = LoraConfig(
        r=3, target_parameters=["experts.up", "experts.down"], target_modules=[], init_lora_weights=False
    )
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    net = Net()
    with torch.no_grad():
        for name, wrapper in wrappers(model).items():
            for adapter in wrapper.lora_A:
                getattr(net.experts, name).add_(wrapper.get_delta_weight(adapter))
    torch.testing.assert_close(model(X), net(X), rtol=1e-4, atol=1e-3)


def test_ranks_by_the_parameters_name():
    model = tuned(rank_pattern={"experts.up": 4}, alpha_pattern={"experts.up": 2})
    assert wrappers(model)["up"].r["default"] == 4
    assert wrappers(model)["up"].scaling["default"] == 0.5
    assert wrappers(model)["down"].r["default"] == 2


def test_mixtral_experts():
    torch.manual_seed(0)
    base = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=3,
        )
    ).eval()
    ids = torch.arange(8).reshape(1, 8)
    before = base(ids).logits
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    y = model(ids).logits
    assert (y - before).abs().max() > 1e-4
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_dropout": 0.1},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa"},
        {"alora_invocation_tokens": [1]},
        {"target_modules": ["head"], "target_parameters": ["head.weight"]},
    ],
)
def test_what_has_no_meaning_for_a_parameter_is_refused(settings):
    parameters = settings.pop("target_parameters", ["experts.up"])
    with pytest.raises(
        ValueError, match=next(iter(settings)) if len(settings) == 1 and "target_modules" not in settings else "head"
    ):
        tuned(*parameters, **settings)


def test_names_that_match_nothing():
    with pytest.raises(NoMatchingPeftModuleError, match="nothing"):
        tuned("nothing")
    with pytest.warns(RuntimeWarning, match="nothing"):
        tuned("experts.up", "nothing")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("modules", [[], ["head"]])
def test_injected_from_a_state_dict(low_cpu_mem_usage, modules):
    """Keys of a wrapper name the module that owns the parameters, which is not adapted as a whole."""
    model = tuned(target_modules=modules)
    state = {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(model).items()}
    config = LoraConfig(r=2, lora_alpha=8, target_modules=modules, target_parameters=["experts.up", "experts.down"])
    net = inject_adapter_in_model(config, Net(), state_dict=state, low_cpu_mem_usage=low_cpu_mem_usage)
    result = set_peft_model_state_dict(net, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.missing_keys
    torch.testing.assert_close(net(X), model(X))
