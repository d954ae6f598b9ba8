# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Layers that torchao quantised: read, written and restored, and adapters on them trained, merged and saved."""

import importlib.util

import pytest
import torch
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
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import Linear
from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.weights import find_weight

pytest.importorskip("torchao", reason="needs torchao")
from torchao import quantization as ao
from torchao.prototype.quantization import int4 as int4_on_cpu


def _int4(device):
    if device == "cuda":
        return ao.Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d")
    return int4_on_cpu.PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)


# The configuration for a device, and the relative error that rounding by it may make, in the weight and in an output.
FORMATS = {
    "int8": (lambda device: ao.Int8WeightOnlyConfig(), 0.01),
    "int8 by group": (lambda device: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(32)), 0.01),
    "int8 by tensor": (lambda device: ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()), 0.02),
    "int8 dynamic": (lambda device: ao.Int8DynamicActivationInt8WeightConfig(), 0.02),
    "int4": (_int4, 0.15),
    "intx 4": (lambda device: ao.IntxWeightOnlyConfig(torch.int4, granularity=ao.PerGroup(32)), 0.15),
    "intx 6 asymmetric": (
        lambda device: ao.IntxWeightOnlyConfig(torch.int6, ao.PerGroup(32), ao.MappingType.ASYMMETRIC),
        0.04,
    ),
    "intx 4 dynamic": (
        lambda device: ao.Int8DynamicActivationIntxWeightConfig(torch.int4, ao.PerGroup(32)),
        0.2,
    ),
    "float8": (lambda device: ao.Float8WeightOnlyConfig(), 0.05),
}
# Activations in float8 take a GPU of compute capability 8.9 or above.
GPU_FORMATS = {
    "int4 plain": (lambda device: ao.Int4WeightOnlyConfig(group_size=32), 0.15),  # needs mslk
    "float8 dynamic": (lambda device: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()), 0.08),
}
ROUNDS_INPUT = {"int8 dynamic", "intx 4 dynamic", "float8 dynamic"}
HAS_NO_DEQUANTIZE = {"int4", "int4 plain"}
OUT, FEATURES = 96, 128
METHODS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
ROWS = [
    *(pytest.param((name, "cpu"), id=name) for name in FORMATS),
    *(pytest.param((name, "cuda"), id=f"{name}-cuda", marks=pytest.mark.gpu) for name in (*FORMATS, *GPU_FORMATS)),
]
# What torchao makes on a GPU of bfloat16 weights alone.
BFLOAT16_ON_GPU = {"int4", "int4 plain", "float8 dynamic"}
IN_EACH_DTYPE = pytest.mark.parametrize(
    ("form", "dtype"),
    [
        pytest.param(*row.values, dtype, id=f"{row.id}-{dtype}", marks=row.marks)
        for row in ROWS
        for dtype in (torch.float32, torch.bfloat16)
        if dtype == torch.bfloat16 or row.values[0][1] == "cpu" or row.values[0][0] not in BFLOAT16_ON_GPU
    ],
    indirect=["form"],
)


@pytest.fixture(params=ROWS)
def form(request):
    """(name, device, what quantises a layer, room)"""
    name, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if name == "int4 plain" and importlib.util.find_spec("mslk") is None:
        pytest.skip("needs mslk")
    config, room = {**FORMATS, **GPU_FORMATS}[name]
    return name, device, lambda layer: ao.quantize_(layer, config(device)), room


def linear(form, out=OUT, features=FEATURES, dtype=torch.bfloat16, seed=0, bias=True):
    torch.manual_seed(seed)
    layer = nn.Linear(features, out, bias=bias).to(form[1], dtype)
    form[2](layer)
    return layer


def model(form, dtype=torch.bfloat16):
    return Model(linear(form, dtype=dtype), linear(form, FEATURES, OUT, dtype=dtype, seed=1))


def rows_of_input(form, dtype=torch.bfloat16):
    return torch.randn(6, FEATURES, generator=torch.Generator().manual_seed(5)).to(form[1], dtype)


def own_matrix(layer):
    """The matrix by torchao alone: its dequantize(), or its product with the identity."""
    weight = layer.weight.detach()
    if type(weight).dequantize is not torch.Tensor.dequantize:
        return weight.dequantize()
    unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return nn.functional.linear(unit, weight).T


@IN_EACH_DTYPE
def test_reads_what_torchao_reads(form, dtype):
    layer = linear(form, dtype=dtype)
    weight = find_weight(layer)
    assert (weight.format, weight.shape, weight.dtype, weight.packed()) == ("torchao", (OUT, FEATURES), dtype, None)
    check_reading(weight, own_matrix(layer))


