# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""EETQ and Transformer Engine, which need a GPU to install: layers are built to their documented tensor layouts, with
PyTorch in their kernels' place. What passes here is the reading of those layouts, not the libraries."""

import sys
import types

import pytest
import torch
from makers import Kernels, eetq_linear
from storage import (
    Model,
    adapted,
    check_broken_adapter_is_not_merged,
    check_merging,
    check_reading,
    check_saving,
    check_training,
    check_writing,
    lora_layers,
    relative,
)
from te_layout import KINDS, DType, te_linear
from torch import nn
from transformers.integrations import eetq as transformers_eetq

from peft.tuners.lora.eetq import EetqLoraLinear
from peft.tuners.lora.te import TeLinear
from peft.weights import find_weight

OUT, FEATURES = 48, 64
METHODS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


def rows_of_input(dtype):
    return torch.randn(2, 3, FEATURES, generator=torch.Generator().manual_seed(5)).to(dtype)


# ---- EETQ ------------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["transformers", "eetq"])
def eetq(request, monkeypatch):
    monkeypatch.setattr(transformers_eetq, "eetq_kernels_hub", Kernels, raising=False)
    home = types.ModuleType("eetq.modules.qlinear")
    home.quant_weights, home.w8_a16_gemm = Kernels.quant_weights, Kernels.w8_a16_gemm
    monkeypatch.setitem(sys.modules, home.__name__, home)
    return request.param


def eetq_model(source):
    return Model(eetq_linear(source, OUT, FEATURES), eetq_linear(source, FEATURES, OUT, seed=1))


def test_eetq_layout_is_read_through_its_product(eetq):
    layer = eetq_linear(eetq, OUT, FEATURES)
    weight = find_weight(layer)
    codes = layer.weight.flatten().flip(0).view_as(layer.weight)
    assert (weight.format, weight.shape, weight.dtype) == ("eetq", (OUT, FEATURES), torch.float16)
    assert not weight.direct() and not weight.differentiable and weight.packed() is None
    check_reading(weight, (codes.float() * layer.weight_scales.float()).T.half())


def test_eetq_layout_is_read_in_chunks(eetq, monkeypatch):
    weight = find_weight(eetq_linear(eetq, OUT, FEATURES))
    expected = weight.dense()
    monkeypatch.setattr("peft.weights.through.CHUNK_BYTES", 7 * 2 * (OUT + FEATURES))
    seen, real = [], Kernels.w8_a16_gemm
    monkeypatch.setattr(
        sys.modules["eetq.modules.qlinear"], "w8_a16_gemm", lambda x, *rest: seen.append(len(x)) or real(x, *rest)
    )
    monkeypatch.setattr(Kernels, "w8_a16_gemm", staticmethod(lambda x, *rest: seen.append(len(x)) or real(x, *rest)))
    assert torch.equal(weight.dense(), expected)
    assert max(seen) == 7 and sum(seen) >= FEATURES


def test_eetq_layout_is_written_by_its_own_quantisation(eetq):
    check_writing(find_weight(eetq_linear(eetq, OUT, FEATURES)), 0.02)


@METHODS
def test_eetq_layout_trains(eetq, dora):
    """In batches of more than one too, where transformers' layer gives the input's gradient another shape."""
    check_training(lambda: eetq_model(eetq), rows_of_input(torch.float16), 0.02, use_dora=dora)


@METHODS
def test_eetq_layout_merges_and_gives_every_byte_back(eetq, dora, tmp_path):
    check_merging(lambda: eetq_model(eetq), rows_of_input(torch.float16), 0.05, use_dora=dora)
    check_broken_adapter_is_not_merged(lambda: eetq_model(eetq), use_dora=dora)
    check_saving(lambda: eetq_model(eetq), rows_of_input(torch.float16), str(tmp_path), use_dora=dora)
    assert {type(layer) for layer in lora_layers(adapted(eetq_model(eetq)))} == {EetqLoraLinear}


# ---- Transformer Engine ----------------------------------------------------------------------------------------------
WIDE, NARROW = 192, 160  # multiples of MXFP8's blocks, not of the others'


@pytest.fixture(params=[f"{name}{more}" for name in ("plain", *KINDS) for more in ("", " without bias")])
def te(request):
    return request.param


