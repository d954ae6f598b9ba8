# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Other adapters as plain LoRA: the best low-rank approximation of what they add to each weight."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from peft.engine.layer import BaseTunerLayer
from peft.utils.atomic import write_atomically
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME

from .config import LoraConfig

if TYPE_CHECKING:
    from collections.abc import Callable

_PREFIX = "base_model.model."


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """A LoRA adapter that adds nearly the same to each weight as another adapter does; the model stays as it is.

    Args:
        model: Model with the adapter.
        rank: A whole number for the rank of every layer; a float in (0, 1] for the smallest rank of each layer that
            keeps this share of the squared singular values.
        adapter_name: The adapter to convert.
        progressbar: Show progress by layer.
        compile_kwargs: If given, the decomposition is compiled with these arguments of `torch.compile`.

    Returns:
        The config, and the tensors by the names that a LoRA adapter's file has: A `[rank, in]` with rows of norm 1 and
        B `[out, rank]`, float32. Load them with `set_peft_model_state_dict`, or write them with `save_as_lora`.

    Raises:
        ValueError: `rank` is out of range, the adapter does not exist, or it trains biases.
        TypeError: The adapter changes layers in a way that is not a sum with a matrix.
    """
    _check_rank(rank)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    layers = list(_adapted(model, adapter_name))
    if not layers:
        raise TypeError(f"The model has no layer with an adapter {adapter_name!r} that could be written as LoRA.")
    if getattr(config, "bias", "none") not in ("none", None):
        raise ValueError(
            f"Adapter {adapter_name!r} trains biases (bias={config.bias!r}), which LoRA tensors cannot hold."
        )
    refusing = [name for name, layer in layers if not layer.supports_lora_conversion(adapter_name)]
    if refusing:
        raise TypeError(
            f"{refusing[0]} ({type(dict(layers)[refusing[0]]).__name__}) changes its weight in a way that cannot be "
            "written as LoRA; merge the adapter instead."
        )
    decompose = _decompose if compile_kwargs is None else torch.compile(_decompose, **compile_kwargs)
    state, ranks = {}, {}
    for name, layer in tqdm(layers, disable=not progressbar, desc="Converting"):
        a, b = _factors(name, layer, adapter_name, rank, decompose)
        plain = name.removeprefix(_PREFIX)
        ranks[plain] = len(a)
        state[f"{_PREFIX}{plain}.lora_A.weight"] = a
        state[f"{_PREFIX}{plain}.lora_B.weight"] = b
    return _config(config, ranks, rank), state


def save_as_lora(
    path: str | os.PathLike,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Write what `convert_to_lora` gives as an adapter that `PeftModel.from_pretrained` loads.

    Args:
        path: Folder, created if need be.
        model, rank, adapter_name, progressbar, compile_kwargs: As there.
    """
    config, state = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    os.makedirs(path, exist_ok=True)
    file = os.path.join(path, SAFETENSORS_WEIGHTS_NAME)
    write_atomically(file, lambda temporary: save_file(state, temporary, metadata={"format": "pt"}))
    config.save_pretrained(path)


def _check_rank(rank: int | float) -> None:
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(f"rank={rank} is a share of the squared singular values to keep: it must lie in (0, 1].")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"rank={rank} must be at least 1, or a float in (0, 1].")


def _adapted(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, BaseTunerLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and adapter_name in module._get_available_adapters():
            yield name, module


@torch.no_grad()
def _factors(
    name: str, layer: BaseTunerLayer, adapter_name: str, rank: int | float, decompose: Callable[..., Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    delta = layer.get_delta_weight(adapter_name).float()
    if getattr(layer, "fan_in_fan_out", False):
        delta = delta.t()
    u, s, vt = decompose(delta)
    if isinstance(rank, float):
        energy = s.square().cumsum(0)
        kept = int((energy < rank * energy[-1]).sum()) + 1
        kept = min(kept, int((s > 0).sum()) or 1)
    else:
        kept = rank
    if kept > len(s):
        raise ValueError(f"rank={rank} is more than the {len(s)} singular values of {name}: choose a lower one.")
    return vt[:kept].contiguous(), (u[:, :kept] * s[:kept]).contiguous()


def _decompose(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.linalg.svd(delta, full_matrices=False)


def _config(source: Any, ranks: dict[str, int], rank: int | float) -> LoraConfig:
    """A config with a scaling of 1 and the ranks of each layer."""
    by_layer = isinstance(rank, float)
    targets = set(ranks) if by_layer else getattr(source, "target_modules", None) or set(ranks)
    kept = ("task_type", "base_model_name_or_path", "revision", "inference_mode", "exclude_modules")
    options = {key: getattr(source, key) for key in kept if getattr(source, key, None)}
    return LoraConfig(
        r=1 if by_layer else rank,
        lora_alpha=1 if by_layer else rank,
        target_modules=targets,
        rank_pattern=dict(ranks) if by_layer else {},
        alpha_pattern=dict(ranks) if by_layer else {},
        fan_in_fan_out=getattr(source, "fan_in_fan_out", False),
        **{
            key: getattr(source, key)
            for key in ("layers_to_transform", "layers_pattern")
            if not by_layer and getattr(source, key, None)
        },
        **options,
    )
