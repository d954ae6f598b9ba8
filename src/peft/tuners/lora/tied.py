# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Adapters of layers that share a weight (`ensure_weight_tying`): the output layer uses the embedding's A and B.

The embedding computes with W + s·(B A)ᵀ, stored `[tokens, dim]`, and the output layer multiplies by the same matrix: its
factors are Bᵀ `[r, dim]` and Aᵀ `[tokens, r]`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft.utils.other.additional import tied_group
from peft.utils.warning import PeftWarning

from .layer import Embedding, LoraLayer

if TYPE_CHECKING:
    from .config import LoraConfig


class TiedFactor(nn.Linear):
    """A or B of an output layer, which is a parameter of the embedding's adapter, transposed.

    `weight` is always the embedding's, and gradients go there. A parameter of that name is registered too, so that the
    factor is listed, saved and counted; it never gets a gradient, so that no optimizer writes to the shared memory
    twice. Under `DistributedDataParallel` this takes `find_unused_parameters=True`.

    Args:
        embedding: The adapted embedding.
        slot: `lora_embedding_A` or `lora_embedding_B`.
        adapter_name: Name of the adapter.
    """

    def __init__(self, embedding: Embedding, slot: str, adapter_name: str) -> None:
        nn.Module.__init__(self)
        self.__dict__["_source"] = (embedding, slot, adapter_name)
        self.out_features, self.in_features = self.weight.shape
        self._parameters["weight"] = nn.Parameter(self.weight.detach(), requires_grad=self.weight.requires_grad)
        self._parameters["bias"] = None

    @property
    def weight(self) -> torch.Tensor:
        embedding, slot, adapter_name = self.__dict__["_source"]
        return getattr(embedding, slot)[adapter_name].t()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.weight
        destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()


def leader(model: nn.Module, config: LoraConfig, model_config: dict, name: str) -> str:
    """The module whose rank and alpha a module takes: the embedding's where their adapters are to be tied."""
    group = _group(model, config, model_config)
    return group[0] if name in group else name


def partners(model: nn.Module, config: LoraConfig, model_config: dict, names: list[str]) -> list[str]:
    """The modules to adapt beside `names`, since they share a weight with one of them.

    Warns where `ensure_weight_tying` has nothing to tie.
    """
    if not config.ensure_weight_tying:
        return []
    group = _group(model, config, model_config)
    if not group:
        named = config.modules_to_save or config.trainable_token_indices
        if not named:  # otherwise what wraps these modules says so
            warnings.warn(
                "ensure_weight_tying=True has no effect: the base model has no tied embeddings.",
                PeftWarning,
                stacklevel=5,
            )
        return []
    if any(name in group for name in names):
        return [name for name in group if name not in names]
    if not config.modules_to_save and not config.trainable_token_indices:
        warnings.warn(
            f"ensure_weight_tying=True has no effect: none of the tied layers ({', '.join(group)}) is adapted.",
            PeftWarning,
            stacklevel=5,
        )
    return []


def trained_whole(model: nn.Module, config: LoraConfig, model_config: dict) -> list[str]:
    """The embedding, where `modules_to_save` names a layer that is to stay tied to it: it is trained whole with that one."""
    saved = config.modules_to_save or ()
    group = tied_group(model, model_config) if config.ensure_weight_tying and saved else []
    return group[:1] if any(_is_named(name, saved) for name in group[1:]) else []


def tie_adapters(model: nn.Module, config: LoraConfig, model_config: dict, adapter_name: str) -> None:
    """Let the output layer's adapter use the embedding's factors.

    Raises:
        ValueError: The layers are of kinds whose factors cannot be shared.
    """
    group = _group(model, config, model_config)
    layers = [model.get_submodule(name) for name in group]
    if not all(isinstance(layer, LoraLayer) and layer.has_adapter(adapter_name) for layer in layers) or not layers:
        return
    embedding, *followers = layers
    for layer, name in zip(followers, group[1:], strict=True):
        if not isinstance(embedding, Embedding) or adapter_name not in layer.lora_A:
            raise ValueError(
                f"ensure_weight_tying=True: adapters of {group[0]} ({type(embedding).__name__}) and {name} "
                f"({type(layer).__name__}) cannot be shared; it takes an embedding and a linear layer. Leave it off."
            )
        if layer is followers[0]:  # the start is the output layer's: it may have changed the weight that they share
            embedding.lora_embedding_A[adapter_name].data = layer.lora_B[adapter_name].weight.data.t().contiguous()
            embedding.lora_embedding_B[adapter_name].data = layer.lora_A[adapter_name].weight.data.t().contiguous()
        layer.lora_A[adapter_name] = TiedFactor(embedding, "lora_embedding_B", adapter_name)
        layer.lora_B[adapter_name] = TiedFactor(embedding, "lora_embedding_A", adapter_name)
    for layer in layers:
        variant = layer.lora_variant.get(adapter_name)
        if variant is not None:  # a magnitude is the norm of the weight with these factors in it
            variant.init(layer, adapter_name=adapter_name, config=config)
        layer._replan()


def _group(model: nn.Module, config: LoraConfig, model_config: dict) -> list[str]:
    """The embedding and the layers that share its weight, where their adapters are to be tied; else none."""
    if not config.ensure_weight_tying:
        return []
    group = tied_group(model, model_config)
    return [] if any(_is_named(name, config.modules_to_save or ()) for name in group) else group


def _is_named(name: str, suffixes: Iterable[str]) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)
