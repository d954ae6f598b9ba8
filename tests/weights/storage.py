# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What every storage format must hold to, asked of a layer and of adapters on it: shared by the formats' tests."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.weights import BaseWeight, find_weight


class Model(nn.Module):
    """A model of two adapted layers, so that gradients have to pass through the second one's base."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def stored(layer: nn.Module) -> list[torch.Tensor]:
    """Copies of every tensor that a layer holds, caches left out and tensor subclasses taken apart, as bytes."""
    held = [*layer.parameters(), *layer.buffers()]
    others = {name: value for name, value in vars(layer).items() if not name.endswith("_cache")}
    held += [value for value in others.values() if isinstance(value, torch.Tensor)]
    flat = []
    for tensor in held:
        if hasattr(type(tensor), "__tensor_flatten__"):
            flat += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            flat.append(tensor.detach())
    return [tensor.contiguous().reshape(-1).view(torch.uint8).clone() for tensor in flat]


def same_bytes(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def check_reading(weight: BaseWeight, expected: torch.Tensor) -> None:
    """`dense`, `rows` and `key` of a weight whose matrix is known."""
    dense = weight.dense()
    assert type(dense) is torch.Tensor and not dense.requires_grad
    assert (tuple(dense.shape), dense.dtype) == (weight.shape, weight.dtype) == (tuple(expected.shape), dense.dtype)
    assert torch.equal(dense, expected.to(dense.dtype))
    assert torch.equal(weight.dense(torch.float64), dense.double())
    key = weight.key()
    out = weight.shape[0]
    for a, b in ((0, out), (0, 1), (1, 4), (3, 3), (out // 2 - 1, out // 2 + 2), (out - 2, out)):
        assert torch.equal(weight.rows(a, b), dense[a:b])
        assert torch.equal(weight.rows(a, b, torch.float32), dense[a:b].float())
    for a, b in ((-1, 2), (2, 1), (0, out + 1)):
        try:
            weight.rows(a, b)
        except IndexError as error:
            assert f"rows({a}, {b})" in str(error)
        else:
            raise AssertionError(f"rows({a}, {b}) was not refused")
    assert weight.lossy and weight.has_key(key) and weight.key() == key == find_weight(weight.layer).key()


def check_writing(weight: BaseWeight, room: float) -> None:
    """`write` stores another matrix as well as the format can, and `restore` gives every byte back, more than once."""
    layer, dense, key = weight.layer, weight.dense(), weight.key()
    before, snapshot = stored(layer), weight.snapshot()
    generator = torch.Generator().manual_seed(7)
    new = torch.randn(weight.shape, generator=generator).to(dense.device)
    for _ in range(2):
        weight.write(new)
        assert weight.key() != key and not weight.has_key(key) and weight.has_key(weight.key())
        assert relative(weight.dense(), new) < room
        assert not same_bytes(stored(layer), before)
        weight.restore(snapshot)
        assert same_bytes(stored(layer), before) and torch.equal(weight.dense(), dense)
    assert not layer.weight.requires_grad if isinstance(getattr(layer, "weight", None), nn.Parameter) else True


def dense_twin(layer: nn.Module) -> nn.Linear:
    """A plain float64 layer with the same weight and bias."""
    weight = find_weight(layer)
    out, features = weight.shape
    twin = nn.Linear(features, out, bias=weight.bias is not None, dtype=torch.float64, device=weight.device)
    with torch.no_grad():
        twin.weight.copy_(weight.dense(torch.float64))
        if weight.bias is not None:
            twin.bias.copy_(weight.bias)
    return twin


def adapted(model: nn.Module, *names: str, **options) -> PeftModel:
    """A model with adapters that are away from where they start."""
    names = names or ("default",)
    config = LoraConfig(target_modules=["first", "second"], r=3, lora_alpha=6, **options)
    torch.manual_seed(3)
    tuned = get_peft_model(model, config, names[0])
    for name in names[1:]:
        tuned.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return tuned


def twin_of(tuned: PeftModel) -> PeftModel:
    """The same adapters on dense float64 layers."""
    names = list(tuned.peft_config)
    base = Model(*(dense_twin(layer.get_base_layer()) for layer in lora_layers(tuned)))
    twin = get_peft_model(base, copy.deepcopy(tuned.peft_config[names[0]]), names[0])
    for name in names[1:]:
        twin.add_adapter(name, copy.deepcopy(tuned.peft_config[name]))
    adapters = {name: value for name, value in tuned.state_dict().items() if "lora_" in name}
    twin.load_state_dict(adapters, strict=False)
    return twin.double()


def lora_layers(tuned: nn.Module) -> list[LoraLayer]:
    return [module for module in tuned.modules() if isinstance(module, LoraLayer)]


def check_training(make: Callable[[], Model], x: torch.Tensor, room: float, **options) -> None:
    """Output and all gradients, that of the input among them, are those of the same adapters on dense layers.

    Args:
        make: Builds the quantised model.
        x: An input.
        room: Relative error that the format's own products may make.
        options: Of the `LoraConfig`.
    """
    tuned = adapted(make(), **options)
    twin = twin_of(tuned)
    x, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    y, truth = tuned(x), twin(wide)
    assert y.dtype == x.dtype and relative(y, truth) < room
    direction = torch.randn(truth.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(x.device)
    y.backward(direction.to(y.dtype))
    truth.backward(direction)
    theirs = dict(twin.named_parameters())
    trained = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    for name, parameter in trained.items():
        assert relative(parameter.grad, theirs[name].grad) < room, name
    assert x.grad.dtype == x.dtype and relative(x.grad, wide.grad) < room


def check_merging(
    make: Callable[[], Model], x: torch.Tensor, room: float, *names: str, exact: bool = True, **options
) -> None:
    """Merging, safely or not, gives the adapted function up to the format's rounding; unmerging every byte back.

    Args:
        make: Builds the quantised model.
        x: An input.
        room: Relative error that the format's rounding may make.
        names: Of the adapters; none for one called "default".
        exact: False where the weight is a plain one, which unmerging computes back.
        options: Of the `LoraConfig`.
    """
    tuned = adapted(make(), *names, **options).eval()
    tuned.base_model.set_adapter(list(names) or ["default"])
    layers = lora_layers(tuned)
    before = [stored(layer.get_base_layer()) for layer in layers]
    with torch.no_grad():
        expected, plain = tuned(x), tuned.get_base_model()
        for safe in (True, False):
            tuned.merge_adapter(safe_merge=safe)
            assert relative(tuned(x), expected) < room
            tuned.unmerge_adapter()
            if exact:
                for layer, bytes_before in zip(layers, before, strict=True):
                    assert same_bytes(stored(layer.get_base_layer()), bytes_before)
                assert torch.equal(tuned(x), expected)
            assert relative(tuned(x), expected) < 0.02
        kinds = [type(layer.get_base_layer()) for layer in layers]
        merged = tuned.merge_and_unload(safe_merge=True)
        assert [type(merged.first), type(merged.second)] == kinds and plain is merged
        assert relative(merged(x), expected) < room


def check_broken_adapter_is_not_merged(make: Callable[[], Model], **options) -> None:
    """A safe merge that finds a NaN leaves every byte as it was."""
    tuned = adapted(make(), **options)
    layer = lora_layers(tuned)[0]
    before = stored(layer.get_base_layer())
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")
    try:
        layer.merge(safe_merge=True)
    except ValueError as error:
        assert "finite" in str(error)
    else:
        raise AssertionError("a NaN was merged")
    assert same_bytes(stored(layer.get_base_layer()), before) and not layer.merged


def check_saving(make: Callable[[], Model], x: torch.Tensor, folder: str, **options) -> None:
    """Saved and loaded onto a fresh model, an adapter gives the same bits."""
    tuned = adapted(make(), **options).eval()
    with torch.no_grad():
        expected = tuned(x)
        tuned.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(make(), folder).eval()
        assert torch.equal(loaded(x), expected)
    assert [type(layer) for layer in lora_layers(loaded)] == [type(layer) for layer in lora_layers(tuned)]
