# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Small tools around adapted models: scaling adapters, input dtypes, signatures, and choosing what to adapt."""

from __future__ import annotations

import functools
import inspect
import math
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from peft.config import PeftConfig
from peft.engine.layer import BaseTunerLayer
from peft.peft_model import PeftModel
from peft.tuners.lora import LoraLayer, dora
from peft.weights import find_weight


def update_forward_signature(model: PeftModel) -> None:
    """Give `model.forward` the signature of the base model's, where it only takes `*args, **kwargs`.

    Data collators and trainers read it to find out which columns a model takes.

    Args:
        model: Model to change.
    """
    _copy_signature(model, "forward")


def update_generate_signature(model: PeftModel) -> None:
    """Give `model.generate` the signature of the base model's, where it only takes `*args, **kwargs`.

    Args:
        model: Model to change.
    """
    _copy_signature(model, "generate")


def update_signature(model: PeftModel, method: str = "all") -> None:
    """Give methods of a model the signatures of the base model's.

    Args:
        model: Model to change.
        method: "forward", "generate" or "all".

    Raises:
        ValueError: `method` is another word.
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method={method!r} is unknown: use 'forward', 'generate' or 'all'.")
    for name in ("forward", "generate") if method == "all" else (method,):
        _copy_signature(model, name)


def _copy_signature(model: PeftModel, name: str) -> None:
    own = getattr(model, name)
    kinds = [parameter.kind for parameter in inspect.signature(own).parameters.values()]
    if kinds != [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
        return
    unbound = own.__func__
    template = getattr(type(model.get_base_model()), name)

    @functools.wraps(template)
    def method(self, *args, **kwargs):
        return unbound(self, *args, **kwargs)

    setattr(model, name, types.MethodType(method, model))


def check_if_peft_model(model_name_or_path: str | os.PathLike) -> bool:
    """Whether a folder or a repository on the Hub holds an adapter whose config can be read.

    Args:
        model_name_or_path: Folder or repository.
    """
    try:
        PeftConfig.from_pretrained(os.fspath(model_name_or_path))
    except Exception:  # whatever is wrong with it, it is no adapter that could be loaded
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scaling of all LoRA adapters of a model inside the block.

    Args:
        model: Model with LoRA layers.
        multiplier: Factor.

    Raises:
        TypeError: `multiplier` is no number.
        ValueError: The model has no LoRA layer.
    """
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"multiplier must be a number, got {type(multiplier).__name__}.")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layer whose scaling could be changed.")
    original = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            for name in layer.scaling:
                layer.scaling[name] *= multiplier
            layer._replan()
        yield
    finally:
        for layer, scaling in zip(layers, original, strict=True):
            layer.scaling.update(scaling)
            layer._replan()


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Hand inputs to adapters in the dtype that they have, inside the block.

    Adapted layers otherwise cast an input to their adapter's dtype. Frameworks that cast weights on the fly, layer by
    layer, need this.

    Args:
        model: Model with adapted layers.
        active: False changes nothing, for use under a condition.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)] if active else []
    original = [getattr(layer, "cast_input_dtype_enabled", True) for layer in layers]
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
            layer._replan()
        yield
    finally:
        for layer, enabled in zip(layers, original, strict=True):
            layer.cast_input_dtype_enabled = enabled
            layer._replan()


