# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Adapters that are not where their base weight is: brought there; and models without values, on the meta device."""

from __future__ import annotations

import copy
import itertools
import re
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from peft import LoraConfig, PeftModel, dora, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.engine import devices, machine
from peft.engine.devices import brought_to_base
from peft.tuners.lora.layer import base
from peft.utils.warning import PeftWarning

X = torch.arange(8).view(2, 4) % 5
OPTIONS = {
    "lora": {},
    "dora": {"use_dora": True},
    "dora-dropout": {"use_dora": True, "lora_dropout": 0.3},
}
ALL = ["0", "1", "2"]  # an embedding, a convolution, a linear layer


def adapted(targets: list[str] = ALL, **options) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(5, 6), nn.Conv1d(4, 3, 3), nn.Linear(4, 5))
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
    return get_peft_model(base, config)


def move(model: nn.Module, what: str, device: str) -> None:
    """Move the modules of the parameters whose names hold `what`."""
    for name in [name for name, _ in model.named_parameters() if what in name]:
        model.get_submodule(name.rpartition(".")[0]).to(device)


def parts(options: dict) -> list[str]:
    return ["lora_A", "lora_B", "base_layer", *["magnitude"] * ("use_dora" in options)]


CASES = [(kind, part) for kind, options in OPTIONS.items() for part in parts(options)]


@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
@pytest.mark.parametrize(("kind", "part"), CASES)
def test_parts_of_a_linear_layer_on_meta(kind, part, called):
    model = adapted(["2"], **OPTIONS[kind])
    if called:
        model(X)
    move(model, part, "meta")
    with pytest.raises(RuntimeError, match=r"Linear: lora_\w+ of adapter 'default' is on \w+, the base weight on \w+"):
        model(X)


@pytest.mark.parametrize(
    ("target", "part", "use_dora"),
    [("0", part, use_dora) for part in ("lora_embedding_A", "lora_embedding_B") for use_dora in (False, True)]
    + [("1", part, use_dora) for part in ("lora_A", "lora_B") for use_dora in (False, True)]
    + [(target, "magnitude", True) for target in ("0", "1")],
)
def test_parts_of_other_layers_on_meta(target, part, use_dora):
    model = adapted([target], use_dora=use_dora)
    move(model, part, "meta")
    with pytest.raises(RuntimeError, match=f"{part}.* of adapter 'default' is on meta, the base weight on cpu"):
        model(X)


@pytest.mark.parametrize("kind", OPTIONS)
def test_an_adapter_that_was_not_loaded_is_refused(kind):
    saved = adapted(**OPTIONS[kind]).eval()
    state = get_peft_model_state_dict(saved)
    model = get_peft_model(saved.unload(), saved.peft_config["default"], low_cpu_mem_usage=True).eval()
    with pytest.raises(RuntimeError, match="load the adapter"):
        model(X)
    with pytest.raises(RuntimeError, match="load the adapter"):
        model.merge_adapter()
    with model.disable_adapter():
        model(X)
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    torch.testing.assert_close(model(X), adapted(**OPTIONS[kind]).eval()(X))


def test_another_error_is_left_as_it_is():
    layer = adapted(["1"]).base_model.model[1]
    with pytest.raises(RuntimeError, match="expected input"):
        layer(torch.randn(2, 3, 6))


@pytest.mark.works_with("torch", "shapes through models on the meta device")
@pytest.mark.parametrize("kind", OPTIONS)
def test_shapes_go_through_a_model_on_meta(kind):
    model, x = adapted(**OPTIONS[kind]).to("meta"), X.to("meta")
    for _ in range(2):
        y = model(x)
        y.sum().backward()
        assert y.is_meta and y.shape == (2, 3, 5)
        with torch.no_grad():
            assert model.eval()(x).shape == (2, 3, 5)
    assert all(p.grad.shape == p.shape for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.works_with("torch", "`FakeTensorMode`")
@pytest.mark.parametrize("kind", OPTIONS)
def test_shapes_go_through_a_model_of_fake_tensors(kind):
    model = adapted(**OPTIONS[kind])
    model(X)
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(parameter) for name, parameter in model.named_parameters()}
        for _ in range(2):
            y = functional_call(model, fakes, (mode.from_tensor(X),))
            y.sum().backward()
            assert y.shape == (2, 3, 5)
    assert torch.isfinite(model(X)).all()


