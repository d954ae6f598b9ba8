# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoftQ (Li et al. 2023, arXiv 2310.08659): adapters that start as the best low-rank repair of a quantised weight."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn

from peft.import_utils import is_bnb_4bit_available

_INDEX = "model.safetensors.index.json"


def _low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rank-`rank` factors A `[rank, in]` and B `[out, rank]` of a matrix `[out, in]`, of equal norm."""
    u, s, vt = torch.linalg.svd(matrix.float(), full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


def _round_trip_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What is left of a weight after NF4 quantisation in blocks of 64."""
    if not is_bnb_4bit_available():
        raise ImportError("LoftQ with num_bits=4 quantises with bitsandbytes: pip install bitsandbytes.")
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), quant_type="nf4", blocksize=64)
    return dequantize_4bit(packed, state)


def _round_trip_int8(weight: torch.Tensor) -> torch.Tensor:
    """What is left of a weight after symmetric int8 quantisation by rows."""
    step = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / 127
    return (weight / step).round() * step


_ROUND_TRIPS = {4: _round_trip_nf4, 8: _round_trip_int8}


@torch.no_grad()
def loftq_init(
    weight: torch.Tensor | nn.Parameter, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Alternate between quantising a weight and repairing it by a low-rank product (algorithm 1 of the paper).

    Args:
        weight: Full-precision weight `[out, in]`, any floating dtype, on any device.
        num_bits: 4 for NF4 in blocks of 64, 8 for symmetric int8 by rows.
        reduced_rank: Rank r of the repair.
        num_iter: Rounds; each quantises what the repair so far leaves over.

    Returns:
        The quantised weight, dequantised again, `[out, in]` in the dtype of `weight`; A `[r, in]` and B `[out, r]` in
        float32, such that the weight is about Q + BA.

    Raises:
        ValueError: `num_bits` is neither 4 nor 8, `num_iter` or `reduced_rank` is not positive, or the weight is no
            matrix.
        ImportError: `num_bits` is 4 and bitsandbytes is not installed.
    """
    if num_bits not in _ROUND_TRIPS:
        raise ValueError(f"num_bits={num_bits} is not supported: use 4 (NF4) or 8 (int8).")
    if num_iter < 1:
        raise ValueError(f"num_iter={num_iter} must be at least 1.")
    if reduced_rank < 1:
        raise ValueError(f"reduced_rank={reduced_rank} must be at least 1.")
    if weight.dim() != 2:
        raise ValueError(f"weight has the shape {list(weight.shape)}; LoftQ needs a matrix [out, in].")
    full = weight.detach().float()
    rest = full
    for _ in range(num_iter):
        quantised = _ROUND_TRIPS[num_bits](rest)
        lora_a, lora_b = _low_rank(full - quantised, reduced_rank)
        rest = full - lora_b @ lora_a
    return quantised.to(weight.dtype), lora_a, lora_b


class _Checkpoint:
    """The tensors of a model's safetensors files, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.files = _files_by_tensor(folder)

    def read(self, name: str) -> torch.Tensor | None:
        file = self.files.get(name)
        if file is None:
            return None
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    index = folder / _INDEX
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            files.update(dict.fromkeys(tensors.keys(), file))
    if not files:
        raise ValueError(
            f"There is no safetensors file of the base model in {folder}: LoftQ reads the full-precision weights from "
            "there. Convert the model (save_pretrained writes safetensors), or pass another model_path."
        )
    return files


def _checkpoint_folder(peft_model: nn.Module, model_path: str | None) -> Path:
    if model_path is None:
        model_path = getattr(getattr(peft_model, "config", None), "name_or_path", None)
        if not model_path:
            raise ValueError("The base model does not know where it was loaded from: pass model_path.")
    path = Path(model_path)
    if path.is_file():
        return path.parent
    if path.is_dir():
        return path
    return Path(snapshot_download(os.fspath(model_path), allow_patterns=["*.safetensors", _INDEX]))


def _original_weight(checkpoint: _Checkpoint, name: str, base_model_prefix: str) -> torch.Tensor:
    """The full-precision weight of the module called `name`; checkpoints may lack, or have, the head's prefix."""
    key = f"{name}.weight"
    candidates = [key, key.removeprefix(f"{base_model_prefix}."), f"{base_model_prefix}.{key}"]
    for candidate in candidates:
        weight = checkpoint.read(candidate)
        if weight is not None:
            return weight
    raise KeyError(f"The base model's files hold no tensor {key!r}; model_path must be that of this base model.")


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Set an adapter of a model with 4-bit base weights to the best repair of the quantisation error, in place.

    One round of LoftQ with the quantised weights left as they are: sBA becomes the best rank-r approximation of the
    difference between the weights in the model's files and the quantised ones. DoRA magnitudes follow, so that the
    repaired weight itself is what the model starts from.

    Args:
        peft_model: Model with LoRA adapters on bitsandbytes 4-bit layers.
        model_path: Folder or repository with the base model's safetensors files; None for where it was loaded from.
        adapter_name: Adapter to set.
        callback: Called with the model and a module's name after each replacement; if it returns False, this one is
            taken back.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: No layer is a LoRA layer on 4-bit weights, or there are no safetensors files.
        KeyError: The files lack the weight of a layer.
    """
    if not is_bnb_4bit_available():
        raise ImportError("replace_lora_weights_loftq is for layers of bitsandbytes: pip install bitsandbytes.")
    layers = list(_four_bit_layers(peft_model, adapter_name))
    if not layers:
        raise ValueError(
            f"The model has no LoRA layer with an adapter {adapter_name!r} on 4-bit weights: load the base model with "
            "BitsAndBytesConfig(load_in_4bit=True), and check adapter_name."
        )
    checkpoint = _Checkpoint(_checkpoint_folder(peft_model, model_path))
    base_model_prefix = getattr(peft_model.get_base_model(), "base_model_prefix", "model")
    for name, layer in layers:
        weight = _original_weight(checkpoint, name.removeprefix("base_model.model."), base_model_prefix)
        before = {key: value.clone() for key, value in _adapter_state(layer, adapter_name).items()}
        _repair(layer, adapter_name, weight)
        if callback is not None and not callback(peft_model, name):
            for key, value in _adapter_state(layer, adapter_name).items():
                value.copy_(before[key])


def _four_bit_layers(model: nn.Module, adapter_name: str):
    from peft.tuners.lora.layer import LoraLayer

    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter_name not in module.lora_A:
            continue
        if any(kind.__name__ == "Linear4bit" for kind in type(module.get_base_layer()).__mro__):
            yield name, module


def _adapter_state(layer: Any, name: str) -> dict[str, torch.Tensor]:
    state = {"A": layer.lora_A[name].weight, "B": layer.lora_B[name].weight}
    if name in layer.lora_magnitude_vector:
        state["magnitude"] = layer.lora_magnitude_vector[name].weight
    return state


def _repair(layer: Any, name: str, weight: torch.Tensor) -> None:
    quantised = layer.get_base_weight()
    lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight
    scaling = layer.scaling[name]
    error = weight.to(quantised.device, torch.float32) - quantised.float()
    a, b = _low_rank(error / scaling, lora_a.shape[0])
    lora_a.copy_(a)
    lora_b.copy_(b)
    if name in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[name]
        magnitude.weight.copy_(magnitude.get_weight_norm(quantised.float(), lora_b.float() @ lora_a.float(), scaling))
