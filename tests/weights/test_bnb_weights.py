# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""bitsandbytes' 4-bit and 8-bit weights: read in any state that the layer can be in, written, and restored bit for bit."""

import copy
import itertools
import logging

import pytest
import torch
from torch import nn

from peft.weights import find_weight

bnb = pytest.importorskip("bitsandbytes")
functional = pytest.importorskip("bitsandbytes.functional")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR, "bitsandbytes")


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


def linear4bit(
    out=64, features=128, *, kind="nf4", nested=True, storage=torch.uint8, blocksize=64, dtype=torch.float32
):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        features, out, quant_type=kind, compress_statistics=nested, quant_storage=storage, compute_dtype=torch.float32
    )
    layer.weight.data = layer.weight.data.to(dtype)
    layer.weight.blocksize = blocksize
    return layer


def linear8bit(out=24, features=32, *, fp16=False, device="cpu"):
    torch.manual_seed(0)
    return bnb.nn.Linear8bitLt(features, out, has_fp16_weights=fp16).to(device)


def decode(packed):
    """The matrix of a `Packed`, element by element as its docstring says, in float32."""
    if packed.kind == "int8":
        return packed.data.float() * packed.scb[:, None] / 127
    codes = torch.stack([packed.data >> 4, packed.data & 0xF], dim=1).flatten().int()
    absmax = packed.absmax
    if packed.nested is not None:
        outer, code, size, offset = packed.nested
        absmax = code[absmax.int()] * outer.repeat_interleave(size)[: len(absmax)] + offset
    out, features = packed.shape
    scales = absmax.repeat_interleave(packed.blocksize)[: out * features]
    return (packed.code[codes][: out * features] * scales).view(out, features)


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


