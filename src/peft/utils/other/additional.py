# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Wrapping the modules that a config trains beside its adapter: `modules_to_save` and `trainable_token_indices`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from peft.utils.warning import PeftWarning

from .modules import _get_input_embeddings_name, _get_submodules, _is_valid_match
from .modules_to_save import ModulesToSaveWrapper
from .trainable_tokens import TrainableTokensWrapper
from .wrapper import AuxiliaryTrainingWrapper


def _set_trainable(
    model: nn.Module,
    adapter_name: str,
    module_names: Iterable[str] | None,
    inference_mode: bool,
    strict_module_check: bool = False,
    wrapper_cls: type[AuxiliaryTrainingWrapper] | None = None,
    activate_adapter: bool = True,
    **wrapper_kwargs: Any,
) -> list[AuxiliaryTrainingWrapper] | None:
    """Give an adapter its own version of every module of a name, wrapping those that are not wrapped yet.

    Args:
        model: Model to change in place.
        adapter_name: Adapter to add.
        module_names: Names of modules, or ends of names; nothing happens for None.
        inference_mode: Leave the new versions frozen.
        strict_module_check: Refuse names that match nothing.
        wrapper_cls: `ModulesToSaveWrapper` if None.
        activate_adapter: Whether the adapter is, or is to be, an active one.
        **wrapper_kwargs: Handed to the wrapper.

    Returns:
        The wrappers that hold the adapter; None if `module_names` is None.

    Raises:
        ValueError: With `strict_module_check`, no module has any of the names.
        TypeError: A matching module cannot be wrapped, or is wrapped in another kind of wrapper.
    """
    if module_names is None:
        return None
    targets = list(module_names)
    found = _named(model, targets) if strict_module_check else _outermost_matches(model, targets)
    kind = ModulesToSaveWrapper if wrapper_cls is None else wrapper_cls
    return [
        _wrap(model, name, kind, adapter_name, activate_adapter, inference_mode, **wrapper_kwargs) for name in found
    ]


def _named(model: nn.Module, targets: list[str]) -> list[str]:
    found = _outermost_matches(model, targets)
    if not found:
        raise ValueError(
            f"The base model has no module called {', '.join(map(repr, targets))}: name modules of this model, as "
            "model.named_modules() lists them."
        )
    return found


