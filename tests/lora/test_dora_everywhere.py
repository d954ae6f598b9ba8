# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA where other layers than linear ones and convolutions compute: stacked parameters, attention, activated tokens."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, PeftModel, get_peft_model
from peft.dora import stacked_norm, stacked_weight

torch.manual_seed(0)
X = torch.randn(3, 5, 8, dtype=torch.float64)
EXACT = {"rtol": 1e-9, "atol": 1e-10}


class Experts(nn.Module):
    """A stack and a single matrix, as expert layers have them."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 8))
        self.gate = nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        weights = torch.softmax(x @ self.gate.t(), -1)
        return sum(weights[..., e : e + 1] * (x @ self.up[e].t()) for e in range(3))


class Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        if not hasattr(self.body, "kdim"):
            return self.body(x)
        keys, values = x[..., : self.body.kdim], x[..., : self.body.vdim]
        return self.body(x, keys, values, need_weights=False)[0]


def build(kind):
    torch.manual_seed(0)
    if kind == "experts":
        return Net(Experts()).double()
    sizes = {"separate": {"kdim": 6, "vdim": 4}, "packed": {}}[kind]
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
    nn.init.normal_(attention.in_proj_bias)
    nn.init.normal_(attention.out_proj.bias)
    return Net(attention).double()


def options(kind, **more):
    where = {"target_parameters": ["body.up", "body.gate"], "target_modules": []}
    found = where if kind == "experts" else {"target_modules": ["body"]}
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "use_dora": True, "init_lora_weights": False, **found, **more})


def tuned(kind, **more):
    torch.manual_seed(1)
    model = get_peft_model(build(kind), options(kind, **more))
    return fill(model)


def fill(model, name="default"):
    torch.manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." not in key:
                continue
            if "magnitude" in key:
                parameter.mul_(0.5 + torch.rand_like(parameter))
            elif "lora_" in key:
                parameter.normal_(std=0.5)
    return model


def layers(model):
    """The layers that hold adapters: parameters' wrappers, or the attention and its out-projection."""
    return [module for module in model.modules() if hasattr(module, "lora_magnitude_vector")]


def with_adapter(layer, name, matrix, bias, base):
    """Matrix and bias with an adapter, by the definition, in gradient's reach of the factors and the magnitude.

    Args:
        matrix: `[n, out, in]`, the adapters before this one in it.
        base: The same without any.
    """
    count, out, _ = matrix.shape
    r = layer.r[name]
    a = layer.lora_A[name].weight.unflatten(0, (count, r))
    b = layer.lora_B[name].weight.reshape(out, r, count).permute(2, 0, 1)
    delta = layer.scaling[name] * b @ a * (base != 0)  # where the matrix has no weight, nothing is added
    norm = (base + delta).detach().norm(dim=-1)
    gain = (layer.lora_magnitude_vector[name].weight.reshape(norm.shape) / norm).unsqueeze(-1)
    shift = layer.lora_B[name].bias
    if shift is not None:
        bias = bias + gain.flatten() * layer.scaling[name] * shift
    return gain * (matrix + delta), bias


def reference(kind, model, names=("default",)):
    """The plain module's output with its weights replaced."""
    net = build(kind)
    tensors = {}
    for layer in layers(model):
        if kind == "experts":
            parameter = layer.parameter_name
            base = getattr(net.body, parameter)
            base = base if base.dim() == 3 else base[None]
            matrix, bias = base, None
            for name in names:
                matrix, bias = with_adapter(layer, name, matrix, bias, base)
            tensors[f"body.{parameter}"] = matrix.reshape(getattr(net.body, parameter).shape)
            continue
        if hasattr(layer, "head_dim"):
            prefix, attention = "body", net.body
            weights = (
                [("in_proj_weight", attention.in_proj_weight)]
                if kind == "packed"
                else [(f"{part}_proj_weight", getattr(attention, f"{part}_proj_weight")) for part in "qkv"]
            )
            bias_name, bias = "in_proj_bias", attention.in_proj_bias
        else:
            prefix, weights = "body.out_proj", [("weight", net.body.out_proj.weight)]
            bias_name, bias = "bias", net.body.out_proj.bias
        base = torch.block_diag(*[weight for _, weight in weights])[None]
        matrix = base
        for name in names:
            matrix, bias = with_adapter(layer, name, matrix, bias, base)
        row = column = 0
        for part, weight in weights:
            rows, columns = weight.shape
            tensors[f"{prefix}.{part}"] = matrix[0, row : row + rows, column : column + columns]
            row, column = row + rows, column + columns
        tensors[f"{prefix}.{bias_name}"] = bias
    return torch.func.functional_call(net, tensors, (X,))


