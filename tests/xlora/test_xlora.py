# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""X-LoRA: what experts are weighed by, on each kind of layer, training, logging, saving, refusals."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from peft.tuners.xlora.layer import XLoraConv2dLayer, XLoraLinearLayer

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
NAMES = ("0", "first", "second")


def base(use_cache=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, num_key_value_heads=1, use_cache=use_cache, **sizes)
    return LlamaForCausalLM(config).eval()


def write_experts(folder, targets=("q_proj", "down_proj"), **options):
    for i, name in enumerate(NAMES):
        torch.manual_seed(i + 1)
        config = LoraConfig(
            r=2 + i, lora_alpha=5 + i, target_modules=list(targets), init_lora_weights=False, **options
        )
        get_peft_model(base(), config).save_pretrained(folder / name)
    return {name: str(folder / name) for name in NAMES}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return write_experts(tmp_path_factory.mktemp("experts"))


def tuned(experts, **options):
    torch.manual_seed(5)
    return get_peft_model(
        base(), XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters=dict(experts), **options)
    )


def layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@torch.no_grad()
def weighed(layer, x, scalings, factor=1.0):
    y = layer.base_layer(x)
    for i, name in enumerate(NAMES):
        update = layer.method(name).apply(layer, name, x, layer.base_layer(x)) - layer.base_layer(x)
        y = y + factor * scalings[..., i : i + 1] * update
    return y


@pytest.mark.parametrize("layerwise", [False, True])
@torch.no_grad()
def test_the_classifier_weighs_by_the_base_models_hidden_states(layerwise, experts):
    model = tuned(experts, xlora_depth=2, xlora_size=7, layerwise_scalings=layerwise, softmax_temperature=0.5).eval()
    model(input_ids=IDS)
    hidden = base()(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    logits = model.base_model.internal_xlora_classifier.layers(hidden)
    logits = logits.unflatten(-1, (4, 3)) if layerwise else logits.unsqueeze(2).expand(-1, -1, 4, -1)
    scalings = model.get_latest_scalings()
    torch.testing.assert_close(scalings, (logits / 0.5).softmax(-1))
    x = torch.randn(2, 4, 16)
    torch.testing.assert_close(layers(model)[0](x), weighed(layers(model)[0], x, scalings[:, :, 0]))
    model.base_model.set_global_scaling_weight(2.0)
    assert model.base_model.get_global_scaling_weight() == 2.0
    torch.testing.assert_close(layers(model)[0](x), weighed(layers(model)[0], x, scalings[:, :, 0], 2.0))


@torch.no_grad()
def test_the_best_experts_of_a_token_alone(experts):
    model = tuned(experts).eval()
    model(input_ids=IDS)
    scalings = model.get_latest_scalings()
    layer, x = layers(model)[1], torch.randn(2, 4, 24)
    model.base_model.set_topk_lora(2)
    least = scalings[:, :, 1].argmin(-1, keepdim=True)
    kept = scalings[:, :, 1].scatter(-1, least, 0.0)
    torch.testing.assert_close(layer(x), weighed(layer, x, kept))
    model.base_model.xlora_config.enable_softmax_topk = True
    again = scalings[:, :, 1].scatter(-1, least, -torch.inf).softmax(-1)
    torch.testing.assert_close(layer(x), weighed(layer, x, again))


@torch.no_grad()
def test_dora_experts_and_experts_on_embeddings(tmp_path):
    model = tuned(write_experts(tmp_path, ["v_proj", "embed_tokens"], use_dora=True)).eval()
    model(input_ids=IDS)
    embedding, linear = layers(model)[:2]
    scalings = model.get_latest_scalings()
    torch.testing.assert_close(embedding(IDS), weighed(embedding, IDS, scalings[:, :, 0]))
    x = torch.randn(2, 4, 16)
    torch.testing.assert_close(linear(x), weighed(linear, x, scalings[:, :, 1]))


def test_the_pass_for_the_classifier_may_use_the_experts(experts):
    model = tuned(experts).eval()
    y = model(input_ids=IDS).logits
    model.base_model.set_scaling_pass_value(None)
    classifier = model.base_model.internal_xlora_classifier
    assert classifier.override_scaling_pass_value == pytest.approx(1 / 3)
    assert not torch.equal(model(input_ids=IDS).logits, y)
    assert classifier.make_dummy_scalings(input_ids=IDS).shape == (2, 4, 4, 3)


def test_disabling_and_unloading(experts):
    model = tuned(experts).eval()
    plain, y = base()(input_ids=IDS).logits, model(input_ids=IDS).logits
    assert not torch.allclose(y, plain)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, plain)
    torch.testing.assert_close(model(input_ids=IDS).logits, y)
    torch.testing.assert_close(copy.deepcopy(model)(input_ids=IDS).logits, y)
    unloaded = model.unload()
    assert not unloaded._forward_pre_hooks and not layers(unloaded)
    torch.testing.assert_close(unloaded(input_ids=IDS).logits, plain)