def te_model(te):
    return Model(te_linear(te, NARROW, WIDE), te_linear(te, WIDE, NARROW, seed=1))


def te_rows():
    return torch.randn(2, 3, WIDE, generator=torch.Generator().manual_seed(5)).bfloat16()


def test_transformer_engine_layout_is_read(te):
    layer = te_linear(te, NARROW, WIDE)
    weight = find_weight(layer)
    assert (weight.format, weight.shape, weight.dtype) == ("transformer engine", (NARROW, WIDE), torch.bfloat16)
    assert (weight.bias is None) == ("without" in te) and not weight.direct()
    if "plain" not in te:
        check_reading(weight, layer.weight.dequantize())
        check_writing(weight, 0.05)
    else:
        assert not weight.lossy and torch.equal(weight.dense(), layer.weight)
        snapshot = weight.snapshot()
        weight.write(torch.ones(NARROW, WIDE))
        assert bool((layer.weight == 1).all())
        weight.restore(snapshot)
        assert torch.equal(layer.weight, snapshot)


@pytest.mark.parametrize("name", KINDS)
def test_transformer_engine_layout_in_e5m2(name):
    layer = te_linear("plain", NARROW, WIDE)
    layer.weight = nn.Parameter(
        KINDS[name].round(layer.weight, torch.bfloat16, DType.kFloat8E5M2), requires_grad=False
    )
    check_reading(find_weight(layer), layer.weight.dequantize())


def test_transformer_engine_layout_s_transpose_is_void_after_unmerging():
    weight = find_weight(te_linear("float8", NARROW, WIDE))
    weight.restore(weight.snapshot())
    assert weight.layer.weight._transpose_invalid


@pytest.mark.parametrize("lacks", ["_rowwise_data", "_fp8_dtype", "_with_gemm_swizzled_scales"])
def test_transformer_engine_layout_that_is_not_known_trains_with_lora_alone(lacks):
    """As that of NVFP4 and of scales in the order of a product's tiles."""
    tuned = te_model("mxfp8")
    for layer in (tuned.first, tuned.second):
        setattr(layer.weight, lacks, True if lacks.startswith("_with") else None)
        layer.forward = nn.Linear(layer.in_features, layer.out_features, dtype=torch.bfloat16).forward
    lora = adapted(tuned)
    lora(te_rows()).sum().backward()
    with pytest.raises(
        TypeError, match="rows of a MXFP8Tensor cannot be read: .* Build the model with another recipe"
    ):
        lora.merge_adapter()
    assert not any(layer.merged for layer in lora_layers(lora))


@METHODS
def test_transformer_engine_layout_trains(te, dora):
    check_training(lambda: te_model(te), te_rows(), 0.03, use_dora=dora)


@METHODS
def test_transformer_engine_layout_merges(te, dora, tmp_path):
    x, exact = te_rows(), "plain" not in te
    check_merging(lambda: te_model(te), x, 0.1, exact=exact, use_dora=dora)
    check_merging(lambda: te_model(te), x, 0.1, "one", "two", exact=exact, use_dora=dora)
    check_broken_adapter_is_not_merged(lambda: te_model(te), use_dora=dora)
    check_saving(lambda: te_model(te), x, str(tmp_path), use_dora=dora)


def test_transformer_engine_layout_takes_its_further_arguments(te):
    tuned = adapted(te_model(te))
    layer, x = lora_layers(tuned)[0], te_rows()
    assert type(layer) is TeLinear
    assert torch.equal(layer(x, is_first_microbatch=True), layer(x))


@METHODS
def test_transformer_engine_layout_with_dropout_and_lora_bias(te, dora):
    options = {"lora_dropout": 0.5} if dora else {"lora_dropout": 0.5, "lora_bias": True}
    tuned = adapted(te_model(te), use_dora=dora, **options)
    tuned(te_rows()).sum().backward()
    if not dora and "without" in te:
        with pytest.raises(RuntimeError, match="lora_bias=True"):
            tuned.merge_adapter()
    else:
        x = te_rows()
        with torch.no_grad():
            expected = tuned.eval()(x)
            tuned.merge_adapter()
            assert relative(tuned(x), expected) < 0.1
