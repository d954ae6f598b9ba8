# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""New adapters made of others: weighted combinations, and the difference between a trained and an initial adapter."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.warning import PeftWarning

from .layer.base import LoraLayer
from .layer.param import ParamWrapper
from .variants.dora import DoraLinearVariant
from .variants.mica import MiCAEmbeddingVariant, MiCALinearVariant

if TYPE_CHECKING:
    from .config import LoraConfig
    from .model import LoraModel

_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "linear": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
}
_NEED_DENSITY = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
_NEED_SIGNS = ("ties", "dare_ties")
COMBINATION_TYPES = (*_FUNCTIONS, *(f"{name}_svd" for name in _FUNCTIONS if name != "linear"), "svd", "cat")
_COMBINABLE = (type(None), MiCALinearVariant, MiCAEmbeddingVariant)


@dataclass(frozen=True)
class Recipe:
    """How adapters are combined.

    Args:
        space: "factors" (A and B each), "delta" (the products, cut to a rank by SVD) or "cat" (ranks side by side).
        function: Combines tensors of one shape, given their weights.
        svd_rank: Rank to cut to; None for the largest rank of the adapters.
        svd_clamp: Quantile to which the entries of the cut factors are clamped; None not to.
        svd_full_matrices, svd_driver: Passed to `torch.linalg.svd`.
    """

    space: str
    function: Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None


def make_recipe(
    combination_type: str,
    svd_rank: int | None,
    svd_clamp: float | None,
    svd_full_matrices: bool,
    svd_driver: str | None,
    density: float | None,
    majority_sign_method: str,
) -> Recipe:
    """The recipe for a combination type; arguments as in `LoraModel.add_weighted_adapter`.

    Raises:
        ValueError: The type is unknown, or needs a density.
    """
    if combination_type not in COMBINATION_TYPES:
        raise ValueError(f"combination_type={combination_type!r}: use one of {', '.join(COMBINATION_TYPES)}.")
    if combination_type == "cat":
        return Recipe("cat", task_arithmetic)
    name = combination_type.removesuffix("_svd")
    if name == "svd":
        name = "linear"
    function = _FUNCTIONS[name]
    if name in _NEED_DENSITY:
        if density is None:
            raise ValueError(f"combination_type={combination_type!r} needs density, the share of entries to keep.")
        options = {"density": density}
        if name in _NEED_SIGNS:
            options["majority_sign_method"] = majority_sign_method
        pruning = function
        function = lambda tensors, weights: pruning(tensors, weights, **options)  # noqa: E731
    if combination_type in _FUNCTIONS:
        return Recipe("factors", function)
    return Recipe("delta", function, svd_rank, svd_clamp, svd_full_matrices, svd_driver)


def add_weighted_adapter(
    model: LoraModel, adapters: list[str], weights: list[float], adapter_name: str, recipe: Recipe
) -> None:
    """Create `adapter_name` in `model` as a combination; see `LoraModel.add_weighted_adapter`."""
    if adapter_name in model.peft_config:
        warnings.warn(f"There is an adapter {adapter_name!r} already; it is left as it is.", PeftWarning, stacklevel=3)
        return
    holders = _check(model, adapters, weights)
    if len(adapters) == 1:
        recipe = Recipe("factors", task_arithmetic)  # nothing to combine: a copy, scaled
    layers = {
        name: module
        for name, module in model.model.named_modules()
        if isinstance(module, LoraLayer) and any(module.has_adapter(adapter) for adapter in adapters)
    }
    ranks = {name: _new_rank(name, layer, adapters, layers, recipe) for name, layer in layers.items()}
    model.peft_config[adapter_name] = _new_config(model, adapters, ranks)
    try:
        model.inject_adapter(model.model, adapter_name)
        for layer in layers.values():
            _fill(layer, adapters, weights, adapter_name, recipe)
    except Exception:
        model.delete_adapter(adapter_name)
        raise
    for wrapper, source in holders:
        wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[source].state_dict())


def _check(model: LoraModel, adapters: list[str], weights: list[float]) -> list[tuple[ModulesToSaveWrapper, str]]:
    """Refuse what cannot be combined; return the wrappers whose module one of the adapters trained in full."""
    if not adapters:
        raise ValueError("adapters is empty: name at least one adapter.")
    if len(adapters) != len(weights):
        raise ValueError(f"There are {len(adapters)} adapters but {len(weights)} weights: give one weight an adapter.")
    for adapter in adapters:
        if adapter not in model.peft_config:
            raise ValueError(f"There is no adapter {adapter!r}; present: {', '.join(model.peft_config)}.")
    kinds = {isinstance(model.peft_config[adapter].target_modules, str) for adapter in adapters}
    if len(kinds) > 1:
        raise ValueError(
            "Some adapters name their target_modules by a list and some by a regular expression, which do not combine: "
            "use one way in all configs."
        )
    holders = []
    for name, module in model.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            owners = [adapter for adapter in adapters if adapter in module.modules_to_save]
            if len(owners) > 1:
                raise ValueError(
                    f"{', '.join(map(repr, owners))} each have a copy of {name} in modules_to_save, and full modules are "
                    "not combined: leave all but one of these adapters out."
                )
            holders += [(module, owner) for owner in owners]
        elif isinstance(module, LoraLayer):
            _check_layer(name, module, adapters)
    return holders


