# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Another adapter's values in the place of a loaded one's: no new modules, so that a compiled model stays compiled."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from peft.config import PeftConfig
from peft.engine.state_dict import RankDim
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from peft.utils.peft_types import PeftType
from peft.utils.save_and_load import load_peft_weights

if TYPE_CHECKING:
    from peft.tuners.lora import LoraConfig, LoraLayer

# What must agree between two configs, as it is part of the layers and not of the values in them.
CONFIG_KEYS_TO_CHECK = {PeftType.LORA: ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"]}
_COMPILED = "_orig_mod"


# ---- ranks ---------------------------------------------------------------------------------------------------------
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make adapters exchangeable without recompilation: scalings become tensors, and A and B get room for a rank.

    Call it once the first adapter is loaded and before the model is compiled. The room is filled with zeros, which
    change nothing and stay zero in training. A saved adapter is as small as without it. The scaling of DoRA adapters
    stays a number: a swap to one with the same scaling compiles nothing anew.

    Args:
        model: Model with LoRA adapters.
        target_rank: The largest rank to come; None to keep the ranks.
        config: Accepted for the sake of callers of other releases: nothing in it has to change.
        check_compiled: What to do if the model is compiled already: "error", "warn" or "ignore".

    Raises:
        ValueError: The model has no LoRA layers, is compiled, or has an adapter whose rank exceeds `target_rank`; or
            `check_compiled` is unknown. Nothing was changed.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled={check_compiled!r} is unknown: use 'error', 'warn' or 'ignore'.")
    if _is_compiled(model) and check_compiled != "ignore":
        message = (
            "The model is compiled already, so that preparing it for hotswaps compiles it anew: call "
            "prepare_model_for_compiled_hotswap before torch.compile"
        )
        if check_compiled == "error":
            raise ValueError(f"{message}, or pass check_compiled='ignore'.")
        warnings.warn(f"{message}.", stacklevel=2)
    layers = [layer for _, layer in _lora_layers(model)]
    if not layers:
        raise ValueError("The model has no LoRA layers: load the first adapter before preparing it for hotswaps.")
    for layer in layers:
        for name in layer.scaling:
            rank = _physical_rank(layer, name)
            if target_rank is not None and rank > target_rank:
                raise ValueError(
                    f"target_rank={target_rank} is less than the rank {rank} of adapter {name!r}: raise it."
                )
            if target_rank is not None and target_rank % _groups(layer, name):
                raise ValueError(
                    f"target_rank={target_rank} must be a multiple of the {_groups(layer, name)} groups of an adapted "
                    "convolution: choose another."
                )
    for layer in layers:
        for name, scaling in layer.scaling.items():
            # DoRA's norm is looked up by the scaling's value, which a tensor would have to be read for
            if not isinstance(scaling, torch.Tensor) and name not in layer.lora_magnitude_vector:
                device = next(iter(_slots(layer, name).values())).device
                layer.scaling[name] = torch.tensor(float(scaling), device=device)
            if target_rank is not None:
                _make_room(layer, name, target_rank)
        layer._replan()


def _is_compiled(model: nn.Module) -> bool:
    return any(
        hasattr(module, _COMPILED) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """LoRA layers with their names, without what `torch.compile` adds to these."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module, BaseTunerLayer):
            yield ".".join(part for part in name.split(".") if part != _COMPILED), module


def _slots(layer: LoraLayer, adapter_name: str, prefix: str = "lora_") -> dict[str, nn.Parameter]:
    """An adapter's parameters in a layer by their saved name, such as `lora_A.weight`."""
    slots = {}
    for slot in layer.adapter_layer_names:
        container = getattr(layer, slot, None)
        if not slot.startswith(prefix) or container is None or adapter_name not in container:
            continue
        entry = container[adapter_name]
        if isinstance(entry, nn.Parameter):
            slots[slot] = entry
        else:
            slots.update({f"{slot}.{name}": parameter for name, parameter in entry.named_parameters()})
    return slots


def _groups(layer: LoraLayer, adapter_name: str) -> int:
    """Groups that an adapter's ranks fall into: those of a convolution, else one."""
    return getattr(layer.lora_B[adapter_name], "groups", 1) if adapter_name in layer.lora_B else 1


def _rank_dims(layer: LoraLayer, adapter_name: str) -> dict[str, RankDim]:
    """The parameters that have a dimension for ranks, by slot."""
    groups = _groups(layer, adapter_name)
    dims = {
        "lora_A.weight": RankDim(0, parts=groups),
        "lora_B.weight": RankDim(1, share=groups),
        "lora_embedding_A": RankDim(0),
        "lora_embedding_B": RankDim(1),
    }
    present = _slots(layer, adapter_name)
    return {slot: ranks for slot, ranks in dims.items() if slot in present}


def _physical_rank(layer: LoraLayer, adapter_name: str) -> int:
    slot, ranks = next(iter(_rank_dims(layer, adapter_name).items()))
    return _slots(layer, adapter_name)[slot].shape[ranks.dim] * ranks.share


def _make_room(layer: LoraLayer, adapter_name: str, rank: int) -> None:
    """Enlarge A and B to a rank, in the same Parameter objects, with zeros in the new part."""
    parameters = _slots(layer, adapter_name)
    for slot, ranks in _rank_dims(layer, adapter_name).items():
        parameter = parameters[slot]
        if parameter.shape[ranks.dim] < ranks.size(rank):
            parameter.data = ranks.fit(parameter.data, rank)
            parameter.grad = None
    a, b = (layer._modules[slot]._modules.get(adapter_name) for slot in ("lora_A", "lora_B"))
    for module, sizes in ((a, ("out_features", "out_channels")), (b, ("in_features", "in_channels"))):
        for size in sizes:
            if hasattr(module, size):
                setattr(module, size, rank)
    _note_room(layer, adapter_name)


def _note_room(layer: LoraLayer, adapter_name: str) -> None:
    """Note where an adapter's tensors may be larger than its rank, so that saving and loading leave the rest out."""
    rooms = {
        slot.replace(".", f".{adapter_name}.", 1) if "." in slot else f"{slot}.{adapter_name}": ranks
        for slot, ranks in _rank_dims(layer, adapter_name).items()
    }
    layer.spare_room = {**getattr(layer, "spare_room", {}), adapter_name: rooms}


# ---- swap ----------------------------------------------------------------------------------------------------------
@dataclass
class _Swap:
    """What one layer gets.

    Args:
        layer: The layer.
        values: New values by slot; those of a layer that the new adapter leaves alone are zero.
        rank, alpha: The new adapter's here.
        scaling: The new scaling.
        absent: Whether the new adapter has nothing for this layer.
    """

    layer: LoraLayer
    values: dict[str, torch.Tensor]
    rank: int
    alpha: float
    scaling: float
    absent: bool


def hotswap_adapter_from_state_dict(
    model: nn.Module, state_dict: dict[str, torch.Tensor], adapter_name: str, config: LoraConfig, parameter_prefix:
    str = "lora_",
) -> None:  # fmt: skip
    """Give a loaded LoRA or DoRA adapter the values of another one, in place.

    Ranks may differ. A smaller one is filled up with zeros. A larger one needs room: it is made where the model is not
    compiled, and otherwise has to be there (`prepare_model_for_compiled_hotswap`). Layers that the new adapter has no
    values for compute what the base layer does.

    Args:
        model: Model with the adapter, compiled or not.
        state_dict: The new adapter by saved names or by names in memory.
        adapter_name: The loaded adapter.
        config: The new adapter's config.
        parameter_prefix: What the names of the method's parameters start with.

    Raises:
        ValueError: There is no such adapter, it is merged, a shape does not fit, or a compiled model lacks room.
        RuntimeError: `state_dict` has tensors that belong nowhere, or only a part of a layer's.
        In every case nothing was changed.
    """
    layers = {name: layer for name, layer in _lora_layers(model) if adapter_name in layer.scaling}
    if not layers:
        raise ValueError(f"The model has no LoRA adapter {adapter_name!r} to put another one in the place of.")
    merged = [name for name, layer in layers.items() if adapter_name in layer.merged_adapters]
    if merged:
        raise ValueError(f"Adapter {adapter_name!r} is merged into {merged[0]}: unmerge it before a hotswap.")
    rest = {_plain_key(key, adapter_name, parameter_prefix): value for key, value in state_dict.items()}
    swaps = [
        _plan_swap(name, layer, rest, adapter_name, config, parameter_prefix, _is_compiled(model))
        for name, layer in layers.items()
    ]
    if rest:
        raise RuntimeError(
            f"Hotswap of {adapter_name!r}: the loaded adapter has no place for {', '.join(sorted(rest))}. Load the one "
            "that adapts the most modules first, or load this one under a name of its own."
        )
    with torch.no_grad():
        for swap in swaps:
            _apply(swap, adapter_name)
    _update_config(model, adapter_name, config)


def _plain_key(key: str, adapter_name: str, prefix: str) -> str:
    """A key as `_slots` names parameters, whether or not it has the adapter's name or torch.compile's in it."""
    parts = [part for part in key.split(".") if part != _COMPILED]
    slot = max((i for i, part in enumerate(parts) if part.startswith(prefix)), default=None)
    if slot is None:
        return ".".join(parts)
    if parts[slot + 1 : slot + 2] == [adapter_name]:
        del parts[slot + 1]
    if parts[slot:] == ["lora_magnitude_vector"]:
        parts.append("weight")
    return ".".join(parts)


def _plan_swap(
    name: str,
    layer: LoraLayer,
    rest: dict[str, torch.Tensor],
    adapter_name: str,
    config: LoraConfig,
    prefix: str,
    compiled: bool,
) -> _Swap:
    """What a layer gets, checked; its tensors are taken out of `rest`."""
    slots = _slots(layer, adapter_name, prefix)
    given = {slot: rest.pop(f"{name}.{slot}") for slot in slots if f"{name}.{slot}" in rest}
    missing = [slot for slot in slots if slot not in given]
    if given and missing:
        raise RuntimeError(f"Hotswap of {adapter_name!r}: the new adapter lacks {', '.join(missing)} of {name}.")
    plain = name.removeprefix("base_model.model.")
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, plain), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, plain), config.lora_alpha)
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    groups = _groups(layer, adapter_name)
    if rank % groups:
        raise ValueError(f"Hotswap: rank {rank} of {name} must be a multiple of the convolution's groups={groups}.")
    dims = _rank_dims(layer, adapter_name)
    values = given or {slot: _nothing(parameter, dims.get(slot), rank) for slot, parameter in slots.items()}
    for slot, parameter in slots.items():
        _check_fits(f"{name}.{slot}", values[slot], parameter, dims.get(slot), rank, compiled)
    return _Swap(layer, values, rank, alpha, scaling, not given)


