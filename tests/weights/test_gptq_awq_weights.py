# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""GPTQ's and AWQ's weights: read as gptqmodel reads them, written, restored bit for bit, and adapted."""

import itertools

import pytest
import torch
from torch import nn

from cases import Format
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.weights import find_weight
from quantisers import QUANTISERS

gptqmodel = pytest.importorskip("gptqmodel")
HALVES = (torch.float16, torch.bfloat16)


def build(quant, bits, group_size=32, shape=(96, 64), dtype=torch.float16, **settings):
    """A layer of random weights, and what reads it: gptqmodel."""
    torch.manual_seed(0)
    form = Format("", dtype, quant, settings={"bits": bits, "group_size": group_size, **settings})
    linear = nn.Linear(*shape[::-1]).requires_grad_(False)
    return QUANTISERS[quant].build(linear, form)


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def stored(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


LAYERS = [
    *(("gptq", bits, {"desc_act": order}) for bits in (2, 3, 4, 5, 6, 8) for order in (False, True)),
    *(("awq", bits, {}) for bits in (2, 3, 4, 8)),
]


@pytest.mark.parametrize(("quant", "bits", "settings"), LAYERS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "group_size"), [((96, 64), 16), ((64, 96), 32), ((32, 128), 128)])
def test_reads_as_gptqmodel_does(quant, bits, settings, dtype, shape, group_size):
    layer = build(quant, bits, group_size, shape, dtype, **settings)
    weight, dense = find_weight(layer), QUANTISERS[quant].dense(layer)
    assert (weight.format, weight.shape, weight.dtype, weight.lossy) == (quant, shape, dtype, True)
    assert torch.equal(weight.dense(), dense) and torch.equal(weight.dense(torch.float64), dense.double())
    assert torch.equal(QUANTISERS[quant].dense(layer.train()), dense)
    for a, b in ((0, 1), (5, 11), (7, 7), (31, shape[0])):
        assert torch.equal(weight.rows(a, b), dense[a:b])


@pytest.mark.parametrize(("quant", "bits", "settings"), LAYERS)
def test_writes_and_restores(quant, bits, settings):
    layer = build(quant, bits, **settings)
    weight, before, dense = find_weight(layer), stored(layer), QUANTISERS[quant].dense(layer)
    buffer, key, snapshot = layer.qweight, weight.key(), weight.snapshot()
    weight.write(dense.float())
    assert same(stored(layer), before), "what is stored already changed"
    matrix = torch.randn(96, 64)
    for _ in range(2):
        weight.write(matrix)
        assert weight.key() != key and layer.qweight is buffer
        assert torch.equal(QUANTISERS[quant].dense(layer), weight.dense())
        form = Format("", torch.float16, quant, settings={"bits": bits, "group_size": 32, **settings})
        assert relative(weight.dense(), matrix) <= 1.05 * relative(
            QUANTISERS[quant].requantised(matrix, layer, form), matrix
        )
        weight.restore(snapshot)
        assert same(stored(layer), before)
    weight.write(1.5 * dense.float())  # as DoRA's gain does
    assert relative(weight.dense(), 1.5 * dense.float()) < 1e-3


def test_writing_in_pieces_gives_the_same(monkeypatch):
    whole, pieces = build("awq", 4), build("awq", 4)
    matrix = torch.randn(96, 64)
    find_weight(whole).write(matrix)
    monkeypatch.setattr("peft.weights.gptq.CHUNK_BYTES", 1)
    find_weight(pieces).write(matrix)
    assert same(stored(whole), stored(pieces))


def test_write_refuses_what_does_not_fit():
    layer = build("gptq", 4)
    before = stored(layer)
    for wrong in (torch.randn(64, 96), torch.ones(96, 64, dtype=torch.int32)):
        with pytest.raises(ValueError, match="gptq TorchLinear"):
            find_weight(layer).write(wrong)
    assert same(stored(layer), before)


@pytest.mark.parametrize("quant", ["gptq", "awq"])
def test_rows_build_no_more_than_they_need(quant, monkeypatch):
    weight = find_weight(build(quant, 4))
    sizes = []
    real = type(weight)._codes
    monkeypatch.setattr(type(weight), "_codes", lambda self, a, b: sizes.append((a, b)) or real(self, a, b))
    weight.rows(10, 13)
    assert sizes == [(10, 13)]


