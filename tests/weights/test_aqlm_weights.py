# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""AQLM's layers, filled with codes at random: they are read, adapters train on them, and merging is refused by name."""

import importlib.util

import pytest
import torch
from storage import (
    Model,
    adapted,
    check_reading,
    check_saving,
    check_training,
    lora_layers,
    relative,
    same_bytes,
    stored,
)

from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.weights import find_weight

pytest.importorskip("aqlm", reason="needs aqlm")
from aqlm import QuantizedLinear
from aqlm.utils import _dequantize_weight, unpack_int_data

OUT, FEATURES = 48, 64
METHODS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
HAS_NUMBA = all(importlib.util.find_spec(name) is not None for name in ("numba", "scipy"))
needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="aqlm's product on a CPU needs numba and scipy (aqlm[cpu])")
# Columns and rows of a group, codebooks, bits of a code. By 8-bit codes of one row the library has a kernel for CPUs,
# which reorders them; else it unpacks the weight.
KINDS = [
    pytest.param((8, 1, 1, 12), id="1x12"),
    pytest.param((4, 2, 2, 4), id="2x4 of blocks"),
    pytest.param((8, 1, 2, 8), id="2x8", marks=needs_numba),
]


@pytest.fixture(autouse=True)
def one_thread():
    """The kernel for CPUs lets its threads add to the same numbers at once, and loses some."""
    if HAS_NUMBA:
        import numba

        before = numba.get_num_threads()
        numba.set_num_threads(1)
        yield
        numba.set_num_threads(before)
    else:
        yield


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def linear(kind, out=OUT, features=FEATURES, seed=0, bias=True):
    width, height, number, bits = kind
    generator = torch.Generator().manual_seed(seed)
    layer = QuantizedLinear(features, out, width, height, number, bits, bias=bias, dtype=torch.float32)
    for parameter in (layer.codebooks, layer.scales, layer.bias):
        if parameter is not None:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    codes = torch.randint(2**bits, layer.codes.shape, generator=generator)
    layer.codes.data = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).to(layer.codes.dtype)
    return layer.requires_grad_(False)


def model(kind):
    return Model(linear(kind), linear(kind, FEATURES, OUT, seed=1))


def rows_of_input():
    return torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(5))


def own_matrix(layer):
    """The matrix by aqlm alone, before a product on the CPU reorders the codes."""
    return _dequantize_weight(unpack_int_data(layer.codes, layer.nbits_per_codebook), layer.codebooks, layer.scales)


def test_reads_what_aqlm_unpacks_before_and_after_a_product(kind):
    layer = linear(kind)
    expected = own_matrix(layer)
    weight = find_weight(layer)
    assert (weight.format, weight.shape, weight.packed(), weight.direct()) == ("aqlm", (OUT, FEATURES), None, False)
    check_reading(weight, expected)
    assert relative((layer(torch.eye(FEATURES)) - layer.bias).T, expected) < 1e-5
    check_reading(find_weight(layer), expected)


@needs_numba
def test_reads_square_layers_whose_order_no_shape_tells():
    layer = linear((8, 1, 2, 8), out=8)  # eight groups down and across
    expected = own_matrix(layer)
    assert torch.equal(find_weight(layer).dense(), expected)
    layer(torch.eye(FEATURES))
    assert torch.equal(find_weight(layer).dense(), expected)


@METHODS
def test_trains_as_on_dense_layers(kind, dora):
    check_training(lambda: model(kind), rows_of_input(), 1e-4, use_dora=dora)


def test_a_trained_bias_gets_its_gradient(kind):
    tuned = adapted(model(kind), bias="all")
    tuned(rows_of_input()).sum().backward()
    assert all(layer.get_base_layer().bias.grad.abs().max() > 0 for layer in lora_layers(tuned))


@METHODS
def test_saves_and_loads(kind, dora, tmp_path):
    check_saving(lambda: model(kind), rows_of_input(), str(tmp_path), use_dora=dora)


def test_merging_is_refused_before_anything_changes(kind):
    tuned = adapted(model(kind))
    before = [stored(layer.get_base_layer()) for layer in lora_layers(tuned)]
    for merge in (tuned.merge_adapter, tuned.merge_and_unload, lora_layers(tuned)[0].merge):
        with pytest.raises(RuntimeError, match="AqlmLoraLinear: AQLM's codes .*beside the quantised model"):
            merge()
    assert [type(layer) for layer in lora_layers(tuned)] == [AqlmLoraLinear] * 2
    for layer, bytes_before in zip(lora_layers(tuned), before, strict=True):
        assert not layer.merged and same_bytes(stored(layer.get_base_layer()), bytes_before)
    weight = find_weight(lora_layers(tuned)[0].get_base_layer())
    with pytest.raises(TypeError, match="AQLM"):
        weight.write(torch.zeros(OUT, FEATURES))


def test_restores_every_byte(kind):
    layer = linear(kind)
    weight, before = find_weight(layer), stored(linear(kind))
    snapshot, key = weight.snapshot(), weight.key()
    for parameter in layer.parameters():
        if parameter is not layer.bias:
            parameter.data.zero_()
    weight.restore(snapshot)
    assert same_bytes(stored(layer), before) and weight.key() != key
