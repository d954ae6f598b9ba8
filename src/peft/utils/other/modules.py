# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Finding modules and tensors of a model by name, pattern or storage."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The parent of the module called `key`, the module, and its name in the parent.

    Raises:
        AttributeError: The model has no such module.
    """
    parent_name, _, name = key.rpartition(".")
    return model.get_submodule(parent_name), model.get_submodule(key), name


def _is_valid_match(key: str, target_key: str) -> bool:
    """Whether `key` is `target_key` or ends in it at a dot."""
    return key == target_key or key.endswith(f".{target_key}")


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """Match a whole module name against a regular expression."""
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """The first of some regular expressions that matches a name, or the end of it after a dot.

    Args:
        pattern_keys: Regular expressions, such as the keys of `rank_pattern`; one that starts with `^` matches from
            the start of the name only.
        key_to_match: Dotted name of a module.

    Returns:
        The expression, or `key_to_match` itself where none matches.
    """
    for pattern in pattern_keys:
        if re.match(rf"(.*\.)?({pattern})$", key_to_match):
            return pattern
    return key_to_match


def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """The dotted name of a model's input embedding; `default` if the model does not tell it."""
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    if embedding is None:
        return default
    return next((name for name, module in model.named_modules() if module is embedding), default)


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """What two tensors have in common exactly if they share memory.

    Returns:
        Device, an identity of the storage and its size in bytes. Storages without memory (meta) are told apart by
        their object, wrapper subclasses by themselves.
    """
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse layouts and some subclasses have none
        return tensor.device, id(tensor), tensor.numel() * tensor.element_size()
    return tensor.device, storage.data_ptr() or storage._cdata, storage.nbytes()
