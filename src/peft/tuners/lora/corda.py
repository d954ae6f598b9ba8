# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What CorDA (Yang et al., arXiv 2406.05223) needs before an adapter is made: statistics of the layers' inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from peft.utils.atomic import write_atomically
from peft.weights import find_weight

from .inits.calibration import linear_targets, model_device, rank_of

if TYPE_CHECKING:
    from .config import LoraConfig

_TOLERANCE = 0.05  # how far C C⁻¹ may be from the identity (Frobenius) before C is damped
_FIRST_DAMPING = 0.01
_TEMPORARY = ("corda_method", "rank", "sample_count", "covariance_matrix")


@dataclass
class CordaEigens:
    """The r singular triplets of a layer that its adapter starts from.

    Args:
        S_WC: Singular values of W C `[r]`.
        U_WC: Left singular vectors `[out, r]`.
        V_WC: Right singular vectors, multiplied by C⁻¹, `[in, r]`.
    """

    S_WC: torch.Tensor
    U_WC: torch.Tensor
    V_WC: torch.Tensor


def target_modules(model: nn.Module, config: LoraConfig) -> Iterable[nn.Module]:
    """The linear layers that the config targets."""
    return [module for _, module in linear_targets(model, config)]


def get_model_device(model: nn.Module) -> str:
    """Type of the device of the model's parameters."""
    return model_device(model)


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Leave `eigens` on every layer that the config targets, for `get_peft_model` to start the adapter from.

    Args:
        model: Base model.
        lora_config: The adapter's config, with `corda_config`. Its `cache_file` is read if it exists and written else;
            so is its `covariance_file`.
        run_model: Runs the model on sample data; needed unless one of the files exists.
        hooked_model: The model whose layers `run_model` calls, where that is another object with the same module
            names.

    Raises:
        ValueError: `corda_config` is missing or its method unknown, or `run_model` is missing or calls no layer.
    """
    config = lora_config.corda_config
    if config is None:
        raise ValueError("lora_config.corda_config is missing: set init_lora_weights='corda' or pass a CordaConfig.")
    if config.corda_method not in ("ipm", "kpm"):
        raise ValueError(f"corda_method={config.corda_method!r}: use 'ipm' or 'kpm'.")
    layers = dict(linear_targets(model, lora_config))
    if config.cache_file is not None and os.path.exists(config.cache_file):
        _load_eigens(layers, config.cache_file)
        return
    for name, layer in layers.items():
        layer.corda_method, layer.rank = config.corda_method, rank_of(name, lora_config)
    calib_cov_distribution(model, lora_config, run_model, hooked_model, config.covariance_file)
    collect_eigens(model, lora_config, config.verbose)
    crop_corda_eigens(model, lora_config)
    if config.prune_temporary_fields:
        for layer in layers.values():
            for attribute in _TEMPORARY:
                if hasattr(layer, attribute):
                    delattr(layer, attribute)
    if config.cache_file is not None:
        state = {
            f"{name}.eigens.{key}": getattr(layer.eigens, key)
            for name, layer in layers.items()
            for key in ("S_WC", "U_WC", "V_WC")
        }
        _save(state, config.cache_file)


@torch.no_grad()
def calib_cov_distribution(
    model: nn.Module,
    config: LoraConfig,
    run_model: Callable[[], None] | None,
    hooked_model: nn.Module | None,
    covariance_file: str | None,
) -> None:
    """Leave `covariance_matrix` `[in, in]` on every targeted layer: the mean of Xᵀ X over forward calls.

    The inputs X `[tokens, in]` of a call are divided by the size of their largest entry (by their largest size where that
    entry is zero), as the paper's code does, so that the sum does not overflow.

    Raises:
        ValueError: `run_model` is missing, or a layer was not called.
    """
    layers = dict(linear_targets(model, config))
    if covariance_file is not None and os.path.exists(covariance_file):
        stored = torch.load(covariance_file, map_location=get_model_device(model), weights_only=True)
        for name, layer in layers.items():
            if name not in stored:
                raise ValueError(
                    f"covariance_file={covariance_file!r} has no entry for {name}: it is another model's."
                )
            layer.covariance_matrix = stored[name]
        return
    if run_model is None:
        raise ValueError("run_model is missing: pass a function that runs the model on sample data.")
    hooked = layers if hooked_model is None else dict(linear_targets(hooked_model, config))
    half = config.corda_config.use_float16_for_covariance
    for layer in layers.values():
        layer.sample_count = 0

    def watch(layer: nn.Module) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            x = args[0].detach().flatten(0, -2).float()
            largest = x.max().abs()
            x = x / torch.where(largest > 0, largest, x.abs().max().clamp_min(torch.finfo(x.dtype).tiny))
            x = x.half() if half else x
            product = x.t() @ x
            layer.covariance_matrix = product + layer.covariance_matrix if layer.sample_count else product
            layer.sample_count += 1

        return add

    training = model.training
    model.eval()
    handles = [hooked[name].register_forward_hook(watch(layer)) for name, layer in layers.items()]
    try:
        run_model()
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    for name, layer in layers.items():
        if not layer.sample_count:
            raise ValueError(f"run_model did not call {name}: it must run the whole model (or hooked_model) on data.")
        layer.covariance_matrix = layer.covariance_matrix.float() / layer.sample_count
    if covariance_file is not None:
        _save({name: layer.covariance_matrix for name, layer in layers.items()}, covariance_file)


@torch.no_grad()
def collect_eigens(model: nn.Module, config: LoraConfig, verbose: bool) -> None:
    """Leave all `eigens` on every targeted layer, from its weight and its `covariance_matrix`."""
    for name, layer in tqdm(list(linear_targets(model, config)), desc="CorDA", disable=not verbose):
        layer.eigens = collect_eigens_for_layer(layer, config)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in vars(layer.eigens).values()):
            raise ValueError(f"The decomposition of {name} is not finite: its inputs or weights are not.")


@torch.no_grad()
def collect_eigens_for_layer(linear: nn.Module, config: LoraConfig) -> CordaEigens:
    """U S Vᵀ = W C and V C⁻¹, with C damped on its diagonal by a hundredth of its mean, or more (section 3.1)."""
    weight = find_weight(linear, fan_in_fan_out=config.fan_in_fan_out)
    matrix = weight.dense(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    covariance = linear.covariance_matrix.to(matrix)
    one = torch.eye(covariance.shape[0], dtype=matrix.dtype, device=matrix.device)
    damping = _FIRST_DAMPING
    while True:
        damped = covariance + damping * covariance.diagonal().mean() * one
        inverse, failed = torch.linalg.inv_ex(damped)
        if not failed and torch.dist(damped @ inverse, one) < _TOLERANCE:
            break
        if damping > 1e6 or not bool(torch.isfinite(covariance).all()) or not covariance.any():
            raise ValueError(
                "The covariance of a layer's inputs cannot be inverted: the inputs are zero or not finite."
            )
        damping *= 2
    u, s, vt = torch.linalg.svd(matrix @ damped, full_matrices=False)
    return CordaEigens(S_WC=s, U_WC=u, V_WC=(vt @ inverse).t())


@torch.no_grad()
def crop_corda_eigens(model: nn.Module, config: LoraConfig) -> None:
    """Keep the triplets that the adapter takes: "ipm" the r largest singular values, "kpm" the r smallest."""
    for name, layer in linear_targets(model, config):
        r = rank_of(name, config)
        chosen = slice(None, r) if config.corda_config.corda_method == "ipm" else slice(-r, None)
        eigens = layer.eigens
        layer.eigens = CordaEigens(
            eigens.S_WC[chosen].clone(), eigens.U_WC[:, chosen].clone(), eigens.V_WC[:, chosen].clone()
        )


def _load_eigens(layers: dict[str, nn.Module], file: str) -> None:
    state = torch.load(file, map_location="cpu", weights_only=True)
    for name, layer in layers.items():
        keys = {key: f"{name}.eigens.{key}" for key in ("S_WC", "U_WC", "V_WC")}
        missing = [key for key in keys.values() if key not in state]
        if missing:
            raise ValueError(f"cache_file={file!r} has no {missing[0]}: it is another model's or config's.")
        device = layer.weight.device
        layer.eigens = CordaEigens(**{key: state[stored].to(device) for key, stored in keys.items()})


def _save(state: dict[str, torch.Tensor], file: str) -> None:
    write_atomically(file, lambda temporary: torch.save(state, temporary))
