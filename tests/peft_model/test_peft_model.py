# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""`PeftModel`: what is inside, adapters by name, switching, disabling, forward and generation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import IDS, adapted, llama, logits, lora, trained
from torch import nn

import peft.peft_model
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, PeftWarning, PrefixTuningConfig, get_peft_model
from peft.config import PromptLearningConfig
from peft.utils.peft_types import PeftType


def layer_of(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


def test_what_is_inside():
    base = llama()
    model = get_peft_model(base, lora())
    assert isinstance(model, PeftModelForCausalLM)
    assert model.base_model.model is base and model.get_base_model() is base and model.model is base
    assert model.peft_config is model.base_model.peft_config
    assert model.active_adapter == "default" and model.active_adapters == ["default"]
    assert model.active_peft_config is model.peft_config["default"]
    assert model.special_peft_forward_args == {"adapter_names", "alora_offsets"}
    assert model.peft_type == PeftType.LORA and model.prefix == "lora_"
    assert model.config is base.config and model.dtype == torch.float32
    assert model.base_model_torch_dtype == torch.float32
    assert model.modules_to_save is None
    assert model.has_active_enabled_adapter
    assert model.supports_lora_conversion()


def test_missing_attribute_is_an_attribute_error():
    model = adapted()
    assert not hasattr(model, "hf_device_map")
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = model.nothing_of_that_name


def test_peft_config_can_be_replaced():
    model = adapted()
    replacement = dict(model.peft_config)
    model.peft_config = replacement
    assert model.base_model.peft_config is replacement


def test_modules_to_save_are_those_of_all_adapters():
    model = adapted(modules_to_save=["lm_head"])
    model.add_adapter("other", lora(modules_to_save=["model.norm"]))
    assert model.modules_to_save == {"lm_head", "model.norm"}


def test_adapter_changes_output_and_disabling_gives_the_base_output():
    expected = logits(llama())
    model = adapted()
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
        assert layer_of(model).disable_adapters and not trained(model)
        assert not model.has_active_enabled_adapter
    assert trained(model) == {"default"} and not layer_of(model).disable_adapters


def test_disabling_nests_and_restores_what_was_there():
    model = adapted()
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        assert layer_of(model).disable_adapters and not trained(model)
    assert not layer_of(model).disable_adapters
    model.set_requires_grad("default", False)
    with model.disable_adapter():
        pass
    assert not trained(model)
    model.set_requires_grad("default")
    layer_of(model).enable_adapters(False)
    with model.disable_adapter():
        pass
    assert layer_of(model).disable_adapters
    assert not model.base_model.model.model.layers[0].self_attn.v_proj.disable_adapters


def test_disabling_is_undone_after_an_error():
    model = adapted()
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert not layer_of(model).disable_adapters and trained(model) == {"default"}


def test_several_adapters():
    model = adapted()
    model.add_adapter("second", lora(r=3))
    assert model.active_adapter == "default" and trained(model) == {"default"}
    first = logits(model)
    model.set_adapter("second")
    assert model.active_adapter == "second" and model.active_adapters == ["second"]
    assert trained(model) == {"second"}
    assert not torch.allclose(logits(model), first)
    model.base_model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default", "second"]
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapter == "second" and list(model.peft_config) == ["second"]
    assert list(layer_of(model).lora_A) == ["second"]


def test_set_adapter_for_inference_leaves_it_frozen():
    model = adapted()
    model.add_adapter("second", lora())
    model.set_adapter("second", inference_mode=True)
    assert model.active_adapter == "second" and not trained(model)


def test_adding_an_adapter_changes_nothing_of_the_others():
    model = adapted(modules_to_save=["lm_head"])
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.add_adapter("frozen", lora(inference_mode=True))
    model.add_adapter("third", lora())
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert not any(flag for name, flag in after.items() if name not in before)


def test_after_the_last_adapter_is_deleted_the_model_is_the_base_model():
    model = adapted()
    model.delete_adapter("default")
    assert model.active_adapter is None and model.active_adapters == []
    assert torch.equal(logits(model), logits(llama()))
    with pytest.raises(ValueError, match="No adapter is active"):
        _ = model.active_peft_config
    model.add_adapter("again", lora())
    assert model.active_adapter == "again" and trained(model) == {"again"}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.set_adapter("nope"), ValueError, "no adapter 'nope'.*'default'"),
        (lambda m: m.set_adapter(["default"]), TypeError, "base_model.set_adapter"),
        (lambda m: m.delete_adapter("nope"), ValueError, "no adapter 'nope'"),
        (lambda m: m.set_requires_grad(["default", "nope"]), ValueError, "no adapter 'nope'"),
        (lambda m: m.add_adapter("default", lora()), ValueError, "already"),
        (lambda m: m.add_adapter("a.b", lora()), ValueError, "no dot"),
        (lambda m: m.add_adapter("", lora()), ValueError, "not empty"),
        (lambda m: m.add_adapter("train", lora()), ValueError, "use another name, such as 'train_adapter'"),
        (lambda m: m.add_adapter("get", lora()), ValueError, "containers"),
        (lambda m: m.supports_lora_conversion("nope"), ValueError, "no adapter 'nope'"),
        (lambda m: m.get_prompt(1), ValueError, "has no prompt"),
        (lambda m: m.get_prompt_embedding_to_save("default"), ValueError, "has no prompt"),
    ],
)
def test_refusals(call, error, message):
    model = adapted()
    expected = logits(model)
    with pytest.raises(error, match=message):
        call(model)
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), expected)