def _shape(parameter: torch.Tensor, ranks: RankDim | None, rank: int) -> list[int]:
    """The shape that a parameter has in an adapter of a rank."""
    shape = list(parameter.shape)
    if ranks is not None:
        shape[ranks.dim] = ranks.size(rank)
    return shape


def _nothing(parameter: torch.Tensor, ranks: RankDim | None, rank: int) -> torch.Tensor:
    return parameter.new_zeros(_shape(parameter, ranks, rank))


def _check_fits(
    key: str, value: torch.Tensor, parameter: torch.Tensor, ranks: RankDim | None, rank: int, compiled: bool
) -> None:
    expected = _shape(parameter, ranks, rank)
    if list(value.shape) != expected:
        raise ValueError(
            f"Hotswap: {key} has shape {list(value.shape)}, expected {expected} from the loaded adapter and the new "
            "config: the new adapter is for another base model, other modules or another config."
        )
    if compiled and ranks is not None and ranks.size(rank) > parameter.shape[ranks.dim]:
        room = parameter.shape[ranks.dim] * ranks.share
        raise ValueError(
            f"Hotswap: {key} has rank {rank}, but the compiled model has room for {room}: call "
            f"prepare_model_for_compiled_hotswap(model, target_rank={rank}) before compiling it."
        )


