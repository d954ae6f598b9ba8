# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA under `torch.compile` and `torch.func`, trained: the norm is that of the factors as they are now, not as they were
when a graph was traced, and nothing breaks the graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from peft import LoraConfig, get_peft_model


class Around(nn.Module):
    """A model of one layer and a product, so that a compiler has something to fuse."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)


def nf4() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), lambda: torch.randn(2, 5, 6)),
    "nf4": (nf4, lambda: torch.randn(2, 5, 64)),
    "embedding": (lambda: nn.Embedding(16, 8), lambda: torch.arange(10).view(2, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3, groups=2), lambda: torch.randn(2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1), lambda: torch.randn(2, 3, 6, 6)),
}
MODES = {
    "evaluated": {},
    "trained": {},
    "dropout": {"lora_dropout": 0.5},
    "two": {},
    "wider": {},
}


def adapted(layer: str, mode: str) -> nn.Module:
    torch.manual_seed(0)
    base = Around(LAYERS[layer][0]())
    base.is_loaded_in_4bit = layer == "nf4"
    config = LoraConfig(
        target_modules=["layer"], r=2, lora_alpha=4, use_dora=True, init_lora_weights=False, **MODES[mode]
    )
    if mode == "wider":
        base.half()
    model = get_peft_model(base, config)
    if mode == "two":
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    return model.train(mode != "evaluated")


def run(model: nn.Module, x: torch.Tensor, mode: str) -> list[torch.Tensor]:
    """The output and what is left behind for the optimizer."""
    torch.manual_seed(1)
    with torch.set_grad_enabled(mode != "evaluated"):
        y = model(x)
    if mode == "evaluated":
        return [y]
    model.zero_grad()
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_graph_follows_what_an_optimizer_writes(layer, mode):
    if mode == "wider" and layer == "nf4":
        pytest.skip("its weight has no half precision of its own")
    torch._dynamo.reset()
    model = adapted(layer, mode)
    x = LAYERS[layer][1]()
    x = x.half() if mode == "wider" and x.is_floating_point() else x
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    run(compiled, x, mode)
    for step in range(2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:  # as an optimizer that leaves no trace
                    parameter.data.mul_(1.5 + step).add_(0.1)
        expected = run(copy.deepcopy(model), x, mode)
        for found, truth in zip(run(compiled, x, mode), expected, strict=True):
            error = (found.double() - truth.double()).norm() / truth.double().norm()
            assert error < (5e-3 if mode == "wider" else 1e-5)


@pytest.mark.parametrize("mode", ["trained", "dropout"])
@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer != "nf4"])
def test_gradients_of_a_function_of_all_parameters(layer, mode):
    """Base weights too are arguments then, and have no address."""
    model, x = adapted(layer, mode), LAYERS[layer][1]()

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        torch.manual_seed(1)
        return functional_call(model, parameters, (x,)).square().sum()

    for step in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data.add_(0.1 * step)
        found = grad(loss)({name: p.detach().clone() for name, p in model.named_parameters()})
        run(model, x, mode)
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == 3
        for name, gradient in trained.items():
            torch.testing.assert_close(
                found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
