# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Compiled models are one graph from the first call on, and follow every change of adapters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def adapted(quantised: bool, **options) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    if quantised:
        bnb = pytest.importorskip("bitsandbytes")
        layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
        layer.load_state_dict(base[0].state_dict())
        base[0] = layer.to("cpu")
    config = {"target_modules": ["0", "2"], "init_lora_weights": False, **options}
    model = get_peft_model(base, LoraConfig(r=2, **config))
    model.add_adapter("second", LoraConfig(r=3, **config))
    return model


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_dora": True, "lora_dropout": 0.5}, {}], ids=str)
def test_one_graph_that_follows_the_adapters(quantised, options):
    torch._dynamo.reset()
    model = adapted(quantised, **options).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    seen = []

    def check() -> None:
        expected = model(X)
        torch.testing.assert_close(compiled(X), expected)
        assert not any(torch.allclose(expected, other, atol=1e-4) for other in seen)
        seen.append(expected)

    first = compiled(X)  # before any eager call has worked anything out
    check()
    torch.testing.assert_close(first, seen[0])
    model.set_adapter("second")
    check()
    with model.disable_adapter():
        check()
    with torch.no_grad():
        model.base_model.model[0].lora_B["second"].weight.mul_(2)
    check()
    if not quantised:
        before = seen.pop()
        model.merge_adapter()
        check()
        torch.testing.assert_close(seen[-1], before)


def test_one_graph_through_the_backward_pass():
    torch._dynamo.reset()
    model = adapted(quantised=False, use_dora=True, lora_dropout=0.0).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for call in (compiled, model):
        model.zero_grad()
        call(X).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 6
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient)