# 4 bit, reading
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_4bit_reads_what_was_quantised(kind, nested, dtype, device):
    layer = linear4bit(kind=kind, nested=nested, dtype=dtype)
    original = layer.weight.detach().clone().to(device)
    weight = find_weight(layer.to(device))
    assert (weight.format, weight.shape, weight.dtype, weight.lossy) == ("bnb 4bit", (64, 128), dtype, True)
    assert weight.dense().dtype == dtype and weight.dense().shape == (64, 128)
    assert relative(weight.dense(), original) < 0.15
    assert torch.equal(weight.dense(), functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    assert torch.equal(weight.dense(torch.float64), weight.dense().double())


SHAPES = [(64, 512), (20, 64), (33, 48), (7, 6), (32, 96)]  # the first has more than 256 blocks: two nested ones


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("nested", [True, False])
def test_4bit_reads_any_shape_and_block_size(shape, blocksize, nested, device):
    layer = linear4bit(*shape, blocksize=blocksize, nested=nested).to(device)
    weight = find_weight(layer)
    dense, out = weight.dense(), shape[0]
    torch.testing.assert_close(dense, decode(weight.packed()), rtol=1e-6, atol=1e-8)
    for a, b in ((0, out), (0, 1), (1, 4), (3, 3), (out // 2 - 1, out // 2 + 2), (out - 2, out)):
        assert torch.equal(weight.rows(a, b), dense[a:b])


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_4bit_storage_dtypes_hold_the_same_bytes(storage, device):
    expected = find_weight(linear4bit().to(device))
    layer = linear4bit(storage=storage).to(device)
    weight = find_weight(layer)
    assert layer.weight.dtype == storage
    assert torch.equal(weight.dense(), expected.dense())
    assert torch.equal(weight.rows(3, 9), expected.rows(3, 9))
    assert torch.equal(weight.packed().data, expected.packed().data)


def test_4bit_rows_build_no_more_than_they_need(monkeypatch):
    layer = linear4bit(64, 128).to("cpu")
    seen = []
    real = functional.dequantize_4bit

    def spy(data, state, *args, **kwargs):
        result = real(data, state, *args, **kwargs)
        seen.append(result.numel())
        return result

    monkeypatch.setattr(functional, "dequantize_4bit", spy)
    find_weight(layer).rows(10, 13)
    assert seen == [3 * 128]


def test_4bit_before_it_is_quantised_is_plain():
    layer = linear4bit()
    weight = find_weight(layer)
    assert weight.lossy is False and weight.packed() is None and not weight.direct()
    assert weight.dense().data_ptr() == layer.weight.data_ptr()
    assert torch.equal(weight.rows(1, 3), layer.weight[1:3])
    new = torch.randn(64, 128)
    weight.write(new)
    assert torch.equal(layer.weight, new)
    layer.to("cpu")
    assert weight.lossy is True and relative(weight.dense(), new) < 0.15


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_4bit_state_is_found_on_the_layer_when_the_parameter_lost_it(storage):
    layer = linear4bit(storage=storage).to("cpu")
    expected = find_weight(layer).dense()
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(torch.Tensor), requires_grad=False)
    weight = find_weight(layer)
    assert weight.lossy and torch.equal(weight.dense(), expected)
    snapshot = weight.snapshot()
    weight.write(expected * 2)
    assert relative(weight.dense(), expected * 2) < 0.15
    weight.restore(snapshot)
    assert torch.equal(weight.dense(), expected)


# 4 bit, writing
@pytest.mark.parametrize(
    ("kind", "nested", "storage", "blocksize"),
    [*itertools.product(["nf4", "fp4"], [True, False], [torch.uint8, torch.bfloat16], [64, 128])],
)
def test_4bit_write_keeps_the_format(kind, nested, storage, blocksize, device):
    layer = linear4bit(kind=kind, nested=nested, storage=storage, blocksize=blocksize, dtype=torch.bfloat16).to(device)
    weight, parameter = find_weight(layer), layer.weight
    new = torch.randn(64, 128, device=device)
    weight.write(new)
    state = layer.weight.quant_state
    assert layer.weight is parameter and layer.quant_state is state
    assert (state.quant_type, state.nested, state.blocksize) == (kind, nested, blocksize)
    assert parameter.dtype == storage and weight.dtype == state.dtype == torch.bfloat16
    _, expected = functional.quantize_4bit(new, blocksize=blocksize, compress_statistics=nested, quant_type=kind)
    assert relative(weight.dense(), new) < 0.15
    assert torch.equal(state.absmax, expected.absmax)
    assert layer(torch.randn(2, 128, device=device)).shape == (2, 64)


@pytest.mark.parametrize("nested", [True, False])
def test_4bit_restore_gives_the_bytes_back(nested, device):
    layer = linear4bit(nested=nested).to(device)
    weight = find_weight(layer)
    before = copy.deepcopy(layer.state_dict())
    dense = weight.dense().clone()
    snapshot = weight.snapshot()
    for _ in range(2):
        weight.write(torch.randn(64, 128))
        assert not torch.equal(weight.dense(), dense)
        weight.restore(snapshot)
        after = layer.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(weight.dense(), dense)


def test_4bit_key_tells_changes(device):
    layer = linear4bit().to(device)
    weight = find_weight(layer)
    keys = [weight.key()]
    layer(torch.randn(2, 128, device=device, requires_grad=True)).sum().backward()
    weight.dense(), weight.rows(0, 3), weight.packed()
    snapshot = weight.snapshot()
    assert weight.key() == keys[0] == find_weight(layer).key()
    weight.write(torch.randn(64, 128))
    keys.append(weight.key())
    weight.restore(snapshot)
    keys.append(weight.key())
    layer.weight.data = layer.weight.data.clone()
    keys.append(weight.key())
    assert all(a != b for a, b in itertools.combinations(keys, 2))


def test_4bit_direct(device):
    layer = linear4bit().to(device)
    weight = find_weight(layer)
    assert weight.direct() and weight.compute_dtype == torch.float32
    x = torch.randn(3, 128, device=device, requires_grad=True)
    torch.testing.assert_close(nn.functional.linear(x, weight.dense(), weight.bias), layer(x), rtol=1e-5, atol=1e-5)
    layer.register_forward_hook(lambda *args: None)
    assert not weight.direct()

    class Mine(bnb.nn.Linear4bit):
        pass

    mine = Mine(128, 64, quant_type="nf4").to(device)
    assert find_weight(mine).format == "bnb 4bit" and not find_weight(mine).direct()


def test_4bit_is_not_direct_where_the_cpu_computes_another_product():
    assert not find_weight(linear4bit(20, 48).to("cpu")).direct()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_4bit_layout_for_avx512_bf16(nested, storage):
    """bitsandbytes rewrites the bytes in the first forward in eval where the CPU has AVX512-BF16; here by hand."""
    layer = linear4bit(96, 128, nested=nested, storage=storage, dtype=torch.float16).to("cpu")
    weight = find_weight(layer)
    dense, key, snapshot = weight.dense().clone(), weight.key(), weight.snapshot()
    layer.weight.data, _ = functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)

    assert weight.packed() is None and weight.lossy and weight.shape == (96, 128)
    assert weight.key() != key
    assert weight.dtype == weight.dense().dtype == torch.float16
    assert relative(weight.dense(), dense) < 2**-8, "only the scales are rounded, to bfloat16"
    for a, b in ((0, 96), (5, 40), (31, 33), (64, 64), (95, 96)):
        assert torch.equal(weight.rows(a, b), weight.dense()[a:b])

    interleaved = weight.snapshot()
    weight.write(dense * 2)
    assert weight.packed().kind == "nf4" and (weight.packed().nested is not None) == nested
    assert layer.weight.dtype == storage and relative(weight.dense(), dense * 2) < 0.15
    weight.restore(interleaved)
    assert relative(weight.dense(), dense) < 2**-8
    weight.restore(snapshot)
    assert torch.equal(weight.dense(), dense)


def test_4bit_survives_a_forward_in_eval():
    layer = linear4bit(64, 128).to("cpu").eval()
    weight = find_weight(layer)
    before = weight.dense().clone()
    for _ in range(3):
        with torch.no_grad():
            layer(torch.randn(2, 128))
        assert relative(weight.dense(), before) < 2**-8


# 8 bit
def _as_loaded(layer):
    return layer


def _after_forwards(layer):
    for _ in range(3):
        layer(torch.randn(2, 32, device=layer.weight.device))
    return layer


def _after_a_move_through_a_parent(layer):
    nn.Sequential(_after_forwards(layer)).to(layer.weight.device).to("cpu")
    return layer


def _torn_apart(layer):
    """What a move to another device through a parent leaves: bytes on the parameter, statistics on the state."""
    _after_forwards(layer)
    layer.weight.CB = layer.weight.data
    return layer


def _left_behind(layer):
    """The same move where the state's bytes stayed on the old device."""
    _after_forwards(layer)
    layer.state.CB = layer.state.CB.to("meta")
    return layer


def _after_deepcopy(layer):
    return copy.deepcopy(layer)


def _after_deepcopy_of_a_used_one(layer):
    return copy.deepcopy(_after_forwards(layer))


STATES_8BIT = [
    _as_loaded,
    _after_forwards,
    _after_a_move_through_a_parent,
    _torn_apart,
    _left_behind,
    _after_deepcopy,
    _after_deepcopy_of_a_used_one,
]


@pytest.mark.parametrize("state", STATES_8BIT)
@pytest.mark.parametrize("training", [True, False])
def test_8bit_reads_writes_and_restores_in_every_state(state, training, device):
    original = bnb.nn.Linear8bitLt(32, 24, has_fp16_weights=False)
    matrix = original.weight.detach().clone()
    layer = state(original.to(device).train(training))
    weight = find_weight(layer)
    where = weight.device
    assert (weight.format, weight.shape, weight.dtype, weight.lossy) == ("bnb 8bit", (24, 32), torch.float32, True)
    assert not weight.direct()
    dense = weight.dense()
    assert relative(dense.cpu(), matrix) < 0.01
    assert torch.equal(weight.rows(3, 9), dense[3:9])
    torch.testing.assert_close(decode(weight.packed()), dense)

    snapshot, key = weight.snapshot(), weight.key()
    assert weight.key() == key
    new = torch.randn(24, 32)
    for _ in range(2):
        weight.write(new)
        assert weight.key() != key
        assert relative(weight.dense().cpu(), new) < 0.01
        weight.restore(snapshot)
        assert torch.equal(weight.dense(), dense)
    weight.write(new)
    x = torch.randn(5, 32, device=where)
    for _ in range(2):  # the layer computes with what was written, and goes on doing so
        expected = nn.functional.linear(x, weight.dense(), weight.bias)
        assert relative(layer(x), expected) < 0.03
    weight.restore(snapshot)
    assert relative(layer(x), nn.functional.linear(x, dense, weight.bias)) < 0.03


def test_8bit_dtypes():
    weight = find_weight(linear8bit())
    exact = weight.packed().data.double() * weight.packed().scb.double()[:, None] / 127
    torch.testing.assert_close(weight.dense(torch.float64), exact, rtol=1e-12, atol=0)
    assert torch.equal(weight.dense(torch.bfloat16), weight.dense().bfloat16())
    assert weight.rows(1, 2, torch.float16).dtype == torch.float16


def test_8bit_rows_of_zeros_stay_zero_and_nothing_overflows():
    weight = find_weight(linear8bit())
    new = torch.randn(24, 32)
    new[3] = 0
    new[4] *= 1e5  # beyond float16
    weight.write(new)
    assert torch.equal(weight.dense()[3], torch.zeros(32))
    assert relative(weight.dense()[4], new[4]) < 0.01


def test_8bit_without_statistics_says_what_to_pass():
    layer = linear8bit()
    layer.weight.SCB = None
    with pytest.raises(ValueError, match="SCB"):
        find_weight(layer).dense()


def test_8bit_before_it_is_quantised_is_plain():
    layer = bnb.nn.Linear8bitLt(32, 24, has_fp16_weights=False)
    weight = find_weight(layer)
    assert not weight.lossy and weight.packed() is None
    assert weight.dense().data_ptr() == layer.weight.data_ptr()


def test_8bit_with_floating_weights_forgets_the_old_rounding_on_write():
    layer = linear8bit(fp16=True)
    x = torch.randn(5, 32)
    layer(x)
    layer.eval()
    weight = find_weight(layer)
    assert not weight.lossy and weight.dtype == torch.float32
    snapshot = weight.snapshot()
    new = torch.randn(24, 32)
    weight.write(new)
    assert torch.equal(weight.dense(), new)
    with torch.no_grad():
        layer.weight.requires_grad_(False)
        assert relative(layer(x), nn.functional.linear(x, new, layer.bias)) < 0.03
        weight.restore(snapshot)
        assert relative(layer(x), nn.functional.linear(x, snapshot, layer.bias)) < 0.03
