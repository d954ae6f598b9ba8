# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Which modules a config means."""

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


def test_a_second_adapter_does_not_reach_into_the_first_ones_layers():
    model = get_peft_model(Net(), LoraConfig(target_modules=".*"[:2] + "first"))
    model.add_adapter("other", LoraConfig(target_modules=r"(first|second).*"))
    layers = [name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")]
    assert layers == ["first", "second"]
