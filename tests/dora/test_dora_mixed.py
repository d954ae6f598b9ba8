# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A batch with several adapters, decoded without a gradient: each row as with its own adapter alone, in a few launches."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from peft import LoraConfig, get_peft_model
from peft.engine.machine import index_of, sorted_by_adapter
from peft.tuners.lora import LoraLayer

WIDTH = 32
BATCHES = {
    "two": ["a", "a", "b", "b"],
    "two in turn": ["a", "b", "a", "b", "b"],
    "three and none": ["c", "__base__", "a", "b", "__base__", "c"],
    "plain beside dora": ["plain", "a", "plain", "c"],
    "one": ["b", "b", "b"],
    "none": ["__base__", "__base__"],
    "many rows": ["a", "b"] * 9,
}


def make_model(body, monkeypatch, dtype=torch.float32):
    monkeypatch.setattr(LoraLayer, "dora_route", lambda self, name: body.route)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH, bias=False))
    shared = {"target_modules": ["0", "2"], "init_lora_weights": False}
    model = get_peft_model(net, LoraConfig(r=4, use_dora=True, **shared), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=7, use_dora=True, lora_bias=True, **shared))
    model.add_adapter("c", LoraConfig(r=4, use_dora=True, lora_alpha=1, **{**shared, "target_modules": ["0"]}))
    model.add_adapter("plain", LoraConfig(r=4, **shared))
    return model.to(device=body.device, dtype=dtype).eval()


def expected_rows(model, x, names):
    """Row by row with one adapter switched on."""
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(x[i : i + 1]))
        else:
            model.set_adapter(name)
            rows.append(model(x[i : i + 1]))
    return torch.cat(rows)


@pytest.mark.parametrize("names", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_each_row_as_alone(body, monkeypatch, names, tokens):
    model = make_model(body, monkeypatch)
    x = torch.randn(len(names), tokens, WIDTH, device=body.device)
    with torch.no_grad():
        expected = expected_rows(model, x, names)
        for _ in range(2):
            found = model(x, adapter_names=names)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    recorded = model(x, adapter_names=names)
    torch.testing.assert_close(recorded.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wider_adapters_and_autocast(body, monkeypatch, dtype):
    if dtype not in body.dtypes:
        pytest.skip(f"{body.name} does not compute in {dtype}")
    model = make_model(body, monkeypatch)
    for layer in model.base_model.model:
        if hasattr(layer, "base_layer"):
            layer.base_layer.to(dtype)
    names = BATCHES["three and none"]
    x = torch.randn(len(names), 2, WIDTH, device=body.device, dtype=dtype)
    with torch.no_grad():
        for autocast in (False, True):
            with torch.autocast(body.device, dtype, enabled=autocast):
                expected, found = expected_rows(model, x, names), model(x, adapter_names=names)
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_changes_between_batches_are_seen(body, monkeypatch):
    model = make_model(body, monkeypatch)
    names = BATCHES["two in turn"]
    x = torch.randn(len(names), WIDTH, device=body.device)
    with torch.no_grad():
        before = model(x, adapter_names=names)
        for name, parameter in model.named_parameters():
            if ".b." in name or "magnitude" in name:
                parameter.data.mul_(1.5)
        found, expected = model(x, adapter_names=names), expected_rows(model, x, names)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, before, atol=1e-3)
        model.delete_adapter("a")
        with pytest.raises(ValueError, match="'a'"):
            model(x, adapter_names=names)
        torch.testing.assert_close(model(x[:1], adapter_names=["b"]), expected_rows(model, x[:1], ["b"]))


def test_a_hook_is_called(body, monkeypatch):
    """Somebody's hook on a module of the layer sends the batch through the modules."""
    model = make_model(body, monkeypatch)
    names = BATCHES["two"]
    x = torch.randn(len(names), WIDTH, device=body.device)
    with torch.no_grad():
        expected = model(x, adapter_names=names)
        seen = []
        layer = model.base_model.model[0]
        layer.base_layer.register_forward_hook(lambda *args: seen.append(1))
        torch.testing.assert_close(model(x, adapter_names=names), expected, rtol=1e-4, atol=1e-5)
    assert seen == [1]


def test_order_of_a_batch():
    groups, order, back = sorted_by_adapter(("b", "a", "b", "c"))
    assert groups == {"b": slice(0, 2), "a": slice(2, 3), "c": slice(3, 4)}
    assert order == (0, 2, 1, 3) and [order[i] for i in back] == [0, 1, 2, 3]
    assert sorted_by_adapter(("a", "a", "b"))[1] is None
    assert index_of(order, torch.device("cpu")) is index_of(order, torch.device("cpu"))


def launches_of(function):
    """The kernels that the device runs in `function`, copies and fills left out, once what it keeps is there."""
    for _ in range(4):
        function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        function()
        torch.cuda.synchronize()
    events = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = "Memcpy", "Memset", "FillFunctor"  # deterministic algorithms fill what is allocated
    return [event.name for event in events if not any(name in event.name for name in copies)]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("quantised", [False, True], ids=["bf16", "nf4"])
def test_launches_beyond_the_base(batch, quantised):
    """A decoded token: an adapter may add three launches a layer to the base's, and two to the whole model; a second one in
    the batch, those of its own rows and of their order."""
    layers = [nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False)]
    if quantised:
        bnb = pytest.importorskip("bitsandbytes")
        for i, layer in enumerate(layers):
            weight = layer.weight.data
            layers[i] = bnb.nn.Linear4bit(
                weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            layers[i].weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    net = nn.Sequential(*layers).to(device="cuda", dtype=torch.bfloat16).eval()
    x = torch.randn(batch, 1, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        base = launches_of(lambda: net(x))
        config = LoraConfig(r=16, use_dora=True, use_dora_triton=True, target_modules=["0", "1"])
        model = get_peft_model(net, config, autocast_adapter_dtype=False).eval()
        ours = launches_of(lambda: model(x))
        model.add_adapter("second", config)
        model.base_model.to(torch.bfloat16)
        names = (["default", "second"] * batch)[:batch]
        mixed = launches_of(lambda: model(x, adapter_names=names))
    assert len(ours) <= len(base) + 3 * len(layers) + 2, ours
    # Four bits are unpacked, multiplied by cuBLAS and composed for more than one row; else one launch does it all.
    one, two = (3, 8) if quantised and batch > 1 else (1, 6)
    assert len(ours) <= one * len(layers) + 2, ours
    assert len(mixed) <= two * len(layers) + 2, mixed