class DoraCaching:
    """A block for which DoRA may reuse what it computed of unchanged weights.

    This package always reuses the weight norm, and only while that is exact, so that nothing depends on this switch. It
    sets `peft.tuners.lora.dora.ENABLE_DORA_CACHING` for code that reads it.

    Args:
        enabled: Value of the switch inside the block.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.prev_value: bool | None = None

    def __enter__(self) -> None:
        self.prev_value = dora.ENABLE_DORA_CACHING
        dora.ENABLE_DORA_CACHING = self.enabled

    def __exit__(self, *_: object) -> None:
        dora.ENABLE_DORA_CACHING = self.prev_value


class MontecloraTrainerMixin:
    """Adds the loss of MonteCLoRA's samplers to that of a trainer: `class MyTrainer(MontecloraTrainerMixin, Trainer)`."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The trainer's loss, with the mean of what the samplers of active adapters add.

        Args:
            model: The model that is trained.
            inputs: A batch.
            return_outputs: Give the model's outputs too.
            **kwargs: Passed to the trainer's `compute_loss`.
        """
        loss = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        added = [
            sum(layer.lora_monteclora_sampler[name].get_variational_loss())
            for layer in model.modules()
            if isinstance(layer, LoraLayer) and hasattr(layer, "lora_monteclora_sampler")
            for name in layer.active_adapters
            if name in layer.lora_monteclora_sampler
        ]
        if not added:
            return loss
        mean = sum(added) / len(added)
        return (loss[0] + mean, *loss[1:]) if return_outputs else loss + mean


class KappaTuneSelector:
    """Ranks modules by the condition number κ of their weights, the largest over the smallest singular value.

    A low κ means that a module has not specialised, so that training it disturbs least of what the model knows
    (KappaTune, arXiv 2506.16289). A singular smallest value is taken as 1e-8.

    Args:
        model: Model to look at. Of its modules the linear ones count, quantised ones by their dequantised weight.
        max_dim_size_to_analyze: Weights with a larger side are left out, as their decomposition would take long.
        moe_param_suffixes: How the names of stacked expert parameters `[experts, out, in]` end; None for the usual
            ones.
        show_progress: Show a progress bar.

    Example:
        >>> from torch import nn
        >>> from peft.helpers import KappaTuneSelector
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> _ = nn.init.eye_(model[1].weight)
        >>> KappaTuneSelector(model, show_progress=False).get_best_targets(num_modules=1)
        ['1']
    """

    DEFAULT_MOE_PARAM_SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = (
            self.DEFAULT_MOE_PARAM_SUFFIXES if moe_param_suffixes is None else tuple(moe_param_suffixes)
        )
        self.show_progress = show_progress
        self._condition_numbers: dict[str, float] | None = None
        self._parameter_condition_numbers: dict[str, float] | None = None

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of linear modules, the lowest κ first; all of them if no limit is given.

        Args:
            top_p: Share of the modules, at least one of them; `num_modules` goes before it.
            num_modules: Number of modules.
            threshold: Largest κ; used if neither of the others is given.

        Raises:
            ValueError: A limit is negative, or a weight is not finite.
        """
        self._compute()
        return _lowest(self._condition_numbers, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of stacked expert parameters, the lowest mean κ over the experts first. Limits as in
        `get_best_targets`."""
        self._compute()
        return _lowest(self._parameter_condition_numbers, top_p, num_modules, threshold)

    def _compute(self) -> None:
        if self._condition_numbers is not None:
            return
        modules = [(n, m) for n, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        experts = [
            (n, p) for n, p in self.model.named_parameters() if p.ndim == 3 and n.endswith(self.moe_param_suffixes)
        ]
        progress = tqdm(total=len(modules) + len(experts), desc="Condition numbers", disable=not self.show_progress)
        kappas, expert_kappas = {}, {}
        with progress, torch.no_grad():
            for name, module in modules:
                weight = find_weight(module)
                if max(weight.shape) <= self.max_dim_size_to_analyze:
                    kappas[name] = _condition_number(weight.dense(torch.float32), name)
                progress.update()
            for name, stacked in experts:
                if max(stacked.shape[1:]) <= self.max_dim_size_to_analyze:
                    expert_kappas[name] = _mean(_condition_number(expert.float(), name) for expert in stacked)
                progress.update()
        self._condition_numbers, self._parameter_condition_numbers = kappas, expert_kappas


def _condition_number(matrix: torch.Tensor, name: str) -> float:
    if not torch.isfinite(matrix).all():
        raise ValueError(f"The weight of {name!r} holds NaN or infinity: it has no condition number.")
    values = torch.linalg.svdvals(matrix)
    return (values[0] / (values[-1] + 1e-8)).item()


def _mean(values: Iterator[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _lowest(
    kappas: dict[str, float], top_p: float | None, num_modules: int | None, threshold: float | None
) -> list[str]:
    for limit, value in (("top_p", top_p), ("num_modules", num_modules), ("threshold", threshold)):
        if value is not None and value < 0:
            raise ValueError(f"{limit}={value} must not be negative.")
    ranked = sorted(kappas, key=kappas.__getitem__)
    if num_modules is not None:
        return ranked[:num_modules]
    if top_p is not None:
        return ranked[: max(1, int(len(ranked) * top_p))]
    if threshold is not None:
        return [name for name in ranked if kappas[name] <= threshold]
    return ranked


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[Literal["target_modules", "target_parameters"], list[str] | None]:
    """The `target_modules` and `target_parameters` of a config that adapts what is least specialised.

    Args:
        model: Model to look at.
        top_p: Share of the linear modules, and of the stacked expert parameters, to take.
        max_dim_size_to_analyze: Weights with a larger side are left out.
        moe_param_suffixes: How the names of stacked expert parameters end; None for the usual ones.
        show_progress: Show a progress bar.

    Returns:
        Arguments for a config; `target_parameters` is None where the model has no stacked experts.

    Raises:
        ValueError: `top_p` is negative, or a weight is not finite.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }


__all__ = [
    "DoraCaching",
    "KappaTuneSelector",
    "MontecloraTrainerMixin",
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "find_kappa_target_modules",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]
