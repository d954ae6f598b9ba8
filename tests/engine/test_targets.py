# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Which modules a config means."""

from types import MappingProxyType, SimpleNamespace

import pytest
from torch import nn

from peft import LoraConfig, NoMatchingPeftModuleError, get_peft_model
from peft.tuners.tuners_utils import (
    _ExcludedModule,
    check_target_module_exists,
    find_minimal_target_modules,
    inspect_matched_modules,
)


@pytest.mark.parametrize(
    ("options", "key", "expected"),
    [
        ({"target_modules": ["q"]}, "q", True),
        ({"target_modules": ["q"]}, "layers.0.q", True),
        ({"target_modules": ["q"]}, "layers.0.xq", False),
        ({"target_modules": ["attn.q"]}, "layers.0.attn.q", True),
        ({"target_modules": ["attn.q"]}, "layers.0.other.q", False),
        ({"target_modules": r".*\.(q|v)"}, "layers.0.q", True),
        ({"target_modules": r"(q|v)"}, "layers.0.q", False),
        ({"target_modules": None}, "layers.0.q", False),
        ({"target_modules": ["q"], "layers_to_transform": [1]}, "model.layers.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [1]}, "model.layers.0.q", False),
        ({"target_modules": ["q"], "layers_to_transform": 0}, "model.layers.0.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [1]}, "q", True),  # a full name needs no layer number
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "h"}, "model.h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "h"}, "model.x.1.q", False),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["x", "h"]}, "model.h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "x|h"}, "model.h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "h"}, "h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [1]}, "h.1.q", False),
        ({"target_modules": ["q"], "layers_to_transform": [1]}, "decoder.block.1.layer.0.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [0]}, "decoder.block.1.layer.0.q", False),
    ],
)
def test_a_config_means_these_modules(options, key, expected):
    assert bool(check_target_module_exists(LoraConfig(**options), key)) is expected


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["layers.0.q"]},
        {"exclude_modules": r".*\.0\..*"},
        {"modules_to_save": ["q"]},
        {"modules_to_save": ["layers"]},
    ],
)
def test_exclusions_are_told_apart_from_misses(options):
    result = check_target_module_exists(LoraConfig(target_modules=["q"], **options), "layers.0.q")
    assert isinstance(result, _ExcludedModule)
    assert not result


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


def test_names_that_match_nothing_are_an_error_that_lists_examples():
    with pytest.raises(NoMatchingPeftModuleError, match=r"nothing.*such as those of: first, second, norm"):
        get_peft_model(Net(), LoraConfig(target_modules=["nothing"]))


def test_excluding_everything_is_an_error_that_names_the_exclusion():
    with pytest.raises(NoMatchingPeftModuleError, match="exclude_modules"):
        get_peft_model(Net(), LoraConfig(target_modules=["first"], exclude_modules=["first"]))


def test_a_module_that_cannot_be_adapted_is_named():
    with pytest.raises(ValueError, match="norm is a LayerNorm"):
        get_peft_model(Net(), LoraConfig(target_modules=["norm"]))


def test_no_targets_and_no_default_is_an_error():
    with pytest.raises(ValueError, match="target_modules is not set"):
        get_peft_model(Net(), LoraConfig())


def test_an_exclusion_or_pattern_without_effect_is_warned_about():
    with pytest.warns(UserWarning, match="excluded nothing"):
        get_peft_model(Net(), LoraConfig(target_modules=["first"], exclude_modules=["other"]))
    with pytest.warns(RuntimeWarning, match="rank_pattern has keys that match no adapted module"):
        get_peft_model(Net(), LoraConfig(target_modules=["first"], rank_pattern={"irst": 4}))


def test_inspection_lists_both_sides():
    model = get_peft_model(Net(), LoraConfig(target_modules=["first"]))
    found = inspect_matched_modules(model.base_model)
    assert found["matched"] == ["first"]
    assert {"second", "norm"} <= set(found["unmatched"])


def test_many_full_names_become_few_suffixes():
    names = [f"layers.{i}.{name}" for i in range(12) for name in ("q", "k", "v")]
    targets = [name for name in names if name[-1] in "qv"]
    assert find_minimal_target_modules(targets, set(names) - set(targets)) == {"q", "v"}
    uneven = find_minimal_target_modules(targets[:-1], set(names) - set(targets[:-1]))
    assert {name for name in names if any(name == s or name.endswith(f".{s}") for s in uneven)} == set(targets[:-1])
    with pytest.raises(ValueError, match="both targets and not"):
        find_minimal_target_modules(["a.b"], ["a.b"])
    assert find_minimal_target_modules(["head"], ["decoder.head"]) == {"head"}


def test_a_second_adapter_does_not_reach_into_the_first_ones_layers():
    model = get_peft_model(Net(), LoraConfig(target_modules=".*"[:2] + "first"))
    model.add_adapter("other", LoraConfig(target_modules=r"(first|second).*"))
    layers = [name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")]
    assert layers == ["first", "second"]


class Mixer(nn.Module):
    """A model of one Mamba block's layers."""

    def __init__(self, config):
        super().__init__()
        self.mixer = nn.ModuleDict({"in_proj": nn.Linear(4, 4), "out_proj": nn.Linear(4, 4)})
        self.mixer["conv1d"] = nn.Conv1d(4, 4, 1)
        self.config = config


@pytest.mark.parametrize("kind", ["falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"])
@pytest.mark.parametrize(
    "where",
    [
        {"target_modules": ["in_proj", "out_proj"]},
        {"target_modules": ["conv1d"]},
        {"target_modules": r".*out_proj"},
        {"target_modules": [], "target_parameters": ["out_proj.weight"]},
    ],
    ids=str,
)
def test_layers_that_mambas_kernels_read_are_refused(kind, where):
    model = Mixer(SimpleNamespace(model_type=kind))
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=f"model_type='{kind}'.*exclude_modules"):
        get_peft_model(model, LoraConfig(**where))
    assert [name for name, _ in model.named_parameters()] == names
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*_proj", exclude_modules=["out_proj"]))
    assert adapted.base_model.targeted_module_names == ["mixer.in_proj"]
    get_peft_model(Mixer(SimpleNamespace(model_type="llama")), LoraConfig(**where))


@pytest.mark.parametrize(
    "config",
    [SimpleNamespace(width=4), {"width": 4}, MappingProxyType({"width": 4}), None, "a name", object()],
    ids=lambda value: type(value).__name__,
)
def test_a_model_may_have_any_config(config, tmp_path):
    model = get_peft_model(Mixer(config), LoraConfig(target_modules=["in_proj"]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
