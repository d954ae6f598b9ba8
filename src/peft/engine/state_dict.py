# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""An adapter's tensors out of a model and into it, under the names that files use: written once for all tuners."""

from __future__ import annotations

import os
import warnings
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper, check_file_exists_on_hf_hub
from peft.utils.warning import PeftWarning
from peft.weights import filling, shape_of

from .biases import adapted_layers, name_alone, trained_biases
from .devices import move_slot_to_base_layer
from .layer import BaseTunerLayer

if TYPE_CHECKING:
    from peft.config import PeftConfig

    from .tuner import BaseTuner

IncompatibleKeys = namedtuple("_IncompatibleKeys", ["missing_keys", "unexpected_keys"])
_BASE = ".base_layer."
_BY_ADAPTER = ("modules_to_save", "trainable_tokens_delta", "trainable_tokens_original")  # what wrappers hold


# ---- out of a model ------------------------------------------------------------------------------------------------
def adapter_state_dict(
    model: nn.Module,
    tuner: type[BaseTuner],
    config: PeftConfig,
    adapter_name: str,
    state_dict: dict[str, torch.Tensor],
    save_embedding_layers: str | bool,
) -> dict[str, torch.Tensor]:
    """The tensors to save for one adapter, under the names that a file gives them.

    Args:
        model: Model that carries the adapter.
        tuner: Class of the adapter's method.
        config: The adapter's config.
        adapter_name: Its name.
        state_dict: The model's state, the model's own or one that was gathered from its shards.
        save_embedding_layers: Whether base embeddings are saved too: "auto" where they are adapted or were resized.
    """
    others = [name for name in getattr(model, "peft_config", {}) if name != adapter_name]
    found = tuner._get_adapter_state_dict(model, config, adapter_name, state_dict, others)
    for key, ranks, rank in _spare_room(model, adapter_name):
        if key in found and found[key].shape[ranks.dim] > ranks.size(rank):
            found[key] = ranks.fit(found[key], rank)
    found = {tuner._remove_adapter_name_from_key(key, adapter_name): value for key, value in found.items()}
    found.update(_biases(model, config, adapter_name, state_dict, tuner.prefix))
    for name, wrapper in _wrappers(model):
        prefix = f"{name}."
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if adapter_name in wrapper._get_available_adapters():
            found.update({prefix + key: value for key, value in wrapper.adapter_state_dict(adapter_name, own).items()})
    for name in _embeddings_to_save(model, config, save_embedding_layers):
        for key, value in state_dict.items():
            if key.startswith(f"{name}.") and f".{tuner.prefix}" not in key:
                saved = _saved_name(key, adapter_name)
                if saved is not None:
                    found[saved] = value
    return found


def _saved_name(key: str, adapter_name: str) -> str | None:
    """A key of a wrapped embedding without the adapter's name; None where it is of another adapter."""
    parts = key.split(".")
    for i, part in enumerate(parts[:-1], start=1):
        if part in _BY_ADAPTER:
            return ".".join(parts[:i] + parts[i + 1 :]) if parts[i] == adapter_name else None
    return key


def _wrappers(model: nn.Module) -> Iterator[tuple[str, AuxiliaryTrainingWrapper]]:
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield name, module


@dataclass(frozen=True)
class RankDim:
    """Where a parameter counts ranks.

    Args:
        dim: The dimension.
        parts: In how many equal parts it counts them, each with ranks of its own: a grouped convolution's A.
        share: How many ranks stand behind one entry: the groups of such a convolution, for its B.
    """

    dim: int
    parts: int = 1
    share: int = 1

    def size(self, rank: int) -> int:
        """Entries of the dimension for a rank."""
        return rank // self.share

    def fit(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """A tensor with `size(rank)` entries there: cut, or filled up with zeros, alike in each part."""
        split = tensor.unflatten(self.dim, (self.parts, -1))
        inner = self.dim + 1
        missing = self.size(rank) // self.parts - split.shape[inner]
        if missing > 0:
            split = F.pad(split, [0, 0] * (split.dim() - 1 - inner) + [0, missing])
        else:
            split = split.narrow(inner, 0, split.shape[inner] + missing)
        return split.flatten(self.dim, inner)


def _spare_room(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, RankDim, int]]:
    """Tensors that may have room for larger ranks (`peft.utils.hotswap`): name in memory, dimension, the rank."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            for key, ranks in getattr(module, "spare_room", {}).get(adapter_name, {}).items():
                yield f"{name}.{key}", ranks, module.r[adapter_name]


def _biases(
    model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor], prefix: str
) -> dict[str, torch.Tensor]:
    """The base biases that the adapter trained, named as in a model that carries this adapter alone."""
    trained = trained_biases(model, state_dict, getattr(config, "bias", "none"), adapter_name, prefix)
    layers = adapted_layers(model) if trained else {}
    return {name_alone(key, layers, adapter_name): state_dict[key] for key in trained}


def _base_prefix(model: nn.Module) -> str:
    """What the names of the base model's modules start with inside `model`."""
    return "base_model.model." if hasattr(model, "base_model") and hasattr(model, "active_adapters") else ""


