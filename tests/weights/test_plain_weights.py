# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Weights that are stored in floating point: every orientation reads, writes, restores and tells changes the same way."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft.weights import find_weight
from peft.weights.base import SameObject

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), lambda w: w),
    "linear stored transposed": (lambda: nn.Linear(5, 7), lambda w: w.T),
    "Conv1D": (lambda: Conv1D(5, 7), lambda w: w.T),
    "embedding": (lambda: nn.Embedding(7, 5), lambda w: w.T),
    "conv1d": (lambda: nn.Conv1d(3, 5, 2), lambda w: w.flatten(1)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (2, 3)), lambda w: w.flatten(1)),
    "conv2d with groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda w: w.flatten(1)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2), lambda w: w.flatten(1)),
}


@pytest.fixture(params=LAYERS)
def case(request):
    """(layer, its weight object, the matrix [out, in] that the weight is)"""
    make, as_matrix = LAYERS[request.param]
    torch.manual_seed(0)
    layer = make()
    return layer, find_weight(layer, fan_in_fan_out="transposed" in request.param), as_matrix(layer.weight.detach())


def test_reads_the_matrix(case):
    layer, weight, matrix = case
    assert weight.shape == tuple(matrix.shape)
    assert weight.dtype == torch.float32
    assert weight.device == layer.weight.device
    assert weight.bias is getattr(layer, "bias", None)
    assert weight.lossy is False and weight.packed() is None and weight.format == "plain"
    assert torch.equal(weight.dense(), matrix)


def test_dense_is_a_view_without_gradient(case):
    layer, weight, _ = case
    dense = weight.dense()
    assert dense.data_ptr() == layer.weight.data_ptr()
    assert not dense.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dense_converts(case, dtype):
    _, weight, matrix = case
    assert torch.equal(weight.dense(dtype), matrix.to(dtype))


def test_rows(case):
    _, weight, matrix = case
    out = matrix.shape[0]
    for a, b in ((0, out), (1, 3), (2, 2), (out - 1, out)):
        assert torch.equal(weight.rows(a, b), matrix[a:b])
        assert torch.equal(weight.rows(a, b, torch.float16), matrix[a:b].half())
    for a, b in ((-1, 2), (2, 1), (0, out + 1)):
        with pytest.raises(IndexError, match=r"rows\("):
            weight.rows(a, b)


def test_write_is_in_place(case):
    layer, weight, matrix = case
    parameter, pointer = layer.weight, layer.weight.data_ptr()
    new = torch.randn(matrix.shape, dtype=torch.float64)
    weight.write(new)
    assert layer.weight is parameter and parameter.data_ptr() == pointer
    assert torch.equal(weight.dense(), new.float())
    assert parameter.requires_grad


def test_write_refuses_another_shape_or_integers(case):
    _, weight, matrix = case
    with pytest.raises(ValueError, match="shape must be"):
        weight.write(torch.zeros(matrix.shape[0] + 1, matrix.shape[1]))
    with pytest.raises(ValueError, match="floating"):
        weight.write(torch.zeros(matrix.shape, dtype=torch.int32))


def test_restore_gives_the_bits_back_again_and_again(case):
    layer, weight, matrix = case
    before = layer.weight.detach().clone()
    snapshot = weight.snapshot()
    for _ in range(2):
        weight.write(torch.randn(matrix.shape))
        weight.restore(snapshot)
        assert torch.equal(layer.weight, before)


def test_channels_last_convolutions():
    layer = nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)
    weight = find_weight(layer)
    matrix = layer.weight.detach().contiguous().flatten(1)
    assert torch.equal(weight.rows(1, 4), matrix[1:4])
    weight.write(matrix * 2)
    assert torch.equal(weight.dense(), matrix * 2)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


# key
def _write_with_an_optimizer(layer):
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.1).step()


