# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Factors of adapters that are cut as the plan of tensor parallelism cuts their base layers."""

from __future__ import annotations

import pytest
import torch
from test_tensor_parallel import model_of
from tiny import TARGETS, adapted
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaForCausalLM

from peft.tuners.lora.layer import LoraEmbeddingATPHolder
from peft.tuners.lora.model import add_lora_tp_hooks_dtensor, get_tp_plan_and_mesh

STYLES = {name: "rowwise" if name in ("o_proj", "down_proj") else "colwise" for name in TARGETS}


def own(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    return tensor.chunk(torch.distributed.get_world_size(), axis)[torch.distributed.get_rank()]


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def mesh() -> torch.distributed.DeviceMesh:
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def styles(folder: str) -> dict[str, str | None]:
    base = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    found = {}
    for name, _ in base.named_modules():
        style, devices = get_tp_plan_and_mesh(base, name)
        assert (style is None) == (devices is None)
        if style is not None:
            assert devices.size() == torch.distributed.get_world_size() and devices.ndim == 1
            found[name] = style
    return found


def cut(style: str, given: str, bias: bool = False) -> dict[str, torch.Tensor]:
    """The output and the whole gradients of a factor that was cut, from a whole one or from this rank's part."""
    base, r, rows = nn.Linear(10, 6), 3, 5
    module = nn.Linear(r, 6, bias=bias) if style == "colwise" else nn.Linear(10, r, bias=bias)
    axis = 0 if style == "colwise" else 1
    weight, offset = values(*module.weight.shape), values(module.out_features)
    if given == "part":
        weight = own(weight, axis)
        offset = own(offset, 0) if style == "colwise" else offset
    module.weight = nn.Parameter(weight)
    if bias:
        module.bias = nn.Parameter(offset)
    add_lora_tp_hooks_dtensor(module, style, mesh(), base_layer=base, module_name="factor")
    x = values(rows, module.in_features)
    x = (x if style == "colwise" else own(x, 1).clone()).requires_grad_()
    y = module(x)
    y.square().sum().backward()
    found = {"y": y.detach(), "x": x.grad, "weight": module.weight.grad.full_tensor()}
    return found | ({"bias": module.bias.grad.full_tensor()} if bias else {})


def truth(style: str, bias: bool) -> dict[str, torch.Tensor]:
    module = nn.Linear(3, 6, bias=bias) if style == "colwise" else nn.Linear(10, 3, bias=bias)
    module.weight = nn.Parameter(values(*module.weight.shape))
    if bias:
        module.bias = nn.Parameter(values(module.out_features))
    x = values(5, module.in_features).requires_grad_()
    y = module(x)
    y.square().sum().backward()
    found = {"y": y.detach(), "x": x.grad, "weight": module.weight.grad}
    return found | ({"bias": module.bias.grad} if bias else {})


def looked_up() -> tuple[torch.Tensor, torch.Tensor]:
    a = nn.Parameter(values(3, 8))
    holder = LoraEmbeddingATPHolder(a)
    add_lora_tp_hooks_dtensor(
        holder, "embedding_rowwise", mesh(), base_layer=nn.Embedding(8, 4), module_name="lora_embedding_A"
    )
    y = holder(torch.tensor([[0, 7, 3], [3, 4, 1]]))
    y.square().sum().backward()
    return y.detach(), holder.weight.grad.full_tensor()


def whole_model(folder: str) -> torch.Tensor:
    """The output of a split model whose adapter's factors were cut too, with plain modules around them."""
    base = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    model = adapted(base, use_dora=False)
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A") or not layer.lora_A:
            continue
        style, devices = get_tp_plan_and_mesh(base, name)
        factor = layer.lora_B if style == "colwise" else layer.lora_A
        add_lora_tp_hooks_dtensor(
            factor["default"], style, devices, base_layer=layer.get_base_layer(), module_name=name
        )
    with torch.no_grad():
        return model(input_ids=torch.arange(8)[None]).logits


def test_styles_of_modules(two, tmp_path):
    model_of("dora").save_pretrained(tmp_path)
    found = two.run(styles, str(tmp_path))
    assert found[0] == found[1]
    for leaf, style in STYLES.items():
        for layer in range(2):
            block = "mlp" if leaf in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            assert found[0].pop(f"model.layers.{layer}.{block}.{leaf}") == style
    assert found[0] == {"lm_head": "colwise_gather_output", "model.embed_tokens": "embedding_rowwise"}


def test_a_whole_model_has_no_plan():
    assert get_tp_plan_and_mesh(model_of("dora"), "lm_head") == (None, None)
    assert get_tp_plan_and_mesh(nn.Sequential(nn.Linear(2, 2)), "0") == (None, None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("given", ["whole", "part"])
def test_columns_of_b(two, given, bias):
    expected = truth("colwise", bias)
    for rank, found in enumerate(two.run(cut, "colwise", given, bias)):
        torch.testing.assert_close(found["y"], expected["y"].chunk(2, 1)[rank])
        for key in expected.keys() - {"y"}:
            torch.testing.assert_close(found[key], expected[key])


@pytest.mark.parametrize("given", ["whole", "part"])
def test_rows_of_a(two, given):
    expected = truth("rowwise", False)
    for rank, found in enumerate(two.run(cut, "rowwise", given)):
        torch.testing.assert_close(found["x"], expected["x"].chunk(2, 1)[rank])
        for key in ("y", "weight"):
            torch.testing.assert_close(found[key], expected[key])


def test_tokens_of_an_embedding(two):
    table = values(3, 8).t().clone().requires_grad_()
    y = nn.functional.embedding(torch.tensor([[0, 7, 3], [3, 4, 1]]), table)
    y.square().sum().backward()
    for found, gradient in two.run(looked_up):
        torch.testing.assert_close(found, y.detach())
        torch.testing.assert_close(gradient, table.grad)


def test_a_model_whose_factors_are_cut(two, tmp_path):
    model_of("dora").save_pretrained(tmp_path)
    with torch.no_grad():
        expected = adapted(model_of("dora"), use_dora=False)(input_ids=torch.arange(8)[None]).logits
    for found in two.run(whole_model, str(tmp_path)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_holder_shares_the_values_of_a():
    a = nn.Parameter(values(3, 8))
    holder = LoraEmbeddingATPHolder(a)
    assert isinstance(holder, nn.Embedding) and (holder.num_embeddings, holder.embedding_dim) == (8, 3)
    assert holder.weight.data_ptr() == a.data_ptr() and holder.weight.requires_grad
    torch.testing.assert_close(holder(torch.tensor([2])), a[:, 2][None])
    assert not LoraEmbeddingATPHolder(nn.Parameter(values(3, 8), requires_grad=False)).weight.requires_grad


@pytest.mark.parametrize(
    "style", ["colwise_gather_output", "packed_colwise", "replicate", "unknown", "embedding_rowwise"]
)
def test_styles_that_cut_no_factor(style):
    with pytest.raises(ValueError, match=f"tp_plan_name='{style}' does not cut the.B"):
        add_lora_tp_hooks_dtensor(nn.Linear(3, 6), style, None, base_layer=nn.Linear(10, 6), module_name="the.B")


def of_another_size() -> str:
    with pytest.raises(ValueError) as refused:
        add_lora_tp_hooks_dtensor(nn.Linear(3, 4), "colwise", mesh(), base_layer=nn.Linear(10, 6), module_name="the.B")
    return str(refused.value)


def test_a_factor_of_another_size(two):
    for message in two.run(of_another_size):
        assert "has 4 entries; give it the 6 of the whole base layer, or the 3 of this rank" in message
