# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Compiled models are one graph from the first call on, and follow every change of adapters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model, inject_adapter_in_model

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


class Broken(nn.Module):
    """Two layers, with something between them that no compiler can trace."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_trace_that_is_begun_anew(use_dora):
    """Adapters in a model that is none of ours, before any call: the compiler meets the break and starts again."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["first", "second"], use_dora=use_dora, init_lora_weights=False)
    model = inject_adapter_in_model(config, Broken())
    compiled = torch.compile(model, backend="eager")(X)
    torch.testing.assert_close(compiled, model(X))


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


class Graphs:
    """A compiler that keeps what Dynamo gives it."""

    def __init__(self, backend: str) -> None:
        self.backend, self.seen = backend, []

    def __call__(self, graph, inputs):
        self.seen.append(graph)
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)

    def calls_of(self, name: str) -> list[int]:
        """How often each graph calls an operator, in what it runs under checkpointing too."""
        parts = [[part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)] for graph in self.seen]
        return [sum(name in str(node.target) for part in graph for node in part.graph.nodes) for graph in parts]


def adapted_decoder(quantised: bool, device: str, layers: int = 3, **options) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if quantised:
        bnb = pytest.importorskip("bitsandbytes")
        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear):
                        packed = bnb.nn.Linear4bit(
                            child.in_features,
                            child.out_features,
                            bias=False,
                            compute_dtype=torch.float32,
                            quant_type="nf4",
                        )
                        packed.load_state_dict(child.state_dict())
                        setattr(parent, name, packed)
    model = model.to(device)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=True, **options)
    model = get_peft_model(model, config)
    model.enable_input_require_grads()
    return model


def train(model: nn.Module, steps: int = 3) -> list[float]:
    device = next(model.parameters()).device
    ids = torch.arange(24, device=device).view(2, 12) % 96
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compile_layers(model: nn.Module, backend: str) -> Graphs:
    torch._dynamo.reset()
    graphs = Graphs(backend)
    for layer in model.base_model.model.model.layers:
        layer.compile(fullgraph=True, backend=graphs)
    return graphs


@pytest.mark.parametrize(
    ("quantised", "checkpointing"),
    [(False, False), (True, False), (False, True)],
    ids=["dense", "nf4", "checkpointing"],
)
def test_decoder_layers_share_one_graph(quantised, checkpointing):
    """From the first step on: no break, nothing is compiled anew for the next layer or step, and the norm is one operator."""
    expected = train(adapted_decoder(quantised, "cpu"))
    model = adapted_decoder(quantised, "cpu")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    graphs = compile_layers(model, "aot_eager")
    found = train(model)
    assert graphs.calls_of("row_norm") == [7]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert found[-1] < found[0]


def test_layers_are_planned_anew_when_adapters_change():
    model = adapted_decoder(False, "cpu", layers=2)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    graphs = compile_layers(model, "eager")
    train(model, 1)
    model.set_adapter("second")
    expected = train(adapted_second(), 2)
    assert train(model, 2) == pytest.approx(expected, abs=1e-4)
    assert graphs.calls_of("row_norm") == [7, 0]


def adapted_second() -> nn.Module:
    model = adapted_decoder(False, "cpu", layers=2)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    train(model, 1)
    model.set_adapter("second")
    return model


def test_unloading_takes_the_hook_along():
    model = adapted_decoder(False, "cpu", layers=1).unload()
    assert not model._forward_pre_hooks


@pytest.mark.gpu
@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_decoder_layers_by_inductor_with_kernels(quantised, checkpointing):
    losses = []
    for compiled in (False, True):
        model = adapted_decoder(quantised, "cuda", use_dora_triton=True)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        graphs = compile_layers(model, "inductor") if compiled else None
        losses.append(train(model))
    assert graphs.calls_of("row_norm") == [7]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_compiled_into_cuda_graphs():
    """As `model.generate` does with a static cache: a new value is seen by the next replay."""
    torch._dynamo.reset()
    model = adapted_decoder(False, "cuda", layers=1, use_dora_triton=True).eval()
    model.disable_input_require_grads()  # torch 2.11 cannot trace that hook
    ids = torch.arange(12, device="cuda").view(1, 12)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for factor in (1.0, 1.0, 1.0, 1.5, 0.5):
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.mul_(factor)
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(input_ids=ids).logits.clone()
            torch.testing.assert_close(found, model(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
