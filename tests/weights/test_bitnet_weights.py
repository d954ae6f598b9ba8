# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""BitNet's layers in transformers, read as transformers reads them. What adapters do on them is in test_every_format.py."""

import pytest
import torch
from storage import check_reading, check_writing
from torch import nn
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, WeightQuant, pack_weights, unpack_weights

from peft import LoraConfig, get_peft_model
from peft.weights import find_weight

OUT, FEATURES = 96, 64


@pytest.fixture(autouse=True)
def without_compiling():
    with torch.compiler.set_stance("force_eager"):
        yield


def packed(dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = BitLinear(FEATURES, OUT, bias=True, dtype=dtype, **options)
    layer.weight.copy_(pack_weights(torch.randint(-1, 2, (OUT, FEATURES))))
    layer.weight_scale.fill_(3.0)
    return layer


def floats(online, **options):
    torch.manual_seed(0)
    options = {"bias": False, "online_quant": online, **options}
    layer = AutoBitLinear(FEATURES, OUT, **options).requires_grad_(False)
    if not online:
        layer.weight_scale.fill_(1.5)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reads_packed_codes_as_transformers_does(dtype):
    layer = packed(dtype)
    check_reading(find_weight(layer), unpack_weights(layer.weight, dtype) / layer.weight_scale)


def test_reads_floats_as_the_forward_pass_rounds_or_scales_them():
    online, offline = floats(True), floats(False)
    torch.testing.assert_close(find_weight(online).dense(), WeightQuant.apply(online.weight), rtol=1e-6, atol=0)
    check_reading(find_weight(online), find_weight(online).dense())
    check_reading(find_weight(offline), offline.weight * 1.5)


def test_writes_and_restores_every_byte():
    check_writing(find_weight(packed()), 0.5)
    check_writing(find_weight(floats(True)), 0.6)
    check_writing(find_weight(floats(False)), 1e-6)


def test_a_ternary_matrix_is_stored_as_it_is():
    layer = packed()
    weight = find_weight(layer)
    before, matrix = layer.weight.clone(), weight.dense()
    weight.write(matrix)
    assert torch.equal(layer.weight, before)
    torch.testing.assert_close(layer.weight_scale, torch.tensor([3.0]), rtol=1e-6, atol=0)
    weight.write(torch.zeros(OUT, FEATURES))
    assert not weight.dense().any()


def test_layers_that_normalise_their_input_are_refused():
    with pytest.raises(TypeError, match="use_rms_norm=True.*autobitlinear"):
        find_weight(packed(use_rms_norm=True))


@pytest.mark.parametrize(
    ("options", "message"), [({"use_rms_norm": True}, "normalised input"), ({"bias": True}, "scales its bias")]
)
def test_what_does_more_than_a_product_is_adapted_and_not_merged(options, message):
    base = nn.Sequential(floats(False, **options))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2, use_dora=True))
    model(torch.randn(3, FEATURES)).sum().backward()
    with pytest.raises(RuntimeError, match=message):
        model.merge_adapter()
    with pytest.raises(TypeError, match=message):
        find_weight(base[0].get_base_layer()).write(torch.zeros(OUT, FEATURES))