@pytest.mark.gpu
def test_float8_by_row_of_float32_is_refused_by_torchao():
    """Why `IN_EACH_DTYPE` leaves it out."""
    with pytest.raises(AssertionError, match="PerRow quantization only works for bfloat16"):
        ao.quantize_(nn.Linear(FEATURES, OUT).cuda(), GPU_FORMATS["float8 dynamic"][0]("cuda"))


def test_reads_in_inference_mode(form):
    weight = find_weight(linear(form))
    dense = weight.dense()
    with torch.inference_mode():
        assert torch.equal(weight.dense(), dense) and torch.equal(weight.rows(3, 9), dense[3:9])
        snapshot = weight.snapshot()
    weight.write(torch.ones(OUT, FEATURES))
    weight.restore(snapshot)
    assert torch.equal(weight.dense(), dense)


def test_rows_build_no_more_than_the_blocks_they_need(form, monkeypatch):
    layer = linear(form)
    kind = type(layer.weight)
    if form[0] in HAS_NO_DEQUANTIZE:
        pytest.skip("has no dequantize(): columns are read in chunks")
    seen, real = [], kind.dequantize
    monkeypatch.setattr(kind, "dequantize", lambda self, *args: seen.append(tuple(self.shape)) or real(self, *args))
    find_weight(layer).rows(40, 44)
    assert seen == [(OUT if form[0] == "int8 by tensor" else 4, FEATURES)]


@IN_EACH_DTYPE
def test_writes_as_torchao_quantises_and_restores_every_byte(form, dtype):
    layer = linear(form, dtype=dtype)
    weight, parameter = find_weight(layer), layer.weight
    check_writing(weight, form[3])
    assert layer.weight is parameter, "the parameter was replaced, which breaks ties and captured graphs"
    fresh = linear(form, dtype=dtype, seed=4)
    torch.manual_seed(4)
    weight.write(nn.Linear(FEATURES, OUT).to(form[1], dtype).weight)
    assert torch.equal(weight.dense(), own_matrix(fresh))


def test_a_class_that_cannot_be_written_refuses_before_anything_changes(form, monkeypatch):
    monkeypatch.setattr("peft.weights.torchao._REQUANTISE", {"Other": None})
    tuned = adapted(model(form))
    layer = lora_layers(tuned)[0]
    kind = type(layer.weight).__name__
    with pytest.raises(RuntimeError, match=f"{kind}.*merge into the dense model"):
        tuned.merge_adapter()
    assert not any(other.merged for other in lora_layers(tuned))
    with pytest.raises(TypeError, match=kind):
        find_weight(layer.get_base_layer()).write(torch.zeros(OUT, FEATURES))


def test_int4_is_stored_in_the_class_that_the_device_has(form):
    if not form[0].startswith("int4"):
        pytest.skip("int4 alone has several classes")
    expected = {"cpu": "Int4OpaqueTensor", "cuda": "Int4TilePackedTo4dTensor"}
    kind = "Int4Tensor" if form[0] == "int4 plain" else expected[form[1]]
    assert type(linear(form).weight).__name__ == kind


def test_direct_where_no_activation_is_rounded(form):
    layer = linear(form)
    weight = find_weight(layer)
    assert weight.direct() == (form[0] not in ROUNDS_INPUT | HAS_NO_DEQUANTIZE)
    assert weight.differentiable == weight.direct()
    layer.register_forward_hook(lambda *args: None)
    assert not weight.direct()


@METHODS
def test_trains_as_on_dense_layers(form, dora):
    room = 0.02 if form[0] in ROUNDS_INPUT else 0.01
    dtype = torch.bfloat16 if form[1] == "cuda" else torch.float32  # see BFLOAT16_ON_GPU
    room = max(room, 0.05) if form[1] == "cuda" else room
    check_training(lambda: model(form, dtype), rows_of_input(form, dtype), room, use_dora=dora)


def test_a_trained_bias_gets_its_gradient(form):
    tuned = adapted(model(form, torch.bfloat16), bias="all")
    tuned(rows_of_input(form)).sum().backward()
    for layer in lora_layers(tuned):
        assert layer.get_base_layer().bias.grad.abs().max() > 0


