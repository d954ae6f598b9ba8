# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Which bare parameters of a model a config targets (`target_parameters`), and putting an adapter on them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from peft.engine.layer import BaseTunerLayer
from peft.engine.targets import refuse_layers_read_by_kernels
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.integrations import init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper, _get_submodules, get_pattern_key

from .layer.param import ParamWrapper

if TYPE_CHECKING:
    from .config import LoraConfig
    from .model import LoraModel


def inject_parameters(
    tuner: LoraModel, config: LoraConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
) -> list[str]:
    """Put an adapter on every parameter whose name is, or ends with, one of `target_parameters`.

    Returns:
        Their names, as the model calls them without wrappers.

    Raises:
        NoMatchingPeftModuleError: There is none, and no module is adapted either.
        ValueError: A parameter belongs to a module that is adapted as a whole, or to one that cannot be adapted in a model
            of this type.
    """
    targets = config.target_parameters or ()
    targeted: list[str] = []
    unused = set(targets)
    found = list(find_parameters(config, model))
    refuse_layers_read_by_kernels(model, (path for path, _, _ in found))
    for path, name, hits in found:
        key = f"{path}.{name}" if path else name
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            _adapt(tuner, config, model, adapter_name, path, name, key)
        unused -= hits
        targeted.append(key)
    if targets and not targeted and not tuner.targeted_module_names:
        raise NoMatchingPeftModuleError(
            f"target_parameters={list(targets)!r} names no parameter of the base model, and no module is adapted either: "
            "give full names or ends of names as in model.named_parameters()."
        )
    if unused:
        warnings.warn(
            f"target_parameters: {', '.join(sorted(unused))} name no parameter of the base model.",
            RuntimeWarning,
            stacklevel=3,
        )
    return targeted


def find_parameters(config: LoraConfig, model: nn.Module) -> Iterator[tuple[str, str, set[str]]]:
    """The parameters that `target_parameters` names: their module's name without wrappers, their own, what names them.

    With those that a library's own kind of tensor has taken the place of, as with MXFP4: `ParamWrapper` refuses them.
    """
    targets = config.target_parameters or ()
    for path, owner in model.named_modules():
        if isinstance(owner, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        plain = ".".join(part for part in path.split(".") if part != "base_layer")
        foreign = [
            name
            for name, value in vars(owner).items()
            if hasattr(value, "shape") and not isinstance(value, torch.Tensor)
        ]
        for name in (*(name for name, _ in owner.named_parameters(recurse=False)), *foreign):
            key = f"{plain}.{name}" if plain else name
            hits = {target for target in targets if key == target or key.endswith(f".{target}")}
            if hits:
                yield plain, name, hits


def _adapt(
    tuner: LoraModel, config: LoraConfig, model: nn.Module, adapter_name: str, path: str, name: str, key: str
) -> None:
    if not path:
        raise ValueError(
            f"target_parameters: {name} belongs to the model itself; only parameters of modules are adapted."
        )
    parent, outer, child = _get_submodules(model, path)
    rank_key = get_pattern_key(config.rank_pattern.keys(), key)
    alpha_key = get_pattern_key(config.alpha_pattern.keys(), key)
    r = config.rank_pattern.get(rank_key, config.r)
    lora_alpha = config.alpha_pattern.get(alpha_key, config.lora_alpha)
    wrapper = outer
    while isinstance(wrapper, BaseTunerLayer):
        if not isinstance(wrapper, ParamWrapper):
            raise ValueError(
                f"{key} is in target_parameters, and its module {path} is adapted as a whole too: take one of them out."
            )
        if wrapper.parameter_name == name:
            wrapper.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)
            return
        wrapper = wrapper.base_layer
    new = ParamWrapper(outer, adapter_name, name, config=config, r=r, lora_alpha=lora_alpha, target_name=key)
    if adapter_name not in tuner.active_adapters:
        new.requires_grad_(False)  # an added adapter is not trained before it is activated
    tuner._replace_module(parent, child, new, outer)


def in_todays_layout(model: nn.Module, adapter_name: str, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A saved adapter with the factors of stacked experts as they are stored now.

    Releases 0.17 to 0.19.0 took every stack for `[experts, in, out]`. Where the module stores `[experts, out, in]`, A and B
    have each other's features there, which their shapes tell unless all experts' matrices are square.

    Args:
        model: Model that carries the adapter.
        adapter_name: Its name in the model.
        saved: Tensors by saved name.
    """
    pairs = {}
    for path, layer in model.named_modules():
        if isinstance(layer, ParamWrapper) and layer.has_adapter(adapter_name) and layer.is_stack_of_rows:
            names = tuple(f"{path}.{factor}.weight" for factor in ("lora_A", "lora_B"))
            if all(name in saved and saved[name].dim() == 2 for name in names):
                pairs[names] = layer
    if not any(layer.is_other_way_round(*(saved[name] for name in names)) for names, layer in pairs.items()):
        return saved
    turned = dict(saved)
    for (a, b), layer in pairs.items():
        turned[a], turned[b] = layer.turn_round(saved[a], saved[b])
    return turned
