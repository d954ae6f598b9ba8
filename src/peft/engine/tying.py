# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Weights that two modules share: which they are, and what to say when an adapter touches one of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.warning import PeftWarning

from .layer import BaseTunerLayer

warn_msg_weight_tying = (
    "The base model ties its word embeddings (tie_word_embeddings=True) and the adapter covers one of the tied layers, "
    "but this method cannot keep adapters of tied layers equal. Merging the adapter or converting the model to another "
    "format will then change only one of the two layers."
)

_ADVICE = (
    "The base model ties its word embeddings (tie_word_embeddings=True) and the adapter covers {names}, but "
    "ensure_weight_tying is off: the tied layers get out of step, which shows when the adapter is merged or the model "
    "is converted. Set ensure_weight_tying=True, or leave the tied layers alone."
)


def has_tied_embeddings(model_config: dict) -> bool:
    """Whether a model's config says that its input and output embeddings are one tensor."""
    tied = model_config.get("tie_word_embeddings")
    if tied is None:
        tied = (model_config.get("text_config") or {}).get("tie_word_embeddings")
    return bool(tied)


def tied_module_names(model: nn.Module) -> list[str]:
    """Names of the modules that share the input embedding's weight, the embedding itself left out.

    Transformers' models say so in `_tied_weights_keys` (a list, or a dict target → source since transformers 5);
    what it names is checked by identity.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embedding is None:
        return []
    keys = _tied_keys(model)
    names = []
    for name, module in model.named_modules():
        if module is embedding:
            continue
        if any(f"{name}.weight" == key or f"{name}.weight".endswith(f".{key}") for key in keys):
            names.append(name)
    return names


def _tied_keys(model: nn.Module) -> set[str]:
    keys: set[str] = set()
    for name, module in model.named_modules():
        tied = getattr(module, "_tied_weights_keys", None)
        if tied:
            pairs = [*tied, *tied.values()] if isinstance(tied, dict) else list(tied)
            keys.update(f"{name}.{key}" if name else key for key in pairs)
    return keys


def tied_targets(targeted_names: list[str], model_config: dict) -> list[str]:
    """Those of the targeted modules that are a tied embedding or output layer."""
    if not has_tied_embeddings(model_config):
        return []
    return [name for name in targeted_names if name.split(".")[-1] in EMBEDDING_LAYER_NAMES]


def warn_about_tied_targets(names: list[str], ensure_weight_tying: bool, supports_tying: bool) -> None:
    """Warn once an injection when it covers tied layers without keeping them tied."""
    if not names or ensure_weight_tying and supports_tying:
        return
    if ensure_weight_tying:
        warnings.warn(warn_msg_weight_tying, PeftWarning, stacklevel=4)
    else:
        warnings.warn(_ADVICE.format(names=", ".join(names)), PeftWarning, stacklevel=4)


def warn_about_merging_tied(names: list[str]) -> None:
    """Warn before a merge into one of two layers that share a weight; where both are adapted, `part` parts them."""
    if len(names) == 1:
        warnings.warn(
            f"Merging changes {', '.join(names)}, whose weight another layer shares (tie_word_embeddings=True); both "
            "layers see the merged weight. To merge into one only, load the base model with "
            "tie_word_embeddings=False, copy the embedding into the output layer, and merge then.",
            PeftWarning,
            stacklevel=3,
        )


def part(layers: list[BaseTunerLayer], names: Iterable[str]) -> None:
    """Give each of the layers that a merge changes a base weight of its own, where several share one.

    Merged into one tensor, every layer's update would count in all of them.
    """
    owners: dict[int, nn.Module] = {}
    names = set(names)
    for layer in layers:
        base = layer.get_base_layer()
        weight = base._parameters.get("weight")
        if getattr(layer, "_follows", False):  # the layer that it is tied to merges for both
            continue
        if type(weight) is not nn.Parameter or weight.is_meta or names.isdisjoint(layer._get_available_adapters()):
            continue
        owner = owners.setdefault(id(weight), base)
        if owner is not base:
            base.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            base.__dict__["_parted_from"] = owner
            layer._replan()


def rejoin(model: nn.Module, unmerged: bool = False) -> None:
    """Let layers share a weight again that `part` parted: after unmerging all, else those whose weights are equal."""
    parted = [module for module in model.modules() if "_parted_from" in module.__dict__]
    for base in parted:
        owner = base.__dict__.pop("_parted_from")
        if unmerged or _is_same(base.weight, owner.weight):
            base.weight = owner.weight
    if parted:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module._replan()


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of one sum."""
    room = 8 * torch.finfo(a.dtype).eps * max(float(a.abs().max()), float(b.abs().max()))
    return a.shape == b.shape and float((a - b).abs().max()) <= room


def note_untied(model: nn.Module) -> None:
    """Say in a model's config that its embeddings are no longer one tensor, where a merge has parted them.

    Saving a model whose config claims that they are tied would drop one of the two.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return
    source, output = model.get_input_embeddings(), model.get_output_embeddings()
    if source is None or output is None or source.weight is output.weight:
        return
    if source.weight.data_ptr() != output.weight.data_ptr():
        config.tie_word_embeddings = False
        warnings.warn(
            "The merged model's input and output embeddings differ: its config now says tie_word_embeddings=False.",
            PeftWarning,
            stacklevel=4,
        )