KINDS = ["experts", "packed", "separate"]
WITH_BIAS = [("experts", False), *((kind, bias) for kind in KINDS[1:] for bias in (False, True))]


@pytest.mark.parametrize(("kind", "lora_bias"), WITH_BIAS)
def test_output_and_gradients(kind, lora_bias):
    model = tuned(kind, lora_bias=lora_bias).train()
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = model(X)
    truth = reference(kind, model)
    torch.testing.assert_close(y, truth, **EXACT)
    direction = torch.randn_like(y)
    ours = torch.autograd.grad(y, list(own.values()), direction)
    theirs = torch.autograd.grad(truth, list(own.values()), direction)
    for name, one, other in zip(own, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
        assert other.abs().max() > 0
    assert any("magnitude" in name for name in own)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_lora_in_the_same_places(kind):
    model = tuned(kind, use_dora=False)
    y = model(X)
    assert (y - build(kind)(X)).abs().max() > 1e-3
    torch.testing.assert_close(model.merge_and_unload()(X), y, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_fresh_adapter_changes_nothing(kind, use_dora):
    model = get_peft_model(build(kind), options(kind, use_dora=use_dora, init_lora_weights=True))
    torch.testing.assert_close(model(X), build(kind)(X), **EXACT)


def test_the_magnitude_counts_experts_and_rows():
    model = tuned("experts")
    shapes = {layer.parameter_name: layer.lora_magnitude_vector["default"].weight.shape for layer in layers(model)}
    assert shapes == {"up": (3, 6), "gate": (3,)}
    for kind in ("packed", "separate"):
        assert [layer.lora_magnitude_vector["default"].weight.shape for layer in layers(tuned(kind))] == [(24,), (8,)]


@pytest.mark.parametrize(("kind", "lora_bias"), WITH_BIAS)
def test_merged_unmerged_and_unloaded(kind, lora_bias):
    model = tuned(kind, lora_bias=lora_bias).eval()
    state = copy.deepcopy(model.state_dict())
    y = model(X)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(X), y, **EXACT)
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], **EXACT)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), build(kind)(X), **EXACT)
    plain = model.merge_and_unload()
    assert not any("lora" in key for key in plain.state_dict())
    torch.testing.assert_close(plain(X), y, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_act_one_after_the_other(kind):
    model = tuned(kind).eval()
    model.add_adapter("second", options(kind, r=3))
    fill(model, "second")
    model.base_model.set_adapter(["default", "second"])
    y = model(X)
    torch.testing.assert_close(y, reference(kind, model, ["default", "second"]), **EXACT)
    model.merge_adapter()
    torch.testing.assert_close(model(X), y, **EXACT)
    model.unmerge_adapter()
    model.delete_adapter("default")
    torch.testing.assert_close(model(X), reference(kind, model, ["second"]), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(kind, low_cpu_mem_usage, tmp_path):
    model = tuned(kind).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    torch.testing.assert_close(loaded(X), model(X), **EXACT)


def test_a_row_of_zeros_keeps_the_output_finite():
    net = build("experts")
    with torch.no_grad():
        net.body.up[1, 2] = 0
    config = options("experts", init_lora_weights=True, target_parameters=["body.up"])
    model = get_peft_model(net, config)
    model(X).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(model(X), net(X), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_rounded_once(dtype):
    torch.manual_seed(0)
    weight, a, b = torch.randn(2, 6, 8), torch.randn(2, 3, 8), torch.randn(2, 6, 3)
    magnitude = torch.rand(2, 6) + 0.5
    weight = weight.to(dtype)
    norm = stacked_norm(weight, a, b, 0.7)
    assert norm.dtype == torch.float32
    adapted = stacked_weight(weight, a, b, magnitude=magnitude, norm=norm, scaling=0.7)
    total = weight.double() + 0.7 * b.double() @ a.double()
    truth = magnitude.double()[..., None] * total / total.norm(dim=-1, keepdim=True)
    assert adapted.dtype == dtype
    torch.testing.assert_close(adapted.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    leaves = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 4, 5), (2, 2, 5), (2, 4, 2), (2, 4))]
    weight, a, b, magnitude = (leaf.requires_grad_() for leaf in leaves)
    norm = stacked_norm(weight, a, b, 0.7)
    function = lambda w, a, b, m: stacked_weight(w, a, b, magnitude=m, norm=norm, scaling=0.7)  # noqa: E731
    assert torch.autograd.gradcheck(function, (weight, a, b, magnitude))


# ---- activated tokens ----------------------------------------------------------------------------------------------
IDS = torch.tensor([[1, 3, 4, 5, 6], [3, 4, 1, 2, 7]])


def alora(**more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **sizes)).double().eval()
    config = LoraConfig(
        r=2, target_modules=["v_proj"], use_dora=True, alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM", **more
    )
    return fill(get_peft_model(base, config))