def embedding_layer_name(model: nn.Module, layer: nn.Module, is_adapted: bool) -> str | None:
    """The name of an embedding, or of the layer that an adapter wrapped around, in `model`; None where it is neither."""
    for name, module in model.named_modules():
        if (not is_adapted and module is layer) or module is getattr(layer, "base_layer", None):
            return name
    return None


def _embeddings_to_save(model: nn.Module, config: PeftConfig, wanted: str | bool) -> Iterator[str]:
    targets = getattr(config, "target_modules", None)
    if hasattr(config, "token_indices"):  # trains single rows, which are saved without the embedding
        adapted = False
    elif isinstance(targets, str):
        adapted = any(name in targets for name in EMBEDDING_LAYER_NAMES)
    else:
        adapted = any(target.split(".")[-1] in EMBEDDING_LAYER_NAMES for target in targets or ())
    if wanted == "auto":
        whole = adapted and getattr(config, "adapts_whole_embeddings", True)
        if whole:
            warnings.warn(
                "save_embedding_layers='auto': target_modules covers an embedding, so the base embedding is saved with "
                "the adapter; pass save_embedding_layers=False to leave it out.",
                PeftWarning,
                stacklevel=4,
            )
        wanted = whole or _was_resized(model, config)
    if not wanted or not hasattr(model, "get_input_embeddings"):
        return
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None and (not adapted or hasattr(layer, "base_layer")):
            name = embedding_layer_name(model, layer, adapted)
            if name:
                yield name


def _was_resized(model: nn.Module, config: PeftConfig) -> bool:
    """Whether the vocabulary differs from that of the base model as it is published."""
    model_id = getattr(config, "base_model_name_or_path", None)
    own = getattr(model, "config", None)
    size = getattr(own, "vocab_size", None)
    if not model_id or size is None:
        return False
    if not os.path.exists(os.path.join(model_id, "config.json")) and not check_file_exists_on_hf_hub(
        model_id, "config.json"
    ):
        return False
    published = type(own).from_pretrained(model_id).vocab_size
    if published == size:
        return False
    warnings.warn(
        f"The vocabulary was resized from {published} to {size}: the embeddings are saved with the adapter; pass "
        "save_embedding_layers=False to leave them out.",
        PeftWarning,
        stacklevel=5,
    )
    return True


# ---- into a model --------------------------------------------------------------------------------------------------
def load_adapter_state_dict(
    model: nn.Module,
    tuner: type[BaseTuner],
    config: PeftConfig,
    adapter_name: str,
    saved: dict[str, torch.Tensor],
    ignore_mismatched_sizes: bool,
    low_cpu_mem_usage: bool,
) -> IncompatibleKeys:
    """Put a saved adapter into a model; everything is checked before the first tensor is copied.

    Args:
        model: Model that carries the adapter.
        tuner: Class of the adapter's method.
        config: The adapter's config.
        adapter_name: Its name in the model.
        saved: Tensors under the names that a file gives them.
        ignore_mismatched_sizes: Leave tensors of another shape out, with a warning.
        low_cpu_mem_usage: Put the tensors themselves into the model in place of copying, as its own are on meta.

    Returns:
        The adapter's keys in the model that `saved` lacks, and keys of `saved` that the model has no place for.

    Raises:
        TypeError: A value is no tensor.
        RuntimeError: A tensor has another shape or kind of dtype than the model's.
    """
    for key, value in saved.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{key} of the saved adapter is a {type(value).__name__}, expected a tensor.")
    current = model.state_dict(keep_vars=True)  # what DeepSpeed says of a parameter it says on the parameter
    live = _live_names(model, tuner, config, adapter_name, saved, current)
    for key, ranks, rank in _spare_room(model, adapter_name):
        fits = key in live and live[key].dim() == current[key].dim()
        if fits and live[key].shape[ranks.dim] == ranks.size(rank) < current[key].shape[ranks.dim]:
            live[key] = ranks.fit(live[key], current[key].shape[ranks.dim] * ranks.share)
    mismatched = mismatched_shapes(live, current)
    if mismatched and not ignore_mismatched_sizes:
        raise RuntimeError(
            f"Shapes of the saved adapter differ from the model's:\n{compared_shapes(mismatched, live, current)}\n"
            "Load it with the config and the base model that it was made for, or pass ignore_mismatched_sizes=True to "
            "leave these tensors out."
        )
    check_dtypes(live, current)
    for key in mismatched:
        warnings.warn(
            f"{key} has shape {list(live[key].shape)} in the file and {list(shape_of(current[key]))} here: left out.",
            PeftWarning,
            stacklevel=3,
        )
        del live[key]
    places = [current[key] for key in live if key in current]
    with filling(places):
        assign = low_cpu_mem_usage and not any(hasattr(place, "ds_id") for place in places)
        result = model.load_state_dict(live, strict=False, assign=assign)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            if low_cpu_mem_usage and adapter_name in module._get_available_adapters():
                move_slot_to_base_layer(module, adapter_name, keep_dtype=True)
            module._replan()
    own = set(_own_keys(model, tuner, config, adapter_name, current))
    in_file = {id(value): key for key, value in saved.items()}
    unexpected = [in_file.get(id(live[key]), key) for key in result.unexpected_keys]
    return IncompatibleKeys([key for key in result.missing_keys if key in own], unexpected)