@pytest.mark.parametrize("quant", ["gptq", "awq"])
def test_key_tells_changes(quant):
    layer = build(quant, 4)
    weight = find_weight(layer)
    keys = [weight.key()]
    weight.dense(), weight.rows(0, 3), weight.snapshot(), layer(torch.randn(2, 64).half())
    assert weight.key() == keys[0] == find_weight(layer).key()
    layer.scales.mul_(2)
    keys.append(weight.key())
    layer.qzeros = layer.qzeros + 1
    keys.append(weight.key())
    layer.qweight.data = layer.qweight.data.clone()
    keys.append(weight.key())
    assert all(a != b for a, b in itertools.combinations(keys, 2))
    assert [weight.has_key(key) for key in keys] == [False] * (len(keys) - 1) + [True]


@pytest.mark.parametrize("quant", ["gptq", "awq"])
def test_direct(quant):
    layer = build(quant, 4)
    weight, x = find_weight(layer), torch.randn(3, 64).half()
    assert weight.direct() and weight.compute_dtype == (None if quant == "gptq" else torch.float16)
    assert relative(nn.functional.linear(x, weight.dense(), weight.bias), layer(x)) < 1e-3
    layer.register_forward_hook(lambda *args: None)
    assert not weight.direct()
    rotated = build(quant, 4)
    rotated.__class__ = type("Mine", (type(rotated),), {})
    assert find_weight(rotated).format == quant and not find_weight(rotated).direct()


def test_a_rotated_input_is_refused_by_name():
    layer = build("gptq", 4)
    layer.had_K = torch.eye(2)
    with pytest.raises(TypeError, match="had_K"):
        find_weight(layer)


@pytest.mark.parametrize(("quant", "kind"), [("gptq", GPTQLoraLinear), ("awq", AwqLoraLinear)])
def test_layers_of_a_model_are_told_apart(quant, kind):
    model = nn.ModuleDict({"body": build(quant, 4), "head": nn.Linear(96, 2)})
    tuned = get_peft_model(model, LoraConfig(target_modules=["body", "head"]))
    assert type(tuned.base_model.model["body"]) is kind
    assert tuned.base_model.model["body"].weight is tuned.base_model.model["body"].get_base_layer().qweight


def test_qalora_trains_and_merges_on_gptq():
    layer = build("gptq", 8)
    config = LoraConfig(target_modules=["body"], r=4, use_qalora=True, qalora_group_size=16, init_lora_weights=False)
    tuned = get_peft_model(nn.ModuleDict({"body": layer}), config).base_model.model["body"]
    assert tuned.lora_A["default"].weight.shape == (4, 4)
    x = torch.randn(3, 64).half()
    y = tuned(x)
    y.float().sum().backward()
    assert all(tuned.__getattr__(name)["default"].weight.grad is not None for name in ("lora_A", "lora_B"))
    before = stored(layer)
    tuned.merge(safe_merge=True)
    assert relative(tuned(x).detach(), y.detach()) < 0.03
    tuned.unmerge()
    assert same(stored(layer), before)
    with pytest.raises(ValueError, match="use_qalora"):
        both = LoraConfig(target_modules=["body"], use_qalora=True, use_dora=True)
        get_peft_model(nn.ModuleDict({"body": build("gptq", 8)}), both)


def test_autoawq_layer_is_read_as_gptqmodels():
    gemm = pytest.importorskip("awq.modules.linear.gemm")
    theirs = build("awq", 4, group_size=32)
    layer = gemm.WQLinear_GEMM(4, 32, 64, 96, True, "cpu")
    layer.load_state_dict(theirs.state_dict())
    weight = find_weight(layer)
    assert weight.format == "awq" and weight.direct() and weight.bits == 4
    assert torch.equal(weight.dense(), QUANTISERS["awq"].dense(theirs))
    tuned = get_peft_model(nn.ModuleDict({"body": layer}), LoraConfig(target_modules=["body"], use_dora=True))
    assert type(tuned.base_model.model["body"]) is AwqLoraLinear