@pytest.mark.parametrize("use_trainable_adapters", [False, True])
def test_what_is_trained(use_trainable_adapters, experts):
    model = tuned(experts, use_trainable_adapters=use_trainable_adapters).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        trained = "xlora_classifier" in name or (use_trainable_adapters and "lora_" in name)
        assert parameter.requires_grad == trained == (parameter.grad is not None), name


def test_generation_runs_without_a_cache(experts):
    model = tuned(experts).eval()
    greedy = IDS
    with torch.no_grad():
        for _ in range(3):
            greedy = torch.cat([greedy, model(input_ids=greedy).logits[:, -1:].argmax(-1)], dim=1)
    mask = torch.ones_like(IDS)
    assert torch.equal(model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=3, pad_token_id=0), greedy)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(input_ids=IDS, use_cache=True)


def test_the_log(experts):
    model = tuned(experts).eval()
    model.base_model.enable_scalings_logging()
    for ids in (IDS, IDS[:, :2], IDS):
        model(input_ids=ids)
    assert [len(entry[0]) for entry in model.get_scalings_log()] == [4, 2, 4]
    buckets = model.get_bucketed_scalings_log()
    assert {length: numbers for length, (numbers, _) in buckets.items()} == {4: [0, 2], 2: [1]}
    model.base_model.disable_scalings_logging()
    model(input_ids=IDS)
    assert len(model.get_scalings_log()) == 3
    model.base_model.clear_scalings_log()
    assert not model.get_scalings_log()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_whole_classifier_and_trained_experts_are_saved(low_cpu_mem_usage, experts, tmp_path):
    model = tuned(experts, xlora_depth=3, xlora_size=7, use_trainable_adapters=True).eval()
    with torch.no_grad():
        layers(model)[0].lora_A["0"].weight.add_(1)
        model.base_model.internal_xlora_classifier.layers[0].weight.add_(1)
    y = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, y)
    alone = PeftModel.from_pretrained(base(), tmp_path / "0")
    torch.testing.assert_close(
        layers(alone)[0].lora_A["0" if "0" in layers(alone)[0].lora_A else "default"].weight,
        layers(model)[0].lora_A["0"].weight,
    )


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)


@torch.no_grad()
def test_a_convolution_takes_a_batch_entrys_mean_weights():
    config = LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False)
    layer = get_peft_model(Pixels(), config, "a").base_model.model.conv
    settings = XLoraConfig(hidden_size=4, adapters={"a": ""})
    weighing = XLoraConv2dLayer(nn.Module(), layer, layer.forward, 0, settings)
    x, scalings = torch.randn(2, 3, 5, 5), torch.rand(2, 7, 1, 1)
    plain, whole = layer.base_layer(x), layer(x)
    expected = plain + scalings[:, :, 0, 0].mean(1).reshape(2, 1, 1, 1) * (whole - plain)
    torch.testing.assert_close(weighing.forward(x, scalings=scalings), expected)


def test_refusals(experts, tmp_path):
    with pytest.raises(ValueError, match="use_cache"):
        get_peft_model(base(use_cache=True), XLoraConfig(hidden_size=16, adapters=experts))
    with pytest.raises(ValueError, match="own name"):
        get_peft_model(base(), XLoraConfig(hidden_size=16, adapters={"default": experts["0"]}))
    with pytest.raises(ValueError, match="xlora_depth=0"):
        tuned(experts, xlora_depth=0)
    model = tuned(experts).eval()
    with pytest.raises(RuntimeError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="weighs all experts"):
        model.set_adapter("0")
    with pytest.raises(ValueError, match="belong together"):
        model.delete_adapter("0")
    layer = layers(model)[0]
    with pytest.raises(ValueError, match="tokens"):
        layer(torch.randn(2, 3, 16), scalings=torch.rand(2, 4, 4, 3))
    assert isinstance(layer.forward.__self__, XLoraLinearLayer)
    with pytest.warns(UserWarning, match="hidden_size"):
        XLoraConfig(adapters={})
    with pytest.warns(UserWarning, match="adapters"):
        XLoraConfig(hidden_size=4)
    with pytest.warns(UserWarning, match="top_k_lora"):
        XLoraConfig(hidden_size=4, adapters={}, enable_softmax_topk=True)