def _apply(swap: _Swap, adapter_name: str) -> None:
    layer = swap.layer
    slots = _slots(layer, adapter_name)
    if swap.rank > _physical_rank(layer, adapter_name):
        _make_room(layer, adapter_name, swap.rank)
        layer._replan()
    _note_room(layer, adapter_name)
    room, dims = _physical_rank(layer, adapter_name), _rank_dims(layer, adapter_name)
    for slot, value in swap.values.items():
        slots[slot].copy_(dims[slot].fit(value, room) if slot in dims else value)
    layer.r[adapter_name] = swap.rank
    layer.lora_alpha[adapter_name] = swap.alpha
    if isinstance(layer.scaling[adapter_name], torch.Tensor):
        layer.scaling[adapter_name].fill_(swap.scaling)
    else:
        layer.scaling[adapter_name] = swap.scaling
    if swap.absent and adapter_name in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[adapter_name].weight
        magnitude.copy_(layer.dora_norm(adapter_name).reshape(magnitude.shape))


def _update_config(model: nn.Module, adapter_name: str, config: LoraConfig) -> None:
    """Make the loaded adapter's config describe the new one, as it is saved with it."""
    own = getattr(getattr(model, _COMPILED, model), "peft_config", {}).get(adapter_name)
    if own is not None:
        for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
            setattr(own, field, getattr(config, field))


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Refuse two adapters of which one cannot take the other's place.

    Args:
        config0: Config of the one that is loaded.
        config1: Config of the one to come.

    Raises:
        ValueError: They are of different methods, of one without hotswaps, or differ in what the layers are built by.
    """
    if config0.peft_type != config1.peft_type:
        raise ValueError(
            f"A {getattr(config1.peft_type, 'value', config1.peft_type)} adapter cannot take the place of a "
            f"{getattr(config0.peft_type, 'value', config0.peft_type)} adapter: load it under a name of its own."
        )
    if config0.peft_type not in CONFIG_KEYS_TO_CHECK:
        raise ValueError(
            f"Hotswap works for {', '.join(method.value for method in CONFIG_KEYS_TO_CHECK)}, not for "
            f"{getattr(config0.peft_type, 'value', config0.peft_type)}: load the adapter under a name of its own."
        )
    for key in CONFIG_KEYS_TO_CHECK[config0.peft_type]:
        if getattr(config0, key) != getattr(config1, key):
            raise ValueError(
                f"Hotswap needs the same {key}: the loaded adapter has {getattr(config0, key)!r}, the new one "
                f"{getattr(config1, key)!r}. Load it under a name of its own."
            )


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Give a loaded adapter the values of a saved one, in place.

    Args:
        model: Model with the adapter, compiled or not.
        model_name_or_path: Folder or repository of the saved adapter.
        adapter_name: The loaded adapter.
        torch_device: Where to read the file to; None for the accelerator, if there is one.
        kwargs: Arguments for reading the config and the file, such as `subfolder` or `revision`.

    Raises:
        ValueError: The configs or the shapes do not agree; nothing was changed.
        RuntimeError: There is no such adapter, or the file has tensors that belong nowhere, or lacks some; likewise.
    """
    loaded = getattr(getattr(model, _COMPILED, model), "peft_config", {})
    if adapter_name not in loaded:
        raise RuntimeError(f"The model has no adapter {adapter_name!r}; it has {sorted(loaded)}.")
    config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    check_hotswap_configs_compatible(loaded[adapter_name], config)
    weights = load_peft_weights(model_name_or_path, device=torch_device, **kwargs)
    hotswap_adapter_from_state_dict(model, weights, adapter_name, config)