@METHODS
def test_dropout_and_mixed_batches(form, dora):
    tuned = adapted(model(form), "one", "two", use_dora=dora, lora_dropout=0.5)
    x = rows_of_input(form)
    tuned(x).sum().backward()
    tuned.eval()
    with torch.no_grad():
        mixed = tuned(x, adapter_names=["one"] * 3 + ["two"] * 2 + ["__base__"])
        for rows, name in ((slice(0, 3), "one"), (slice(3, 5), "two")):
            tuned.set_adapter(name)
            assert relative(mixed[rows], tuned(x)[rows]) < 0.02
        with tuned.disable_adapter():
            assert relative(mixed[5:], tuned(x)[5:]) < 0.02


@METHODS
def test_merges_safely_with_the_magnitude_and_gives_every_byte_back(form, dora):
    check_merging(lambda: model(form), rows_of_input(form), 2.5 * form[3] + 0.02, use_dora=dora)
    check_broken_adapter_is_not_merged(lambda: model(form), use_dora=dora)


def test_merges_two_adapters(form):
    check_merging(lambda: model(form), rows_of_input(form), 2.5 * form[3] + 0.02, "one", "two")


@METHODS
def test_merged_weight_is_torchaos_own_of_the_merged_matrix(form, dora):
    tuned = adapted(model(form), use_dora=dora)
    layer = lora_layers(tuned)[0]
    base = layer.get_base_layer()
    matrix = find_weight(base).dense(torch.float32)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = matrix + layer.scaling["default"] * (b @ a).detach()
    if dora:
        expected = expected * (layer.lora_magnitude_vector["default"].weight.detach() / expected.norm(dim=1))[:, None]
    plain = nn.Linear(FEATURES, OUT).to(form[1], torch.bfloat16)
    plain.weight.data = expected.to(torch.bfloat16)
    form[2](plain)
    layer.merge(safe_merge=True)
    assert relative(find_weight(base).dense(), own_matrix(plain)) < 2e-3


@METHODS
def test_saves_and_loads(form, dora, tmp_path):
    check_saving(lambda: model(form), rows_of_input(form), str(tmp_path), use_dora=dora)


def test_layer_is_a_subclass_of_linear_and_keeps_the_configuration(form):
    layer = lora_layers(adapted(model(form)))[0]
    assert type(layer) is TorchaoLoraLinear and isinstance(layer, Linear)
    assert layer.get_apply_tensor_subclass is None
    make = object()
    layer = TorchaoLoraLinear(linear(form), "x", config=LoraConfig(), r=2, get_apply_tensor_subclass=make)
    assert layer.get_apply_tensor_subclass is make


def test_key_tells_changes():
    layer = nn.Linear(FEATURES, OUT, dtype=torch.bfloat16)
    ao.quantize_(layer, ao.Int8WeightOnlyConfig())
    weight = find_weight(layer)
    key = weight.key()
    layer(torch.randn(2, FEATURES, dtype=torch.bfloat16)), weight.snapshot(), weight.rows(0, 4)
    assert weight.key() == key
    layer.load_state_dict(layer.state_dict())
    assert weight.key() != key
    key = weight.key()
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    assert weight.key() != key


def test_nf4_of_torchao_is_refused_by_name():
    layer = nn.Linear(FEATURES, 128, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(ao.to_nf4(layer.weight.detach()), requires_grad=False)
    with pytest.raises(TypeError, match="NF4Tensor.*bitsandbytes"):
        find_weight(layer)


@METHODS
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_a_model_that_transformers_quantised(config, dora, tmp_path):
    """Loaded with `TorchAoConfig`, trained, saved, loaded again, merged and unmerged."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, **shape)
    LlamaForCausalLM(tiny).to(torch.bfloat16).save_pretrained(tmp_path / "base")

    def load():
        settings = {"quantization_config": TorchAoConfig(getattr(ao, config)()), "dtype": torch.bfloat16}
        return prepare_model_for_kbit_training(AutoModelForCausalLM.from_pretrained(tmp_path / "base", **settings))

    asked = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", use_dora=dora, init_lora_weights=False)
    tuned = get_peft_model(load(), asked)
    for layer in lora_layers(tuned):
        assert type(layer) is TorchaoLoraLinear and layer.get_apply_tensor_subclass is not None
    ids = torch.randint(0, 128, (2, 8))
    tuned(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for name, parameter in tuned.named_parameters() if "lora_" in name)
    tuned.eval()
    with torch.no_grad():
        expected = tuned(input_ids=ids).logits
        tuned.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        tuned.merge_adapter(safe_merge=True)
        assert relative(tuned(input_ids=ids).logits, expected) < 0.1
        tuned.unmerge_adapter()
        assert torch.equal(tuned(input_ids=ids).logits, expected)
