# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What is done on both sides, with public calls alone: the same code runs on ours and, in its process, on upstream's."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import torch
from torch import nn

import cases
import peft
from peft.tuners.lora import LoraLayer

RECIPES: dict[str, Callable[..., Any]] = {}


def recipe(function: Callable[..., Any]) -> Callable[..., Any]:
    RECIPES[function.__name__] = function
    return function


def run(name: str, /, **arguments: Any) -> Any:
    """Run a recipe with its warnings silenced; tensors of the result are detached and on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _plain(RECIPES[name](**arguments))


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


# ---- pieces ----------------------------------------------------------------------------------------------------------
def fill(model: nn.Module, salt: str = "") -> None:
    """Give the trainable parameters values that depend on their names alone; magnitudes keep their size roughly."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if not parameter.requires_grad:
                continue
            generator = torch.Generator().manual_seed(zlib.crc32((salt + name).encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_magnitude_vector" in name:
                parameter.mul_((1 + 0.4 * noise.clamp(-2, 2)).to(parameter))
            else:
                parameter.copy_((0.3 * noise).to(parameter))


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def backward(model: nn.Module, y: torch.Tensor, x: torch.Tensor | None = None) -> dict[str, Any]:
    """Gradients of a fixed random projection of an output."""
    generator = torch.Generator().manual_seed(3)
    y.backward(torch.randn(y.shape, generator=generator).to(y))
    grads = {name: parameter.grad for name, parameter in trainable(model).items() if parameter.grad is not None}
    if x is not None and x.requires_grad:
        grads["x"] = x.grad
    return grads


def saved_files(folder: str | Path) -> dict[str, Any]:
    """The tensors and the config of every adapter below a folder, and the names of its files."""
    from safetensors.torch import load_file

    folder = Path(folder)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {
        "files": files,
        "tensors": {name: load_file(folder / name) for name in files if name.endswith(".safetensors")},
        "configs": {name: json.loads((folder / name).read_text()) for name in files if name.endswith("config.json")},
    }


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    model.eval()
    with torch.no_grad():
        yield


# ---- one layer -------------------------------------------------------------------------------------------------------
def row_of(layer: str, form: str, method: str) -> cases.Row:
    return cases.Row(cases.LAYERS[layer], cases.FORMATS[form], cases.METHODS[method])


def adapted(row: cases.Row, filled: bool = True, names: tuple[str, ...] = ("default",), **options: Any) -> Any:
    peft_options = {k: options.pop(k) for k in ("autocast_adapter_dtype", "low_cpu_mem_usage") if k in options}
    base = row.layer.model(row.form)
    torch.manual_seed(7)
    model = peft.get_peft_model(base, peft.LoraConfig(**row.options(**options)), names[0], **peft_options)
    for name in names[1:]:
        more = {**options, "r": row.layer.rank * 2, "lora_alpha": 3}
        model.add_adapter(name, peft.LoraConfig(**row.options(**more)))
    if filled:
        for name in names:
            model.set_adapter(name)
            fill(model)
        model.set_adapter(names[0])
    return model


def base_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the base layer would save, quantisation state included."""
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    state = layer.get_base_layer().state_dict()
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


@recipe
def layer_init(layer: str, form: str, method: str, init_lora_weights: bool | str = True) -> dict[str, Any]:
    """What an adapter starts as, given a seed."""
    model = adapted(row_of(layer, form, method), filled=False, init_lora_weights=init_lora_weights)
    return {"parameters": trainable(model), "counts": list(model.get_nb_trainable_parameters())}


@recipe
def layer_state(layer: str, form: str, method: str, state: str, folder: str | None = None) -> dict[str, Any]:
    """Outputs and what else belongs to a state of the table."""
    row = row_of(layer, form, method)
    x = row.layer.input(row.form)
    return _STATES[state](row, x, folder)


def _train(row: cases.Row, x: torch.Tensor, folder: None, **options: Any) -> dict[str, Any]:
    model = adapted(row, **options).train()
    torch.manual_seed(11)
    y = model(x)
    return {"y": y, "grads": backward(model, y, x)}


def _eval(row: cases.Row, x: torch.Tensor, folder: None) -> dict[str, Any]:
    model = adapted(row)
    with evaluated(model):
        return {"y": model(x), "again": model(x)}


def _merge(row: cases.Row, x: torch.Tensor, folder: None, safe: bool = False) -> dict[str, Any]:
    model = adapted(row)
    with evaluated(model):
        model.merge_adapter(safe_merge=safe)
        return {"y": model(x), "base": base_state(model)}


def _unmerge(row: cases.Row, x: torch.Tensor, folder: None) -> dict[str, Any]:
    model = adapted(row)
    with evaluated(model):
        model.merge_adapter()
        model.unmerge_adapter()
        return {"y": model(x), "base": base_state(model)}


def _disabled(row: cases.Row, x: torch.Tensor, folder: None) -> dict[str, Any]:
    model = adapted(row)
    with evaluated(model), model.disable_adapter():
        return {"y": model(x)}


def _two(row: cases.Row, x: torch.Tensor, folder: None) -> dict[str, Any]:
    model = adapted(row, names=("default", "second"))
    out: dict[str, Any] = {}
    with evaluated(model):
        out["first"] = model(x)
        model.set_adapter("second")
        out["second"] = model(x)
        model.base_model.set_adapter(["default", "second"])
        out["both"] = model(x)
        model.set_adapter("second")
        model.delete_adapter("default")
        out["left"] = model(x)
    out["parameters"] = sorted(name for name, _ in model.named_parameters() if "lora_" in name)
    return out


def _saved(row: cases.Row, x: torch.Tensor, folder: str) -> dict[str, Any]:
    model = adapted(row)
    model.save_pretrained(folder)
    with evaluated(model):
        return {"y": model(x), "saved": saved_files(folder)}


def _loaded(row: cases.Row, x: torch.Tensor, folder: str, **options: Any) -> dict[str, Any]:
    model = peft.PeftModel.from_pretrained(row.layer.model(row.form), folder, **options)
    with evaluated(model):
        return {"y": model(x), "state": peft.get_peft_model_state_dict(model)}


def _deepcopied(row: cases.Row, x: torch.Tensor, folder: None) -> dict[str, Any]:
    model = copy.deepcopy(adapted(row))
    with evaluated(model):
        return {"y": model(x)}


_STATES: dict[str, Callable[..., dict[str, Any]]] = {
    "train": _train,
    "eval": _eval,
    "dropout": lambda row, x, folder: _train(row, x, folder, lora_dropout=0.4),
    "lora_bias": lambda row, x, folder: _train(row, x, folder, lora_bias=True),
    "low_precision": lambda row, x, folder: _train(row, x, folder, autocast_adapter_dtype=False),
    "merged": _merge,
    "safe_merged": lambda row, x, folder: _merge(row, x, folder, safe=True),
    "unmerged": _unmerge,
    "disabled": _disabled,
    "two_adapters": _two,
    "saved": _saved,
    "loaded": _loaded,
    "low_cpu_mem": lambda row, x, folder: _loaded(row, x, folder, low_cpu_mem_usage=True),
    "deepcopied": _deepcopied,
}


# ---- a transformers model --------------------------------------------------------------------------------------------
def _model_adapted(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    case = models.CASES[name]
    base, inputs = case.base()
    torch.manual_seed(7)
    model = peft.get_peft_model(base, peft.LoraConfig(**copy.deepcopy(case.options)), case.adapters[0])
    for adapter in case.adapters[1:]:
        model.add_adapter(adapter, peft.LoraConfig(**copy.deepcopy({**case.options, **case.second})))
    return model, inputs


def _first_tensor(outputs: Any) -> torch.Tensor:
    for key in ("logits", "start_logits", "last_hidden_state"):
        if key in outputs:
            return outputs[key]
    raise KeyError(f"no known output among {list(outputs)}")


@recipe
def model_init(name: str) -> dict[str, Any]:
    """What is adapted, what may be trained, and what it starts as."""
    model, _ = _model_adapted(name)
    layers = sorted(key for key, module in model.named_modules() if isinstance(module, LoraLayer))
    return {
        "class": type(model).__name__,
        "layers": layers,
        "parameters": trainable(model),
        "counts": list(model.get_nb_trainable_parameters()),
    }


@recipe
def model_trained(name: str, folder: str) -> dict[str, Any]:
    """Outputs and gradients of a model with filled adapters, and what it saves into a folder."""
    model, inputs = _model_adapted(name)
    for adapter in models.CASES[name].adapters:
        model.set_adapter(adapter)
        fill(model)
    model.eval()
    y = _first_tensor(model(**inputs))
    out = {"y": y, "grads": backward(model, y)}
    model.save_pretrained(folder)
    with evaluated(model), model.disable_adapter():
        out["disabled"] = _first_tensor(model(**inputs))
    with evaluated(model):
        model.merge_adapter()
        out["merged"] = _first_tensor(model(**inputs))
    return {**out, "saved": saved_files(folder)}


@recipe
def model_loaded(name: str, folder: str) -> dict[str, Any]:
    """Outputs of a fresh base with the adapters that a folder holds, the last one active."""
    case = models.CASES[name]
    base, inputs = case.base()
    folders = {adapter: Path(folder) if adapter == "default" else Path(folder, adapter) for adapter in case.adapters}
    (first, where), *others = folders.items()
    model = peft.PeftModel.from_pretrained(base, where, adapter_name=first)
    for adapter, where in others:
        model.load_adapter(where, adapter)
    model.set_adapter(case.adapters[-1])
    with evaluated(model):
        return {
            "class": type(model).__name__,
            "y": _first_tensor(model(**inputs)),
            "state": {adapter: peft.get_peft_model_state_dict(model, adapter_name=adapter) for adapter in folders},
        }
