# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Putting a new adapter into a model: which modules get it, and what to say when they are not the expected ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from peft.utils.constants import DUMMY_TARGET_MODULES, MIN_TARGET_MODULES_FOR_OPTIMIZATION
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.integrations import init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper, _get_submodules, get_pattern_key
from peft.utils.warning import PeftWarning

from .layer import BaseTunerLayer
from .targets import _ExcludedModule, find_minimal_target_modules, refuse_layers_read_by_kernels

if TYPE_CHECKING:
    from peft.config import PeftConfig

    from .tuner import BaseTuner


@dataclass
class Matches:
    """How the modules of a model met a config: names in the order of the model."""

    targeted: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)


def adaptable_names(model: nn.Module) -> Iterable[str]:
    """Names of all modules but those inside an adapted layer or a wrapper of trainable modules."""
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = None
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside = f"{name}."
        if name and not isinstance(module, AuxiliaryTrainingWrapper):
            yield name


def match_modules(tuner: BaseTuner, config: PeftConfig, names: Iterable[str]) -> Matches:
    """Sort module names into targeted, excluded and unmatched ones."""
    matches = Matches()
    for name in names:
        result = tuner._check_target_module_exists(config, name)
        if isinstance(result, _ExcludedModule):
            matches.excluded.append(name)
        else:
            (matches.targeted if result else matches.unmatched).append(name)
    return matches


def _leave_out(names: Iterable[str], matches: Matches) -> None:
    """Exclude targets that the config trains whole without naming them."""
    for name in names:
        if name in matches.targeted:
            matches.targeted.remove(name)
            matches.excluded.append(name)
            warnings.warn(
                f"{name} gets no adapter: modules_to_save trains a layer whole that ensure_weight_tying keeps tied to it.",
                PeftWarning,
                stacklevel=5,
            )


def names_in_state_dict(state_dict: dict[str, torch.Tensor], prefix: str) -> set[str]:
    """Names of the modules that a saved adapter has parameters for."""
    marker = f".{prefix}"
    return {key.split(marker, 1)[0] for key in state_dict if marker in key}


def shorten_target_modules(config: PeftConfig, matches: Matches) -> None:
    """Replace a long list of full names in the config by the few suffixes that mean the same modules."""
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, (list, set)) or len(targets) < MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        return
    if not set(targets) <= {*matches.targeted, *matches.excluded}:
        return  # some are suffixes already
    others = {*matches.unmatched, *matches.excluded} - set(targets)
    shorter = find_minimal_target_modules(list(targets), others)
    if len(shorter) < len(targets):
        config.target_modules = shorter


def inject(
    tuner: BaseTuner,
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    low_cpu_mem_usage: bool,
    state_dict: dict[str, torch.Tensor] | None,
) -> list[str]:
    """Create the adapter in every module that the config, or a saved adapter, names.

    Returns:
        The names of the adapted modules.

    Raises:
        NoMatchingPeftModuleError: Nothing in the model matches.
        ValueError: A layer cannot be adapted in a model of this type.
    """
    names = list(adaptable_names(model))
    matches = match_modules(tuner, config, names)
    _leave_out(tuner._trained_whole(config, model), matches)
    chosen = matches.targeted
    if state_dict is not None:
        saved = names_in_state_dict(state_dict, tuner.prefix) - tuner._parameter_owners(config, model)
        chosen = [name for name in names if name in saved]
        _warn_about_disagreement(matches.targeted, chosen)
    else:
        shorten_target_modules(config, matches)
    chosen = [*chosen, *tuner._tied_to(config, model, chosen)]
    refuse_layers_read_by_kernels(model, chosen)
    context = init_empty_weights if low_cpu_mem_usage else nullcontext
    for name in chosen:
        parent, target, target_name = _get_submodules(model, name)
        with context():
            tuner._create_and_replace(config, adapter_name, target, target_name, parent, current_key=name)
    if not chosen and not _may_be_empty(config):
        raise _nothing_matched(config, matches)
    _warn_about_leftovers(config, matches, chosen)
    return chosen


def _may_be_empty(config: PeftConfig) -> bool:
    """Whether a config asks for something beside the modules that it names: parameters, or tokens and no modules."""
    targets = getattr(config, "target_modules", None)
    if targets == DUMMY_TARGET_MODULES or getattr(config, "target_parameters", None):
        return True
    return not targets and bool(getattr(config, "trainable_token_indices", None))


def _nothing_matched(config: PeftConfig, matches: Matches) -> NoMatchingPeftModuleError:
    targets = config.target_modules
    if matches.excluded:
        return NoMatchingPeftModuleError(
            f"Every module that target_modules={targets!r} names is excluded again by exclude_modules="
            f"{getattr(config, 'exclude_modules', None)!r} or modules_to_save="
            f"{getattr(config, 'modules_to_save', None)!r}: leave some out of these."
        )
    problem = f"target_modules={targets!r} names no module of the base model"
    layers = getattr(config, "layers_to_transform", None)
    if layers is not None:
        problem += (
            f" (with layers_to_transform={layers!r}, layers_pattern={getattr(config, 'layers_pattern', None)!r})"
        )
    examples = ", ".join(matches.unmatched[-3:])
    return NoMatchingPeftModuleError(
        f"{problem}. Give names, suffixes or one regular expression that matches whole names, such as those of: {examples}."
    )


def _warn_about_disagreement(by_config: list[str], by_state_dict: list[str]) -> None:
    only_config = sorted(set(by_config) - set(by_state_dict))
    only_state_dict = sorted(set(by_state_dict) - set(by_config))
    if only_config or only_state_dict:
        warnings.warn(
            "The config and the state dict name different modules; the state dict is followed. Only in the config: "
            f"{only_config or 'none'}. Only in the state dict: {only_state_dict or 'none'}.",
            RuntimeWarning,
            stacklevel=4,
        )


def _warn_about_leftovers(config: PeftConfig, matches: Matches, chosen: list[str]) -> None:
    targets = getattr(config, "target_modules", None)
    if targets and targets != DUMMY_TARGET_MODULES and not chosen:
        warnings.warn(f"target_modules={targets!r} names no module of the base model.", RuntimeWarning, stacklevel=4)
    excluded = getattr(config, "exclude_modules", None)
    if excluded and not matches.excluded:
        warnings.warn(f"exclude_modules={excluded!r} excluded nothing: no module has such a name.", stacklevel=4)
    for attribute in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, attribute, None) or {}
        unused = [
            pattern for pattern in patterns if all(get_pattern_key([pattern], name) != pattern for name in chosen)
        ]
        if unused and not getattr(config, "target_parameters", None):
            warnings.warn(
                f"{attribute} has keys that match no adapted module and change nothing: {sorted(unused)}.",
                RuntimeWarning,
                stacklevel=4,
            )


def inspect_matched_modules(tuner: BaseTuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """The names of a tuner's modules by whether the adapter's config targets them: `matched` and `unmatched`."""
    config = tuner.peft_config[adapter_name]
    matches = match_modules(tuner, config, (name for name, _ in tuner.model.named_modules()))
    return {"matched": matches.targeted, "unmatched": matches.unmatched}