APART = [(target, part) for target, parts in (("2", ("lora_A", "lora_B", "magnitude")), ("1", ("lora_B", "magnitude")),
                                              ("0", ("lora_embedding_A", "magnitude"))) for part in parts]  # fmt: skip


@pytest.mark.works_with("torch", "adapters on another device than the base")
@pytest.mark.parametrize(("target", "part"), APART)
def test_calls_with_an_adapter_apart(monkeypatch, target, part):
    """There is one device here: that a parameter is on another is told to the layer, and the call fails as it would."""
    model = adapted([target], use_dora=True, use_dora_triton=True)
    layer = model.base_model.model[int(target)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the CPU, which has no kernels
        expected = model(X)
    away = [parameter for name, parameter in layer.named_parameters() if part in name]
    why = f"{part} {target} is away"

    def fail(layer, x):
        raise RuntimeError("expected all tensors on one device")

    asked = []

    def apart_from_base(layer, names):
        asked.append(tuple(names))
        return [devices.Apart(why, False)] if away else []

    def is_elsewhere(tensor, device):
        return any(tensor is parameter for parameter in away)

    for module in (machine, base):
        monkeypatch.setattr(module, "apart_from_base", apart_from_base)
    monkeypatch.setattr(devices, "_is_elsewhere", is_elsewhere)
    layer.__dict__["_run"] = fail
    routes = []
    plan = dora.plan
    monkeypatch.setattr(dora, "plan", lambda **options: routes.append(options["away"]) or plan(**options))
    with pytest.warns(PeftWarning, match=why):
        y = model(X)
    torch.testing.assert_close(y, expected)
    asked.clear()
    torch.testing.assert_close(model(X), expected)
    assert asked == [("default",)]  # once a call
    assert set(routes) == {why} and why in dora.explain(model)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in away)
    away.clear()
    torch.testing.assert_close(model(X), expected)
    assert layer.__dict__["_run"] is not machine.AdapterLayer._forward_apart


def test_adapters_are_brought_for_the_call_alone():
    layer = adapted(["2"], use_dora=True).base_model.model[2]
    held = dict(layer.named_parameters())
    with pytest.raises(ZeroDivisionError), brought_to_base(layer, torch.device("meta")) as any_elsewhere:
        assert any_elsewhere and layer.lora_A["default"].weight.is_meta and not layer.base_layer.weight.is_meta
        _ = 1 / 0
    assert all(parameter is held[name] for name, parameter in layer.named_parameters())
    with brought_to_base(layer, torch.device("cpu")) as any_elsewhere:
        assert not any_elsewhere


@pytest.mark.gpu
@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize(("target", "part"), APART)
def test_parts_on_the_cpu_beside_a_gpu(target, part, triton):
    """The kernels, which are given addresses, never see those of host memory."""
    x = X.cuda()
    for called, record in itertools.product((False, True), repeat=2):
        model = adapted([target], use_dora=True, use_dora_triton=triton).cuda()
        with torch.set_grad_enabled(record):
            expected = copy.deepcopy(model)(x)
            if called:
                model(x)
            move(model, part, "cpu")
            for _ in range(2):
                y = model(x)
                torch.testing.assert_close(y, expected)
            assert not triton or re.search(
                rf"torch \(\w*{part}\w* of adapter 'default' is on cpu, the base weight on cuda", dora.explain(model)
            )
            if record:
                y.sum().backward()
                assert all(p.grad.device == p.device for n, p in model.named_parameters() if "lora_" in n)
            move(model, part, "cuda")
            torch.testing.assert_close(model(x), expected)
        torch.cuda.synchronize()


@pytest.mark.gpu
def test_input_away_from_the_base_weight():
    model = adapted(["2"], use_dora=True).cuda()
    move(model, "lora_A", "cpu")
    with pytest.raises(RuntimeError, match="x must be where the base weight is"):
        model.base_model.model[2](torch.randn(2, 4))