def _check_layer(name: str, layer: LoraLayer, adapters: list[str]) -> None:
    for adapter in adapters:
        if isinstance(layer, ParamWrapper) and layer.has_adapter(adapter):
            raise ValueError(
                f"Adapter {adapter!r} is on the parameter {layer.parameter_name} of {name} (target_parameters), whose factors "
                "are stacked by expert and do not combine: leave it out."
            )
        variant = layer.lora_variant.get(adapter)
        if not isinstance(variant, (*_COMBINABLE, DoraLinearVariant)):
            raise ValueError(
                f"Adapter {adapter!r} is a {type(variant).__name__} in {name}: only plain LoRA and DoRA adapters combine. "
                "peft.tuners.lora.conversion.convert_to_lora makes it a plain one."
            )


def _new_rank(name: str, layer: LoraLayer, adapters: list[str], layers: dict[str, LoraLayer], recipe: Recipe) -> int:
    present = [layer.r[adapter] for adapter in adapters if layer.has_adapter(adapter)]
    groups = getattr(layer.get_base_layer(), "groups", 1)
    if groups > 1 and recipe.space != "factors":
        raise ValueError(f"{name} is a convolution with {groups} groups: use one of {', '.join(_FUNCTIONS)} for it.")
    if recipe.space == "cat":
        return sum(present)
    if recipe.space == "delta":
        every = [r for other in layers.values() for adapter, r in other.r.items() if adapter in adapters]
        return recipe.svd_rank or max(every)
    if len(set(present)) > 1:
        raise ValueError(
            f"The adapters have the ranks {', '.join(map(str, present))} in {name}, and factors of different ranks do not "
            "add up: use combination_type='cat' or 'svd'."
        )
    return present[0]


def _new_config(model: LoraModel, adapters: list[str], ranks: dict[str, int]) -> LoraConfig:
    """The first adapter's config with the targets of all, a scaling of 1, and ranks by module where they differ."""
    configs = [model.peft_config[adapter] for adapter in adapters]
    r = max(ranks.values())
    other = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    where = {(str(c.layers_to_transform), str(c.layers_pattern), str(c.exclude_modules)) for c in configs}
    narrowed = {}
    if len(where) > 1:  # the adapters look for their targets in different places: name each module
        targets = set(ranks)
        narrowed = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    elif isinstance(configs[0].target_modules, str):
        targets = "|".join(f"({config.target_modules})" for config in configs)
    else:
        targets = set().union(*(config.target_modules or () for config in configs))
    saved = [name for config in configs for name in config.modules_to_save or ()]
    init = configs[0].init_lora_weights  # no other start: those change the base weight, also when the file is loaded
    return replace(
        copy.deepcopy(configs[0]),
        r=r,
        lora_alpha=r,
        target_modules=targets,
        rank_pattern=other,
        alpha_pattern=dict(other),
        use_rslora=False,
        use_dora=any(config.use_dora for config in configs),
        lora_bias=any(config.lora_bias for config in configs),
        init_lora_weights=init if init in (True, False, "gaussian") else True,
        modules_to_save=list(dict.fromkeys(saved)) or None,
        **narrowed,
    )


# ---- one layer -----------------------------------------------------------------------------------------------------
@torch.no_grad()
def _fill(layer: LoraLayer, adapters: list[str], weights: list[float], new: str, recipe: Recipe) -> None:
    pairs = [(a, w) for a, w in zip(adapters, weights, strict=True) if layer.has_adapter(a)]
    names = [name for name, _ in pairs]
    scaled = [weight * layer.scaling[name] for name, weight in pairs]
    target_a, target_b = _stored(layer, new)
    if recipe.space == "delta":
        a, b = _cut(_combined_product(layer, pairs, recipe), recipe, layer.r[new])
    else:
        all_a, all_b = zip(*(_stored(layer, name) for name in names), strict=True)
        if recipe.space == "cat":
            a = torch.cat([s * factor for s, factor in zip(scaled, all_a, strict=True)])
            b = torch.cat(all_b, dim=1)
        else:
            roots = torch.tensor([math.sqrt(abs(s)) for s in scaled], dtype=target_a.dtype, device=target_a.device)
            signs = torch.tensor([math.copysign(1.0, s) for s in scaled], dtype=roots.dtype, device=roots.device)
            a, b = recipe.function(list(all_a), roots * signs), recipe.function(list(all_b), roots)
    target_a.zero_()
    target_b.zero_()
    target_a[: a.shape[0]].copy_(a.reshape(a.shape[0], *target_a.shape[1:]))
    target_b[:, : b.shape[1]].copy_(b.reshape(*b.shape[:2], *target_b.shape[2:]))
    _fill_bias(layer, names, scaled, new)
    _fill_magnitude(layer, pairs, new)