def mismatched_shapes(live: dict[str, torch.Tensor], current: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that have another shape in `current`."""
    return [key for key, value in live.items() if key in current and shape_of(current[key]) != value.shape]


def compared_shapes(keys: list[str], live: dict[str, torch.Tensor], current: dict[str, torch.Tensor]) -> str:
    """One line a tensor with its saved shape and the one here, for an error message."""
    return "\n".join(f"  {key}: saved {list(live[key].shape)}, here {list(shape_of(current[key]))}" for key in keys)


def check_dtypes(live: dict[str, torch.Tensor], current: dict[str, torch.Tensor]) -> None:
    """Raise a RuntimeError where integers would be copied into a floating parameter, or the other way round."""
    for key, value in live.items():
        if key in current and value.is_floating_point() != current[key].is_floating_point():
            raise RuntimeError(
                f"{key} is {value.dtype} in the file and {current[key].dtype} here: the file is not this adapter's, or "
                "was converted; save it again in a floating dtype."
            )


def _own_keys(
    model: nn.Module, tuner: type[BaseTuner], config: PeftConfig, adapter_name: str, current: dict[str, Any]
) -> Iterator[str]:
    """Names in memory of everything that belongs to the adapter."""
    yield from tuner._get_adapter_state_dict(model, config, adapter_name, current, [])
    for name, wrapper in _wrappers(model):
        if adapter_name in wrapper._get_available_adapters():
            yield from (f"{name}.{key}" for key in wrapper.adapter_state_dict_load_map(adapter_name).values())


def _live_names(
    model: nn.Module,
    tuner: type[BaseTuner],
    config: PeftConfig,
    adapter_name: str,
    saved: dict[str, torch.Tensor],
    current: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Saved tensors under the names that they have in memory."""
    renamed = dict(saved)
    for name, wrapper in _wrappers(model):
        if adapter_name not in wrapper._get_available_adapters():
            continue
        for in_file, in_memory in wrapper.adapter_state_dict_load_map(adapter_name).items():
            # a copy of an embedding may be there twice, see `adapter_state_dict`
            keys = dict.fromkeys(f"{name}.{key}" for key in (in_file, _saved_name(in_memory, adapter_name)))
            for value in [renamed.pop(key) for key in keys if key in renamed][:1]:
                renamed[f"{name}.{in_memory}"] = value
    marker = f".{tuner.prefix}"
    # what comes from memory, or from a file in an old layout, has the adapter's name in it already
    live = {key: value for key, value in renamed.items() if marker in key and key in current}
    adapters = {key: value for key, value in renamed.items() if marker in key and key not in current}
    others = {key: value for key, value in renamed.items() if marker not in key}
    live.update(tuner._remap_adapter_state_dict_for_load(model, config, adapter_name, adapters))
    places = {_plain(key): key for key in current if marker not in key}
    live.update({places.get(_plain(key), key): value for key, value in others.items()})
    return live


def _plain(key: str) -> str:
    """A base parameter's name without the wrappers that adapters put around its module."""
    return key.replace(_BASE, ".")


# ---- the base model alone ------------------------------------------------------------------------------------------
_WRAPPERS = ("base_layer", "original_module", "token_adapter")


def base_names(model: nn.Module) -> dict[str, str]:
    """Names of the base model's own tensors: what they are called inside `model`, and what in the base model alone."""
    slots: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            slots.update(f"{name}.{slot}." for slot in module.adapter_layer_names)
            slots.update(f"{name}.{slot}." for slot in module.other_param_names)
    prefix = _base_prefix(model)
    names = {}
    for key in model.state_dict():
        if not any(key.startswith(slot) for slot in slots):
            plain = key.removeprefix(prefix)
            names[key] = ".".join(part for part in plain.split(".") if part not in _WRAPPERS)
    return names
