# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What both sides do with a row of `options.OPTIONS`: start it, train a step, merge, save, load."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from options import OPTIONS, base_and_input
from recipes import _first_tensor, backward, evaluated, fill, recipe, saved_files, trainable
from torch import nn

import peft
from peft.tuners.lora import LoraLayer


def _output(y: Any) -> torch.Tensor:
    return y if isinstance(y, torch.Tensor) else _first_tensor(y)


def _base_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """What base layers hold, under the names that they have without wrappers; packed bytes as they are."""
    state = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" not in name and isinstance(tensor, torch.Tensor)
    }
    return {name: tensor for name, tensor in state.items() if not name.split(".")[-1].startswith("_")}


def _made(name: str) -> tuple[Any, torch.Tensor, peft.LoraConfig]:
    option = OPTIONS[name]
    base, x = base_and_input(option.base)
    config = copy.deepcopy(option.config())
    torch.manual_seed(5)
    if option.before is not None:
        option.before(base, config, x)
    torch.manual_seed(7)
    model = peft.get_peft_model(base, config)
    torch.manual_seed(9)
    if option.after is not None:
        option.after(model, x)
    return model, x, config


@recipe
def option_started(name: str) -> dict[str, Any]:
    """What is adapted, what may be trained, what it starts as, and the base weights beneath."""
    model, x, _ = _made(name)
    layers = {key: module for key, module in model.named_modules() if isinstance(module, LoraLayer)}
    with evaluated(model):
        y = _output(model(x))
    return {
        "layers": {key: dict(module.scaling) for key, module in layers.items()},
        "ranks": {key: dict(module.r) for key, module in layers.items()},
        "frozen": sorted(k for k, p in model.named_parameters() if not p.requires_grad and "lora_" in k),
        "parameters": trainable(model),
        "products": _products(layers),
        "base": _base_parameters(model),
        "counts": list(model.get_nb_trainable_parameters()),
        "y": y,
    }


def _products(layers: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """s·BA of each layer, which no choice of signs changes."""
    found = {}
    for key, layer in layers.items():
        with contextlib.suppress(AttributeError, RuntimeError), torch.no_grad():
            found[key] = layer.get_delta_weight("default")
    return found


@recipe
def option_trained(name: str, folder: str) -> dict[str, Any]:
    """Outputs and gradients of a filled adapter in all states, and what it saves into a folder."""
    option = OPTIONS[name]
    model, x, config = _made(name)
    fill(model)
    model.train()
    torch.manual_seed(11)
    y = _output(model(x))
    out: dict[str, Any] = {"y": y, "grads": backward(model, y)}
    if config.kasa_config is not None:
        out["loss"] = model.base_model._get_kasa_loss()
    with evaluated(model):
        out["eval"] = _output(model(x))
        with model.disable_adapter():
            out["disabled"] = _output(model(x))
    model.save_pretrained(folder)
    if option.merges:
        with evaluated(model), contextlib.suppress(NotImplementedError):
            model.merge_adapter()
            out["merged"] = _output(model(x))
            model.unmerge_adapter()
            out["unmerged"] = _output(model(x))
            out["unloaded"] = _output(model.merge_and_unload()(x))
    return {**out, "saved": saved_files(folder)}


@recipe
def option_loaded(name: str, folder: str, low_cpu_mem_usage: bool = False) -> dict[str, Any]:
    """Outputs of a fresh base with the adapter that a folder holds."""
    option = OPTIONS[name]
    base, x = base_and_input(option.base)
    torch.manual_seed(5)
    if option.before is not None:
        option.before(base, copy.deepcopy(option.config()), x)
    torch.manual_seed(7)
    model = peft.PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    with evaluated(model):
        return {"y": _output(model(x)), "state": peft.get_peft_model_state_dict(model)}