def test_alora_with_dora_acts_from_the_invocation_on(tmp_path):
    model = alora()
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    base = layer.base_layer(x)
    adapted = reference_linear(layer, x)
    y = layer(x, alora_offsets=[4, 5])
    torch.testing.assert_close(y[0, 0], base[0, 0], **EXACT)
    torch.testing.assert_close(y[0, 1:], adapted[0, 1:], **EXACT)
    torch.testing.assert_close(y[1], adapted[1], **EXACT)
    assert (adapted - base).abs().max() > 1e-3
    torch.testing.assert_close(layer(x), base, **EXACT)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert layer.lora_magnitude_vector["default"].weight.grad.abs().max() > 0
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    torch.testing.assert_close(again(input_ids=IDS).logits, alora()(input_ids=IDS).logits, **EXACT)


def reference_linear(layer, x):
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    total = layer.base_layer.weight + layer.scaling["default"] * b @ a
    return x @ (layer.lora_magnitude_vector["default"].weight / total.norm(dim=1) * total.t()).detach()


def test_alora_with_dora_is_not_merged():
    with pytest.raises(NotImplementedError, match="aLoRA"):
        alora().merge_adapter()


def test_a_batch_mixes_alora_with_dora_and_plain_dora():
    model = alora()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj"], use_dora=True))
    fill(model, "second")
    model.eval()
    both = model(input_ids=IDS, adapter_names=["default", "second"]).logits
    first = model(input_ids=IDS[:1]).logits
    model.set_adapter("second")
    second = model(input_ids=IDS[1:]).logits
    torch.testing.assert_close(both, torch.cat([first, second]), **EXACT)


class TransposedExperts(Experts):
    """The same with its stack `[experts, in, out]`."""

    is_transposed = True

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(self.up.detach().mT.contiguous())

    def forward(self, x):
        weights = torch.softmax(x @ self.gate.t(), -1)
        return sum(weights[..., e : e + 1] * (x @ self.up[e]) for e in range(3))


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_transposed_stack_has_the_adapter_and_the_gains_of_the_stack_itself(use_dora):
    plain = tuned("experts", use_dora=use_dora)
    torch.manual_seed(0)
    model = get_peft_model(Net(TransposedExperts()).double(), options("experts", use_dora=use_dora))
    fill(model)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    expected = {key: p for key, p in plain.named_parameters() if p.requires_grad}
    assert {key: p.shape for key, p in trained.items()} == {key: p.shape for key, p in expected.items()}
    y = plain(X)
    torch.testing.assert_close(model(X), y, **EXACT)
    grads = torch.autograd.grad(y.square().sum(), list(expected.values()))
    for key, grad in zip(expected, grads, strict=True):
        (found,) = torch.autograd.grad(model(X).square().sum(), [trained[key]])
        torch.testing.assert_close(found, grad, **EXACT)
    model.merge_adapter()
    torch.testing.assert_close(model(X), y, **EXACT)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), y, **EXACT)