def test_a_failed_add_leaves_nothing_behind():
    model = adapted()
    expected = logits(model)
    with pytest.raises(ValueError):
        model.add_adapter("bad", lora(target_modules=["no_such_module"]))
    with pytest.raises(ValueError):
        model.add_adapter("bad", lora(target_modules=["q_proj", "input_layernorm"]))
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert not any("bad" in name for name in model.state_dict())
    assert torch.equal(logits(model), expected) and trained(model) == {"default"}


def test_methods_are_not_combined():
    from peft import TrainableTokensConfig

    with pytest.raises(ValueError, match="TRAINABLE_TOKENS.*LORA.*mixed=True"):
        adapted().add_adapter("tokens", TrainableTokensConfig(token_indices=[1]))


def test_prompt_learning_is_refused_by_name():
    config = PromptLearningConfig(peft_type="PROMPT_TUNING", task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PROMPT_TUNING.*prompt-learning"):
        get_peft_model(llama(), config)
    with pytest.raises(ValueError, match="PREFIX_TUNING.*prompt-learning"):
        get_peft_model(llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_forward_of_the_base_model_runs_its_hooks(task_type):
    model = adapted(task_type=task_type)
    calls = []
    model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
    logits(model)
    assert calls == [1]


def test_generation():
    model = adapted()
    expected = model.merge_and_unload()
    expected = expected.generate(IDS, max_new_tokens=3, do_sample=False)
    for task_type in ("CAUSAL_LM", None):
        model = adapted(task_type=task_type)
        assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), expected)
        assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False), expected)
    inputs = adapted().prepare_inputs_for_generation(IDS, task_ids=None, use_cache=False)
    assert torch.equal(inputs["input_ids"], IDS)


def test_one_batch_with_several_adapters():
    model = adapted()
    model.add_adapter("second", lora(target_modules=["q_proj"]))
    model.eval()
    default = logits(model)
    model.set_adapter("second")
    second = logits(model)
    mixed = logits(model, adapter_names=["default", "__base__"])
    assert torch.allclose(mixed[0], default[0], atol=1e-5)
    assert torch.allclose(mixed[1], logits(llama())[1], atol=1e-5)
    mixed = logits(model, adapter_names=["second", "default"])
    assert torch.allclose(mixed, torch.stack([second[0], default[1]]), atol=1e-5)
    tokens = model.generate(IDS, adapter_names=["second", "default"], max_new_tokens=2, do_sample=False)
    assert tokens.shape == (2, 6)
    assert torch.allclose(logits(model), second)


def test_mixed_batch_is_refused_in_training_and_leaves_no_hook():
    model = adapted().train()
    with pytest.raises(ValueError, match="eval"):
        model(IDS, adapter_names=["default", "default"])
    with pytest.raises(ValueError, match="nope"):
        model.eval()(IDS, adapter_names=["default", "nope"])
    logits(model)


@pytest.mark.parametrize("autocast", [True, False])
def test_dtype_of_new_adapters(autocast):
    model = get_peft_model(llama().bfloat16(), lora(), autocast_adapter_dtype=autocast)
    model.add_adapter("second", lora(), autocast_adapter_dtype=autocast)
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name}
    assert dtypes == {torch.float32 if autocast else torch.bfloat16}
    assert model.base_model_torch_dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16


def test_low_cpu_mem_usage_leaves_adapters_on_meta():
    model = get_peft_model(llama(), lora(), low_cpu_mem_usage=True)
    model.add_adapter("second", lora(), low_cpu_mem_usage=True)
    devices = {parameter.device.type for name, parameter in model.named_parameters() if "lora_" in name}
    assert devices == {"meta"}


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        base = llama()
        if checkpointing:
            base.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model = get_peft_model(base, lora()).train()
        assert model.get_input_embeddings()(IDS).requires_grad == checkpointing
        model(IDS, labels=IDS).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(a is not None and torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_gradient_checkpointing_hook_for_models_without_a_switch():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.linear = nn.Embedding(4, 4), nn.Linear(4, 4)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, ids):
            return self.linear(self.embedding(ids))

    base = Bare()
    model = get_peft_model(base, LoraConfig(target_modules=["linear"]))
    assert not model.get_input_embeddings()(torch.tensor([1])).requires_grad
    model.prepare_model_for_gradient_checkpointing(base)
    assert model.get_input_embeddings()(torch.tensor([1])).requires_grad


def test_copies_are_independent():
    model = adapted()
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is PeftModelForCausalLM and torch.equal(logits(other), expected)
        with torch.no_grad():
            layer_of(other).lora_A["default"].weight.zero_()
        assert not torch.equal(logits(other), expected) and torch.equal(logits(model), expected)
        assert other.peft_config is other.base_model.peft_config is not model.peft_config
        assert torch.equal(other.generate(IDS, max_new_tokens=1, do_sample=False)[:, :4], IDS)


def test_train_and_eval_reach_the_adapters():
    model = adapted()
    assert model.train().training and layer_of(model).training
    assert not model.eval().training and not layer_of(model).training


def test_functions_are_looked_up_where_others_replace_them(monkeypatch, tmp_path):
    calls = []
    original = peft.peft_model.get_peft_model_state_dict
    monkeypatch.setattr(
        peft.peft_model, "get_peft_model_state_dict", lambda *a, **k: calls.append("get") or original(*a, **k)
    )
    adapted().save_pretrained(tmp_path)
    assert calls == ["get"]
    monkeypatch.setitem(peft.peft_model.PEFT_TYPE_TO_TUNER_MAPPING, PeftType.LORA, lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        get_peft_model(llama(), lora())


def test_wrapping_twice_warns():
    with pytest.warns(PeftWarning, match="has adapters already"):
        outer = get_peft_model(adapted(), lora())
    assert isinstance(outer, PeftModel)


def test_counts_and_their_print(capsys):
    model = adapted()
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert model.get_nb_trainable_parameters() == (trainable, total)
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}\n"
    )
