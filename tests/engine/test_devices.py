# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Adapters that are not where their base weight is: refused in words; and models without values, on the meta device."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

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
    with pytest.raises(RuntimeError, match="load the adapter first"):
        model(X)
    with pytest.raises(RuntimeError, match="load the adapter first"):
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


@pytest.mark.gpu
@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize(("kind", "part"), [case for case in CASES if case[0] == "dora"])
def test_parts_on_the_cpu_beside_a_gpu(kind, part, triton):
    """The kernels, which are given addresses, never see those of host memory."""
    x = X.cuda()
    for called, record in itertools.product((False, True), repeat=2):
        model = adapted(["2"], **OPTIONS[kind], use_dora_triton=triton).cuda()
        with torch.set_grad_enabled(record):
            if called:
                expected = model(x)
            move(model, part, "cpu")
            with pytest.raises(RuntimeError, match="of adapter 'default' is on .*, the base weight on"):
                model(x)
            move(model, part, "cuda")
            y = model(x)
        torch.cuda.synchronize()
        assert torch.isfinite(y).all()
        if called:
            torch.testing.assert_close(y, expected)
