# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Passes that run out of memory are done in chunks, once; NaN is found and named."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftWarning, dora, get_peft_model
from peft.dora import autograd


def adapted(**options) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16, bias=options.pop("base_bias", False)), nn.Tanh(), nn.Linear(16, 6))
    config = {"r": 3, "target_modules": ["0", "2"], "init_lora_weights": False, "use_dora": True, **options}
    return get_peft_model(base, LoraConfig(**config))


X = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(1))


class Memory:
    """Room for passes over so many tokens; counts those that did not fit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, forward: int, backward: int) -> None:
        self.failures = {"forward": 0, "backward": 0}
        run, gradients = autograd.Call.run, autograd._gradients

        def run_in(call, x, *args, **kwargs):
            y = run(call, x, *args, **kwargs)
            return self.within("forward", forward, x, y)

        def gradients_in(ctx, factors, dy, *args):
            return self.within("backward", backward, dy, gradients(ctx, factors, dy, *args))

        monkeypatch.setattr(autograd.Call, "run", run_in)
        monkeypatch.setattr(autograd, "_gradients", gradients_in)

    def within(self, kind, limit, tensor, result):
        if tensor.numel() // tensor.shape[-1] > limit:
            self.failures[kind] += 1
            raise torch.OutOfMemoryError("out of memory (simulated)")
        return result


def outputs_and_gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_(True)
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


OPTIONS = [
    {},
    {"base_bias": True, "bias": "all"},
    {"base_bias": True, "use_dora": False, "lora_bias": True, "bias": "lora_only"},
    {"use_dora": False},
    {"base_bias": True, "lora_dropout": 0.0},
]


@pytest.mark.works_with("torch", "a pass that ran out of memory: once more in chunks")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("forward", "backward"), [(5, 10**6), (10**6, 5), (5, 5)])
def test_the_same_output_and_gradients_in_chunks(monkeypatch, options, forward, backward):
    expected = outputs_and_gradients(adapted(**options), X)
    model = adapted(**options)
    memory = Memory(monkeypatch, forward, backward)
    with pytest.warns(PeftWarning, match="35 tokens: it is tried once more in 8 chunks"):
        found = outputs_and_gradients(model, X)
    assert memory.failures == {"forward": 2 * (forward == 5), "backward": 2 * (backward == 5 < forward)}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_inference_in_chunks(monkeypatch):
    with torch.no_grad():
        expected = adapted()(X)
        model = adapted()
        Memory(monkeypatch, 5, 0)
        with pytest.warns(PeftWarning, match="tried once more"):
            torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("limits", [(3, 10**6), (10**6, 3)], ids=["forward", "backward"])
def test_a_second_failure_is_raised_and_leaves_the_model_usable(monkeypatch, limits):
    model = adapted()
    expected = outputs_and_gradients(adapted(), X)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memory = Memory(patch, *limits)
        with pytest.raises(torch.OutOfMemoryError, match="simulated"):
            outputs_and_gradients(model, X)
        assert sum(memory.failures.values()) == 2  # the whole and the first of its chunks, nothing after that
    for a, b in zip(outputs_and_gradients(model, X), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_one_token_cannot_be_split(monkeypatch):
    model = adapted()
    memory = Memory(monkeypatch, 0, 0)
    with pytest.raises(torch.OutOfMemoryError), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X[0, :1])
    assert memory.failures["forward"] == 1


@pytest.mark.gpu
def test_out_of_memory_for_real():
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["0"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(4096, 4096, bias=False)).cuda(), config)
    x = torch.randn(2**16, 4096, device="cuda")
    with torch.no_grad():
        expected = model(x).cpu()
        twice = torch.cat([x, x])
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 1.1 * x.nbytes) / total)
        try:
            with pytest.raises(torch.OutOfMemoryError), pytest.warns(PeftWarning, match="tried once more"):
                model(twice)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        torch.testing.assert_close(model(x).cpu(), expected)


# ---- NaN -----------------------------------------------------------------------------------------------------------
def test_all_is_finite():
    model = adapted()
    dora.check_finite(model)
    model(X).sum().backward()
    dora.check_finite(model)


@pytest.mark.works_with("torch", "NaN and infinity named by layer and parameter: `peft.dora.check_finite`")
@pytest.mark.parametrize(
    "what", ["lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight"]
)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_layer_and_the_parameter_are_named(what, gradient, value):
    model = adapted()
    model(X).sum().backward()
    parameter = model.base_model.model[2].get_parameter(what)
    target = parameter.grad if gradient else parameter.data
    target.view(-1)[1] = value
    count = "1 NaN and 0 infinite" if value != value else "0 NaN and 1 infinite"
    place = f"{'gradient of ' if gradient else ''}{what} in base_model.model.2: {count} of {parameter.numel()}"
    with pytest.raises(FloatingPointError) as error:
        dora.check_finite(model)
    assert str(error.value).splitlines() == ["Not finite:", f"  {place}"]


def test_frozen_adapters_and_other_trained_parameters_are_looked_at():
    model = adapted(modules_to_save=None)
    model.base_model.model[0].lora_A["default"].weight.requires_grad_(False).data[0, 0] = float("nan")
    head = nn.Sequential(model, nn.Linear(6, 2))
    head[1].bias.data[0] = float("inf")
    with pytest.raises(FloatingPointError) as error:
        dora.check_finite(head)
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == [
        "lora_A.default.weight in 0.base_model.model.0",
        "bias in 1",
    ]
    base = adapted()
    base.base_model.model[0].base_layer.weight.data.fill_(float("nan"))
    dora.check_finite(base)  # frozen weights are the user's


def test_many_places_are_counted():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(9)))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"weight in 0: 1 NaN and 0 infinite of 1\n(.*\n)*  and 8 more"):
        dora.check_finite(model)