def _outermost_matches(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Full names of the modules that are meant; what lies inside one of them, or inside a wrapper, is not.

    A name is any end of a full name, as in the release: files that it wrote hold `input_layernorm` for "norm".
    """
    found: list[str] = []
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        matches = name.endswith(tuple(targets))
        inside = f"{name}." if matches or isinstance(module, AuxiliaryTrainingWrapper) else None
        if matches:
            found.append(name)
    return found


def _wrap(
    model: nn.Module,
    name: str,
    kind: type[AuxiliaryTrainingWrapper],
    adapter_name: str,
    activate_adapter: bool,
    inference_mode: bool,
    **wrapper_kwargs: Any,
) -> AuxiliaryTrainingWrapper:
    parent, target, child_name = _get_submodules(model, name)
    if isinstance(target, kind):
        target.update(adapter_name, **wrapper_kwargs)
        wrapper = target
    elif isinstance(target, AuxiliaryTrainingWrapper):
        raise TypeError(
            f"The module {name!r} is held by {target._error_message_name()} of another adapter and cannot be by "
            f"{'modules_to_save' if kind is ModulesToSaveWrapper else 'trainable_token_indices'} of {adapter_name!r} "
            "too: use the same setting for both, or delete the other adapter and unload it first."
        )
    else:
        wrapper = kind(target, adapter_name, **wrapper_kwargs)
        if not activate_adapter:
            wrapper.set_adapter([])
        setattr(parent, child_name, wrapper)
    active = activate_adapter and adapter_name in wrapper.active_adapters
    wrapper.set_requires_grad(adapter_name, active and not inference_mode and not wrapper.disable_adapters)
    return wrapper


def _set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Make adapters the active ones in every wrapper of a model that has a version of them; in others, none.

    Raises:
        ValueError: A module of `modules_to_save` has versions of several of them; nothing was changed.
    """
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    for wrapper in wrappers:
        if isinstance(wrapper, ModulesToSaveWrapper) and names:
            wrapper.check_set_adapter(names)
    for wrapper in wrappers:
        available = wrapper._get_available_adapters()
        wrapper.set_adapter([name for name in names if name in available], inference_mode=inference_mode)


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Freeze every parameter with the adapter's name in its own name."""
    for name, parameter in model.named_parameters():
        if adapter_name in name:
            parameter.requires_grad_(False)


# ---- what a config asks for ----------------------------------------------------------------------------------------
def set_additional_trainable_modules(
    model: nn.Module, peft_config: Any, model_config: dict, adapter_name: str, activate_adapter: bool = True
) -> None:
    """Wrap the modules that a config trains beside its adapter.

    Args:
        model: Model to change in place.
        peft_config: Config; `modules_to_save` and `trainable_token_indices` are read where it has them.
        model_config: Config of the base model as a dict.
        adapter_name: Adapter to add.
        activate_adapter: Whether the adapter is, or is to be, an active one.

    Raises:
        ValueError: A token setting names no module, contradicts `modules_to_save` or lies outside the vocabulary.
        TypeError: A module cannot be wrapped.
    """
    options = {"inference_mode": peft_config.inference_mode, "activate_adapter": activate_adapter}
    if getattr(peft_config, "modules_to_save", None) is not None:
        _set_modules_to_save(model, peft_config, model_config, adapter_name, options)
    if getattr(peft_config, "trainable_token_indices", None) is not None:
        _set_trainable_tokens(model, peft_config, model_config, adapter_name, options)


def _set_modules_to_save(
    model: nn.Module, config: Any, model_config: dict, adapter_name: str, options: dict[str, Any]
) -> None:
    names = _outermost_matches(model, list(config.modules_to_save))
    group = tied_group(model, model_config)
    covered = [name for name in group if name in names]
    ensure = getattr(config, "ensure_weight_tying", False)
    _check_tying(covered, group, ensure)
    followers = group[1:] if covered and ensure else []
    if followers and group[0] not in names:
        names.append(group[0])
    wrappers = {
        name: _wrap(model, name, ModulesToSaveWrapper, adapter_name, **options)
        for name in names
        if name not in followers
    }
    for name in followers:
        source = wrappers[group[0]].modules_to_save[adapter_name]
        _wrap(model, name, ModulesToSaveWrapper, adapter_name, **options, tied_module=source)


def _set_trainable_tokens(
    model: nn.Module, config: Any, model_config: dict, adapter_name: str, options: dict[str, Any]
) -> None:
    indices = config.trainable_token_indices
    if not isinstance(indices, dict):
        indices = {_get_input_embeddings_name(model, "embed_tokens"): indices}
    _check_not_saved_whole(indices, getattr(config, "modules_to_save", None) or ())
    tokens = {full: list(rows) for name, rows in indices.items() for full in _named(model, [name])}
    group = tied_group(model, model_config)
    followers = _followers(tokens, group, getattr(config, "ensure_weight_tying", False))
    wrappers = {
        name: _wrap(model, name, TrainableTokensWrapper, adapter_name, **options, token_indices=rows)
        for name, rows in tokens.items()
        if name not in followers
    }
    for name in followers:
        source = wrappers[group[0]].token_adapter
        kwargs = {"token_indices": tokens[group[0]], "tied_adapter": source}
        _wrap(model, name, TrainableTokensWrapper, adapter_name, **options, **kwargs)


def _check_not_saved_whole(names: Iterable[str], saved: Iterable[str]) -> None:
    for name in names:
        clash = next((other for other in saved if _is_valid_match(name, other) or _is_valid_match(other, name)), None)
        if clash is not None:
            raise ValueError(
                f"modules_to_save={clash!r} trains this module whole already, so trainable_token_indices cannot train "
                f"rows of {name!r}: use one of the two."
            )


def _followers(tokens: dict[str, list[int]], group: list[str], ensure: bool) -> list[str]:
    """The tied modules that use the rows of the embedding; adds the embedding to `tokens` if they are all it has.

    Modules that the config gives rows of their own are left out, unless `ensure` forbids that.
    """
    named = [name for name in group if name in tokens]
    if not named or (group[0] not in named and not ensure):
        return []
    rows = tokens.setdefault(group[0], tokens[named[0]])
    different = [name for name in named if tokens[name] != rows]
    if different and ensure:
        raise ValueError(
            f"ensure_weight_tying=True, but trainable_token_indices gives {group[0]!r} and {', '.join(different)}, "
            "which share a weight, different tokens: give them the same ones."
        )
    return [name for name in group[1:] if name not in different]


def tied_group(model: nn.Module, model_config: dict) -> list[str]:
    """The input embedding and the modules that share its weight by the model's config; empty if none do."""
    from peft.engine import tying

    embedding = _get_input_embeddings_name(model)
    if embedding is None or not tying.has_tied_embeddings(model_config):
        return []
    tied = tying.tied_module_names(model)
    return [embedding, *tied] if tied else []


def _check_tying(covered: list[str], group: list[str], ensure: bool) -> None:
    from peft.engine import tying

    if ensure and not group:
        warnings.warn(
            "ensure_weight_tying=True has no effect: the base model has no tied embeddings.", PeftWarning, stacklevel=2
        )
    tying.warn_about_tied_targets(covered, ensure, supports_tying=True)