def _stored(layer: LoraLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as they are stored: convolutions keep their kernel's dimensions."""
    if name in layer.lora_A:
        return layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
    return layer.lora_embedding_A[name].data, layer.lora_embedding_B[name].data


def _combined_product(layer: LoraLayer, pairs: list[tuple[str, float]], recipe: Recipe) -> torch.Tensor:
    """The combination of `scaling · B A` `[out, in]` of the adapters."""
    deltas = []
    for name, _ in pairs:
        a, b = layer.factors(name)
        wide = torch.float64 if b.dtype == torch.float64 else torch.float32
        deltas.append(b.to(wide) @ a.to(wide) * layer.scaling[name])
    weights = torch.tensor([weight for _, weight in pairs], dtype=deltas[0].dtype, device=deltas[0].device)
    return recipe.function(deltas, weights)


def _cut(delta: torch.Tensor, recipe: Recipe, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A `[k, in]` and B `[out, k]` of the best approximation of a rank k ≤ `rank`, the singular values in B."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=recipe.svd_full_matrices, driver=recipe.svd_driver)
    rank = min(rank, *delta.shape)
    b, a = u[:, :rank] * s[:rank], vh[:rank]
    if recipe.svd_clamp is not None:
        largest = torch.quantile(torch.cat([b.flatten(), a.flatten()]), recipe.svd_clamp)
        a, b = a.clamp(-largest, largest), b.clamp(-largest, largest)
    return a, b


def _fill_bias(layer: LoraLayer, names: list[str], scaled: list[float], new: str) -> None:
    """B's bias becomes the weighted sum, so that the combined adapter, whose scaling is 1, adds the same."""
    bias = layer.low_rank_bias(new)
    if bias is None:
        return
    bias.zero_()
    for name, weight in zip(names, scaled, strict=True):
        other = layer.low_rank_bias(name)
        if other is not None:
            bias.add_(other.to(bias), alpha=weight)


def _fill_magnitude(layer: LoraLayer, pairs: list[tuple[str, float]], new: str) -> None:
    """Magnitudes are combined as what they add to the base weight's norm: m = ‖W‖ + Σ wᵢ (mᵢ − ‖W‖).

    A plain LoRA adapter among them counts with the magnitude that it gives the weight, ‖W + s·BA‖. So one DoRA adapter
    of weight 1 stays what it is, and weights of 0 give the base weight.
    """
    if new not in layer.lora_magnitude_vector:
        return
    start = layer.weight_norm(None).flatten()
    total = start.clone()
    for name, share in pairs:
        if name in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[name].weight.flatten().to(start)
        else:
            magnitude = layer.weight_norm(name).flatten().to(start)
        total += share * (magnitude - start)
    target = layer.lora_magnitude_vector[new].weight
    target.copy_(total.reshape(target.shape))


# ---- trained minus initial -----------------------------------------------------------------------------------------
def subtract_initial(trained: dict[str, torch.Tensor], initial: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """B A − B₀ A₀ as one adapter of twice the rank: A above A₀ `[2r, in]`, B beside −B₀ `[out, 2r]`.

    Args:
        trained: The trained adapter's tensors, as saved.
        initial: Those that it started from, whose product was taken out of the base weight.

    Raises:
        ValueError: One of them has a factor that the other lacks.
    """
    result = {}
    for key, tensor in trained.items():
        if "lora_A" not in key and "lora_B" not in key and "lora_embedding_" not in key:
            continue
        start = initial.get(key, initial.get(key.removeprefix("base_model.")))
        if start is None:
            raise ValueError(f"The initial adapter has no {key}: it is not the one that this adapter started from.")
        start = start.to(tensor)
        if "lora_A" in key or "lora_embedding_A" in key:
            result[key] = torch.cat([tensor, start])
        else:
            result[key] = torch.cat([tensor, -start], dim=1)
    return result
