# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Switching, freezing, deleting and mixing adapters."""

import copy
import pickle

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def config(**options):
    return LoraConfig(**{"r": 2, "target_modules": ["first", "second"], "init_lora_weights": False, **options})


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = get_peft_model(Net(), config(), adapter_name="a")
    model.add_adapter("b", config(r=3, use_dora=True))
    return model.eval()


X = torch.linspace(-1, 1, 24).reshape(4, 6)


def layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def trainable(model):
    return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}


def test_only_the_active_adapter_trains(model):
    assert trainable(model) == {"a"}
    model.set_adapter("b")
    assert trainable(model) == {"b"}
    model.base_model.set_adapter(["a", "b"])
    assert trainable(model) == {"a", "b"}
    model.set_adapter("a", inference_mode=True)
    assert trainable(model) == set()
    model.set_requires_grad("b")
    assert trainable(model) == {"b"}


def test_switching_there_and_back_changes_nothing(model):
    first = model(X)
    model.set_adapter("b")
    second = model(X)
    assert not torch.allclose(first, second)
    model.set_adapter("a")
    assert torch.equal(model(X), first)


def test_disabling_gives_the_base_model_and_switches_gradients_off(model):
    base = Net()
    for name, layer in zip(("first", "second"), layers(model), strict=True):
        getattr(base, name).load_state_dict(layer.base_layer.state_dict())
    before = model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), base(X))
        assert trainable(model) == set()
    assert torch.equal(model(X), before)
    assert trainable(model) == {"a"}


def test_deleting_the_active_adapter_activates_another(model):
    model.set_adapter("b")
    with pytest.warns(UserWarning, match="'b' was active and is deleted; 'a' is active now"):
        model.delete_adapter("b")
    assert model.active_adapter == "a"
    assert all(list(layer.lora_A) == ["a"] and not layer.lora_magnitude_vector for layer in layers(model))
    assert model(X).isfinite().all()


def test_a_merged_adapter_is_not_deleted(model):
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.delete_adapter("a")
    assert "a" in layers(model)[0].lora_A


def test_activating_another_adapter_takes_the_merged_one_out(model):
    weight = layers(model)[0].base_layer.weight.clone()
    model.merge_adapter()
    assert not torch.allclose(layers(model)[0].base_layer.weight, weight)
    with pytest.warns(UserWarning, match="taken out"):
        model.set_adapter("b")
    torch.testing.assert_close(layers(model)[0].base_layer.weight.data, weight.data)


def test_rows_of_a_mixed_batch_equal_single_runs(model):
    with torch.no_grad():
        expected = {"__base__": None}
        for name in ("a", "b"):
            model.set_adapter(name)
            expected[name] = model(X)
        with model.disable_adapter():
            expected["__base__"] = model(X)
        names = ["b", "__base__", "a", "b"]
        mixed = model(X, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row])


@pytest.mark.parametrize(
    ("names", "train", "problem"),
    [(["a"], False, "1 entries for a batch of 4"), (["a", "zz", "a", "a"], False, "'zz'"), (["a"] * 4, True, "eval")],
)
def test_a_refused_mixed_batch_leaves_nothing_behind(model, names, train, problem):
    before = model(X)
    model.train(train)
    with pytest.raises(ValueError, match=problem):
        model(X, adapter_names=names)
    model.eval()
    assert torch.equal(model(X), before)


def test_copies_and_pickles_compute_the_same(model):
    model.set_adapter("b")
    expected = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), expected)
        with torch.no_grad():
            layers(twin)[0].lora_A["b"].weight.add_(1.0)
        assert not torch.equal(twin(X), expected)
    assert torch.equal(model(X), expected)


def test_what_others_write_into_the_slots_counts_at_the_next_call(model):
    before = model(X)
    layer = layers(model)[0]
    layer.scaling["a"] *= 2
    doubled = model(X)
    assert not torch.allclose(before, doubled)
    layer.scaling["a"] /= 2
    torch.testing.assert_close(model(X), before)
    replacement = nn.Linear(6, 2, bias=False)
    layer.lora_A["a"] = replacement
    assert not torch.allclose(model(X), before)
    hook = layer.base_layer.register_forward_hook(lambda module, args, output: output * 0)
    hooked = layer(X)
    hook.remove()
    expected = layer.lora_B["a"](replacement(X)) * layer.scaling["a"]
    torch.testing.assert_close(hooked, expected)


def test_one_adapter_alone_may_train_biases():
    model = get_peft_model(Net(), config(bias="all"), adapter_name="a")
    model.add_adapter("b", config())
    with pytest.raises(ValueError, match="'a', 'c' would"):
        model.add_adapter("c", config(bias="lora_only"))
    assert list(model.peft_config) == ["a", "b"]