CHANGES = {
    "write": lambda layer: find_weight(layer).write(find_weight(layer).dense() + 1),
    "restore": lambda layer: find_weight(layer).restore(find_weight(layer).snapshot()),
    "in place": lambda layer: torch.nn.init.zeros_(layer.weight),
    "load_state_dict": lambda layer: layer.load_state_dict(copy.deepcopy(layer.state_dict())),
    "another tensor": lambda layer: setattr(layer.weight, "data", torch.randn(5, 7)),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(5, 7))),
    "another dtype": lambda layer: layer.half(),
    "an optimizer": _write_with_an_optimizer,
}


@pytest.mark.parametrize("change", CHANGES)
def test_key_tells_a_change(change):
    layer = nn.Linear(7, 5)
    weight = find_weight(layer)
    key = weight.key()
    layer(torch.randn(2, 7)).sum().backward()
    weight.dense(), weight.rows(0, 2), weight.snapshot()
    assert weight.key() == key == find_weight(layer).key()
    CHANGES[change](layer)
    assert weight.key() != key


def test_key_of_a_parameter_that_is_gone_equals_no_other():
    layer = nn.Linear(7, 5)
    first, second = SameObject(layer.weight), SameObject(layer.weight)
    assert first == second and hash(first) == hash(second)
    layer.weight = None
    assert first != second


def test_inference_tensors_are_written_and_never_reused():
    with torch.inference_mode():
        layer = nn.Linear(3, 2)
    weight = find_weight(layer)
    assert weight.key() != weight.key()
    snapshot = weight.snapshot()
    weight.write(torch.ones(2, 3))
    assert torch.equal(weight.dense(), torch.ones(2, 3))
    weight.restore(snapshot)
    assert torch.equal(weight.dense(), snapshot)


def test_deepcopied_layers_do_not_share():
    layer = nn.Linear(3, 2)
    other = copy.deepcopy(layer)
    find_weight(other).write(torch.zeros(2, 3))
    assert not torch.equal(find_weight(layer).dense(), torch.zeros(2, 3))
    assert torch.equal(find_weight(pickle.loads(pickle.dumps(layer))).dense(), layer.weight)


# direct
class Subclass(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _replace_forward(layer):
    layer.forward = lambda x: x


def _offload(layer):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(layer, ModelHook())


HINDRANCES = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda *args: None),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda *args: None),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda *args: None),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda *args: None),
    "forward replaced": _replace_forward,
    "accelerate hook": _offload,
    "ZeRO-3": lambda layer: setattr(layer.weight, "ds_id", 3),
    "meta": lambda layer: layer.to("meta"),
    "parametrisation": lambda layer: nn.utils.parametrizations.spectral_norm(layer),
    "tensor subclass": lambda layer: setattr(layer, "weight", nn.Parameter(_Wrapped(layer.weight.data))),
}


class _Wrapped(torch.Tensor):
    pass


def test_known_layers_are_direct(case):
    _, weight, _ = case
    assert weight.direct()


@pytest.mark.parametrize("hindrance", HINDRANCES)
def test_not_direct(hindrance):
    layer = nn.Linear(4, 4)
    weight = find_weight(layer)
    assert weight.direct()
    HINDRANCES[hindrance](layer)
    assert not weight.direct()


def test_subclasses_and_unknown_layers_are_not_direct():
    assert not find_weight(Subclass(4, 4)).direct()
    assert not find_weight(nn.Bilinear(2, 3, 4)).direct()


def test_a_patched_class_is_not_direct(monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert not find_weight(nn.Linear(4, 4)).direct()


def test_an_embedding_that_renormalises_its_weight_is_not_direct():
    assert not find_weight(nn.Embedding(4, 4, max_norm=1.0)).direct()


def test_a_weight_that_somebody_gathers_has_no_lasting_identity():
    """What FSDP or ZeRO writes into the gathered tensor counts no version."""
    layer = nn.Linear(4, 3)
    weight = find_weight(layer)
    assert weight.key() == weight.key()
    layer._is_fsdp_managed_module = True
    assert weight.key() != weight.key()
    del layer._is_fsdp_managed_module
    layer.weight.ds_id = 1
    assert weight.key() != weight.key()
