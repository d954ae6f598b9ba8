# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The meeting points with DeepSpeed, accelerate, tensor parallelism and quantisers."""

import sys
import types
from contextlib import contextmanager

import accelerate
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, EncoderDecoderCache, LlamaConfig

from peft.utils import integrations
from peft.utils.integrations import (
    TpInfo,
    check_deepspeed_zero3_enabled,
    dequantize_bnb_weight,
    dequantize_module_weight,
    dtensor_from_local_like,
    gather_params_ctx,
    get_bnb_param_type,
    get_layer_device_map,
    init_empty_weights,
    map_cache_to_layer_device_map,
    skip_init_on_device,
)


# ZeRO-3
def test_gather_does_nothing_without_zero3(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # whoever imports it fails
    assert check_deepspeed_zero3_enabled() is False
    parameter = nn.Parameter(torch.ones(2))
    with gather_params_ctx(parameter):
        assert torch.equal(parameter, torch.ones(2))


def test_gather_hands_its_arguments_to_deepspeed(monkeypatch):
    events = []

    @contextmanager
    def gathered(params, modifier_rank=None, fwd_module=None):
        events.append((params, modifier_rank, fwd_module))
        yield
        events.append("closed")

    deepspeed = types.ModuleType("deepspeed")
    deepspeed.zero = types.SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    monkeypatch.setattr(integrations, "check_deepspeed_zero3_enabled", lambda: True)
    layer = nn.Linear(2, 2)
    with gather_params_ctx(layer.weight, modifier_rank=None, fwd_module=layer):
        assert events == [(layer.weight, None, layer)]
    assert events[-1] == "closed"
    with pytest.raises(KeyError), gather_params_ctx(layer.weight):
        raise KeyError


# empty weights
@skip_init_on_device
def make_real(**kwargs):
    return nn.Linear(2, 2, **kwargs)


def test_init_empty_weights_and_what_skips_it():
    outside = nn.Module.register_parameter
    with init_empty_weights():
        assert nn.Linear(2, 2).weight.is_meta
        assert not nn.BatchNorm1d(2).running_mean.is_meta
        assert not make_real().weight.is_meta
        with init_empty_weights():
            assert not make_real().weight.is_meta
        assert nn.Linear(2, 2).weight.is_meta
    with init_empty_weights(include_buffers=True):
        assert nn.BatchNorm1d(2).running_mean.is_meta
    assert not nn.Linear(2, 2).weight.is_meta
    assert make_real(device="meta").weight.is_meta
    with accelerate.init_empty_weights():
        assert make_real().weight.is_meta, "only our own context is skipped"
    assert nn.Module.register_parameter is outside


def test_init_empty_weights_closes_after_an_error():
    outside = nn.Module.register_parameter
    with pytest.raises(KeyError), init_empty_weights():
        raise KeyError
    assert nn.Module.register_parameter is outside and not integrations._outer_registrations


# device maps
@pytest.fixture
def model():
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=4, head_dim=4
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [
        ({"": 0}, {0: 0, 1: 0}),
        ({"model.layers.0": 0, "model.layers.1": 1, "lm_head": 1}, {0: 0, 1: 1}),
        ({"model.layers.0.self_attn": 0, "model.layers.0.mlp": 1, "model.layers.1": 2}, {0: 1, 1: 2}),
        ({"model": 0, "lm_head": 1}, {0: 0, 1: 0}),
        ({"model.layers": 1, "lm_head": 0}, {0: 1, 1: 1}),
        ({"model.layers.0": 1, "model.layers.1": "cpu"}, {0: 1, 1: 1}),
        ({"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.10": 3}, {0: 3, 1: 3}),
        ({"model.layers.0": "cpu", "model.layers.1": "disk"}, {0: "cpu", 1: "cpu"}),
        ({"model.vision.layers.0": 3, "model.layers.0": 0, "model.layers.1": 1}, {0: 0, 1: 1}),
        ({"transformer.h.0": 0, "transformer.h.1": 1}, {0: 0, 1: 1}),
        ({}, None),
    ],
)
def test_layer_device_map(model, device_map, expected):
    model.hf_device_map = device_map
    assert get_layer_device_map(model) == expected


def test_layer_device_map_names_a_layer_that_is_missing(model):
    assert get_layer_device_map(model) is None
    model.hf_device_map = {"model.layers.0": 0, "lm_head": 1}
    with pytest.raises(RuntimeError, match="layer 1"):
        get_layer_device_map(model)


def filled_cache():
    cache = DynamicCache()
    for index in range(2):
        cache.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), index)
    return cache


def test_cache_moves_to_the_layers(model):
    cache = filled_cache()
    map_cache_to_layer_device_map(model, cache)
    model.hf_device_map = {"model.layers.0": "meta", "model.layers.1": torch.device("cpu")}
    map_cache_to_layer_device_map(model, None)
    map_cache_to_layer_device_map(model, cache)
    assert [layer.keys.device.type for layer in cache.layers] == ["meta", "cpu"]
    assert [layer.values.device.type for layer in cache.layers] == ["meta", "cpu"]
    both = EncoderDecoderCache(filled_cache(), DynamicCache())
    map_cache_to_layer_device_map(model, both)
    assert [layer.keys.device.type for layer in both.self_attention_cache.layers] == ["meta", "cpu"]


# tensor parallelism
def test_dtensor_from_local_like(tmp_path):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        ref = distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)])
        made = dtensor_from_local_like(torch.zeros(4, 6), ref)
        assert isinstance(made, DTensor) and made.placements == ref.placements
        assert (made.shape, made.stride()) == (ref.shape, ref.stride())
        assert TpInfo(tp_plan={"q": "colwise"}, device_mesh=mesh, tp_size=1).tp_size == 1
    finally:
        torch.distributed.destroy_process_group()


# quantised weights
def test_dequantise_an_ordinary_layer():
    layer = nn.Linear(3, 2)
    assert dequantize_module_weight(layer) is layer.weight
    assert get_bnb_param_type(layer.weight) is False
    with pytest.raises(TypeError, match="Params4bit or Int8Params"):
        dequantize_bnb_weight(layer.weight)


def test_dequantise_bnb_layers():
    bnb = pytest.importorskip("bitsandbytes")
    four = bnb.nn.Linear4bit(64, 8, quant_type="nf4").to("cpu")
    eight = bnb.nn.Linear8bitLt(64, 8, has_fp16_weights=False).to("cpu")
    assert get_bnb_param_type(four.weight) == "4bit" and get_bnb_param_type(eight.weight) == "8bit"
    for layer, state in ((four, None), (eight, None), (eight, eight.state)):
        dense = dequantize_module_weight(layer)
        assert dense.shape == (8, 64) and dense.dtype == torch.float32 and not dense.requires_grad
        assert torch.equal(dequantize_bnb_weight(layer.weight, state=state), dense)
    before = dequantize_module_weight(eight)
    eight(torch.randn(2, 64))
    assert torch.equal(dequantize_module_weight(eight), before)
    assert torch.equal(dequantize_bnb_weight(eight.weight, eight.state), before)
    with pytest.raises(ValueError, match="state"):
        dequantize_bnb_weight(eight.weight)
    fresh = bnb.nn.Linear4bit(64, 8)
    assert torch.equal(dequantize_bnb_weight(fresh.weight), fresh.weight)
