# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Which modules a config means: names, suffixes, patterns, layer numbers, exclusions and shorthands."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from peft.utils.other import match_target_against_key
from peft.utils.peft_types import TaskType
from peft.weights import reader_of

from .layer import BaseTunerLayer

if TYPE_CHECKING:
    from peft.config import PeftConfig

# Names of classes that count as linear for "all-linear" besides nn.Linear, Conv1D and the registered storage formats,
# whatever package they are of.
_LINEAR_CLASS_NAMES = frozenset(
    "EetqLinear EETQLinear HQQLinear QuantizedLinear WQLinear_GEMM WQLinear_GEMV BaseQuantLinear BitLinear".split()
)
_NUMBERED_LAYER = r".*?\.[^.]*\.(?P<number>\d+)\."  # of nested lists it is the outermost that counts the layers


class _ExcludedModule:
    """A module that `exclude_modules` or `modules_to_save` took out; false, so that it reads as no match."""

    def __bool__(self) -> bool:
        return False


def has_suffix(key: str, names: Iterable[str]) -> bool:
    """Whether `key` is one of the dotted names or ends in one of them at a dot."""
    return any(key == name or key.endswith(f".{name}") for name in names)


def check_target_module_exists(config: PeftConfig, key: str) -> bool | re.Match[str] | None | _ExcludedModule:
    """Whether a config targets the module called `key`.

    Args:
        config: Config with `target_modules` and, where the method has them, `exclude_modules`, `layers_to_transform`
            and `layers_pattern`.
        key: Dotted name of the module in the base model.

    Returns:
        Something true where it is targeted; an `_ExcludedModule` (false) where it would be but for an exclusion.
    """
    if _is_excluded(config, key):
        return _ExcludedModule()
    targets = config.target_modules
    if targets is None:
        return False
    if isinstance(targets, str):
        return match_target_against_key(targets, key)
    if key in targets:
        return True
    return has_suffix(key, targets) and _is_in_layers(config, key)


def _is_excluded(config: PeftConfig, key: str) -> bool:
    excluded = getattr(config, "exclude_modules", None)
    if isinstance(excluded, str):
        if re.fullmatch(excluded, key):
            return True
    elif excluded and has_suffix(key, excluded):
        return True
    saved = getattr(config, "modules_to_save", None) or ()
    return any(re.fullmatch(rf"(.*\.)?{re.escape(name)}(\..*)?", key) for name in saved)


def _is_in_layers(config: PeftConfig, key: str) -> bool:
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or wanted == []:
        return True
    patterns = getattr(config, "layers_pattern", None)
    if not patterns:
        match = re.match(_NUMBERED_LAYER, key)
    else:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        lists = (re.match(rf"(?:^|.*?\.)(?:{pattern})\.(?P<number>\d+)\.", key) for pattern in patterns)
        match = next(filter(None, lists), None)
    if match is None:
        return False
    number = int(match["number"])
    return number == wanted if isinstance(wanted, int) else number in wanted


def is_transformers_model(model: nn.Module) -> bool:
    """Whether a model is one of transformers', told by name: importing that class takes seconds and brings triton."""
    return any(
        cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.") for cls in type(model).__mro__
    )


def is_linear_like(module: nn.Module) -> bool:
    """Whether "all-linear" includes this module: it multiplies its input by one stored matrix."""
    if isinstance(module, (nn.Linear, Conv1D)) or reader_of(module) is not None:
        return True
    return any(
        cls.__name__ in _LINEAR_CLASS_NAMES or cls.__name__.endswith("QuantLinear") for cls in type(module).__mro__
    )


def _maybe_include_all_linear_layers(peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
    """Replace the shorthand "all-linear" by the names of the model's linear layers, its output layer left out."""
    targets = getattr(peft_config, "target_modules", None)
    if not (isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND):
        return peft_config
    if not hasattr(model, "named_modules"):
        raise ValueError(f'target_modules="all-linear" needs an nn.Module, got {type(model).__name__}.')
    names = set(_linear_names(model))
    if is_transformers_model(model):
        names -= _output_layer_names(model, peft_config)
    peft_config.target_modules = names
    return peft_config


def _linear_names(model: nn.Module) -> Iterable[str]:
    wrapped: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in wrapped[-1:]):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapped.append(name)
            if is_linear_like(module.get_base_layer()):
                yield name
        elif is_linear_like(module):
            yield name


def _output_layer_names(model: nn.Module, config: PeftConfig) -> set[str]:
    """The head of a language model, or of a classifier: adapters are for the body."""
    output = model.get_output_embeddings()
    if output is not None:
        return {name for name, module in model.named_modules() if module is output}
    if config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
        heads = [name for name in SEQ_CLS_HEAD_NAMES if getattr(model, name, None) is not None]
        return {
            name
            for name, _ in model.named_modules()
            if any(has_suffix(name, [head]) or f"{head}." in name for head in heads)
        }
    return set()


def find_minimal_target_modules(
    target_modules: list[str] | set[str], other_module_names: list[str] | set[str]
) -> set[str]:
    """The shortest dotted suffixes that name all targets and none of the other modules, as far as these have no target's
    full name for an end.

    Keeps long generated target lists (one entry a layer) short and quick to match.

    Args:
        target_modules: Full dotted names.
        other_module_names: Full names of all modules that must not match.

    Raises:
        ValueError: A name is empty, or a module is on both sides.
    """
    targets, others = set(target_modules), set(other_module_names)
    if not targets or "" in targets:
        raise ValueError("target_modules must hold names and no empty string.")
    overlap = targets & others
    if overlap:
        raise ValueError(f"These modules are both targets and not: {sorted(overlap)}.")
    forbidden = {suffix for name in others for suffix in _suffixes(name)}
    chosen: set[str] = set()
    for name in sorted(targets):
        if chosen.isdisjoint(_suffixes(name)):
            chosen.add(next((suffix for suffix in _suffixes(name) if suffix not in forbidden), name))
    return {name for name in chosen if chosen.isdisjoint(list(_suffixes(name))[:-1])}


def _suffixes(name: str) -> Iterable[str]:
    """Dotted suffixes of a name from the shortest to the name itself."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))


# Fused kernels of these models read the weights of these layers past their forward pass: adapters on them have no effect.
_MAMBA_TYPES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
_READ_BY_KERNELS = ("out_proj", "conv1d")


def refuse_layers_read_by_kernels(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse adapters on layers of Mamba models that never run by themselves.

    Args:
        model: The base model.
        names: Names of the modules to adapt.

    Raises:
        ValueError: One of them is such a layer.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in _MAMBA_TYPES:
        return
    for name in names:
        if name.rpartition(".")[2] in _READ_BY_KERNELS:
            raise ValueError(
                f"{name} cannot be adapted: kernels of model_type={kind!r} read the weights of "
                f"{' and '.join(_READ_BY_KERNELS)} past these layers. Leave them out of target_modules, or name them in "
                "exclude_modules."
            )
