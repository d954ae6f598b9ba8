# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Adapters for models whose module names or weight layouts transformers has changed since the adapter was saved.

Needs transformers >= 5, and is imported by nothing of `import peft`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import conversion_mapping
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from peft.config import PeftConfig
from peft.tuners._registry import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from peft.utils.peft_types import PeftType

_FILE_PREFIX = "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"


# ---- operations on tensors -----------------------------------------------------------------------------------------
class PermuteDims(ConversionOps):
    """Reorder the dimensions of every tensor.

    Args:
        dims: The new order, as for `torch.permute`.
    """

    def __init__(self, dims: tuple[int, ...]) -> None:
        self.dims = dims

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, torch.Tensor],
        source_patterns: list[str],
        target_patterns: list[str],
        config: Any,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        return {key: tensor.permute(*self.dims) for key, tensor in input_dict.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        return PermuteDims(tuple(self.dims.index(position) for position in range(len(self.dims))))


class FlattenDims(ConversionOps):
    """Join neighbouring dimensions of every tensor into one.

    Args:
        dims: First and last of them.
    """

    def __init__(self, dims: tuple[int, int]) -> None:
        self.dims = dims

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, torch.Tensor],
        source_patterns: list[str],
        target_patterns: list[str],
        config: Any,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        return {key: tensor.flatten(self.dims[0], self.dims[-1]) for key, tensor in input_dict.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        raise _one_way(self)


class PeftConcatenate(Concatenate):
    """B of layers that became one, whose A are stacked along the rank: a block-diagonal B for every expert.

    From one `[experts, out_i, r_i]` for each old layer to `[Σ out_i, Σ r_i · experts]`, whose last dimension counts
    experts fastest, as LoRA on stacked parameters stores it.
    """

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, torch.Tensor],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        blocks = [input_dict.pop(pattern) for pattern in source_patterns if pattern in input_dict]
        blocks = [block[0] if isinstance(block, list) else block for block in blocks]
        joined = torch.stack([torch.block_diag(*expert) for expert in zip(*blocks, strict=True)])
        return {full_layer_name: joined.permute(1, 2, 0).flatten(1).contiguous()}

    @property
    def reverse_op(self) -> ConversionOps:
        raise _one_way(self)


def _one_way(operation: ConversionOps) -> ValueError:
    return ValueError(
        f"{type(operation).__name__} cannot be undone, as the sizes that it joined are gone: save the adapter with "
        "save_pretrained, in its new layout."
    )


class _AdapterRenaming(WeightRenaming):
    """A renaming that transformers does not remember: it would undo it when it saves the base model's own weights."""

    __slots__ = ()

    def was_used(self) -> bool:
        return False


class _AdapterConverter(WeightConverter):
    """A conversion that transformers does not remember, likewise."""

    __slots__ = ()

    def was_used(self) -> bool:
        return False


# ---- experts -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ExpertFusion:
    """Linear layers of experts, one module an expert, that became one stacked parameter `[experts, out, in]`.

    Args:
        sources: Names of the old layers in each expert, in the order in which their outputs are joined.
        patterns: What the old layers' names end with, `*` for the expert, such as `.experts.*.w1`.
        module: What the name of the module with the parameter ends with.
        parameter: Name of the parameter in it.
    """

    sources: tuple[str, ...]
    patterns: tuple[str, ...]
    module: str
    parameter: str


def _fusion(conversion: Any) -> ExpertFusion | None:
    """The fusion that a conversion of base weights stands for, if it only stacks experts and joins their outputs."""
    operations = getattr(conversion, "operations", None)
    if operations is None or len(conversion.target_patterns) != 1:
        return None
    kinds = [type(operation) for operation in operations]
    stacks = kinds == [MergeModulelist] and len(conversion.source_patterns) == 1
    joins = kinds == [MergeModulelist, Concatenate] and operations[-1].dim == 1
    if not (stacks or joins) or operations[0].dim != 0:
        return None
    if not all(pattern.endswith(".weight") and "*." in pattern for pattern in conversion.source_patterns):
        return None
    patterns = tuple(pattern.removesuffix(".weight") for pattern in conversion.source_patterns)
    module, _, parameter = conversion.target_patterns[0].rpartition(".")
    return ExpertFusion(tuple(pattern.rsplit(".", 1)[-1] for pattern in patterns), patterns, module, parameter)


def _fusions(conversions: Iterable[Any] | None) -> list[ExpertFusion]:
    return [fusion for fusion in map(_fusion, conversions or ()) if fusion is not None]


def _names_target(config: PeftConfig, fusion: ExpertFusion) -> bool:
    """Whether a config, of the old layout or of the new one, may adapt what a fusion made."""
    parameters = getattr(config, "target_parameters", None) or ()
    if any(name.rsplit(".", 1)[-1] == fusion.parameter for name in parameters):
        return True
    targets = getattr(config, "target_modules", None) or ()
    if isinstance(targets, str):
        if targets == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            return True
        examples = [f"model.layers.0{pattern.replace('*', '0')}" for pattern in fusion.patterns]
        return any(re.fullmatch(targets, example.replace("\\", "")) for example in examples)
    return any(target.rsplit(".", 1)[-1] in fusion.sources for target in targets)


def _conversions_of_fusion(
    fusion: ExpertFusion, fusions: list[ExpertFusion], slot: str, config: PeftConfig | None
) -> Iterator[WeightConverter]:
    """Conversions of a fusion's A and B; `slot` is what stands between `lora_A` and `weight`."""
    later = [
        other
        for other in fusions[fusions.index(fusion) + 1 :]
        if other.module == fusion.module and (config is None or _names_target(config, other))
    ]
    # two adapted parameters of one module nest two layers, the first parameter's inside
    module = fusion.module + ".base_layer" * len(later)
    joins = len(fusion.sources) > 1
    last: list[ConversionOps] = [PeftConcatenate(dim=1)] if joins else []
    if not joins:
        last = [PermuteDims(dims=(2, 0, 1)), FlattenDims(dims=(0, 1)), Transpose(0, 1)]
    for factor, operations in (
        ("lora_A", [*([Concatenate(dim=1)] if joins else []), FlattenDims(dims=(0, 1))]),
        ("lora_B", last),
    ):
        yield _AdapterConverter(
            [f"{pattern}.{factor}.*" for pattern in fusion.patterns],
            f"{module}.{factor}{slot}.weight",
            operations=[MergeModulelist(dim=0), *operations],
        )


def _for_adapters(conversions: Iterable[Any] | None, slot: str, config: PeftConfig | None) -> list[Any]:
    """Conversions of base weights as they apply to an adapter's: renamings stay, experts are fused, the rest goes."""
    fusions = _fusions(conversions)
    adapted: list[Any] = []
    for conversion in conversions or ():
        if isinstance(conversion, WeightRenaming):
            adapted.append(deepcopy(conversion))
            continue
        fusion = _fusion(conversion)
        if fusion is not None:
            for converter in _conversions_of_fusion(fusion, fusions, slot, config):
                converter.scope_prefix = conversion.scope_prefix
                converter.base_model_prefix = conversion.base_model_prefix
                adapted.append(converter)
    return adapted


# ---- names ---------------------------------------------------------------------------------------------------------
def build_peft_weight_mapping(
    weight_conversions: list[WeightConverter | WeightRenaming] | None,
    adapter_name: str,
    peft_config: PeftConfig | None = None,
) -> list[WeightConverter | WeightRenaming]:
    """What transformers does to the tensors of an adapter's file to load them into a model of its own.

    Args:
        weight_conversions: What it does to the model's own files.
        adapter_name: The adapter's name in the model.
        peft_config: The adapter's config; None for adapters of any method.

    Returns:
        Renamings from saved names to those in memory, and for experts that transformers stacks since version 5
        conversions of their per-expert A and B.
    """
    if peft_config is None:
        prefixes = sorted(set(PEFT_TYPE_TO_PREFIX_MAPPING.values()))
    else:
        prefixes = [PEFT_TYPE_TO_PREFIX_MAPPING[peft_config.peft_type]]
    mapping = [
        _AdapterRenaming(rf"^{re.escape(_FILE_PREFIX)}", ""),
        # the magnitude is saved under the name of its module
        _AdapterRenaming(rf"(\.{_MAGNITUDE})$", r"\1.weight"),
    ]
    # the last part with the prefix is the slot: modules may be called so, too
    mapping += [_AdapterRenaming(rf"(\.{prefix}[^\.]+)(?!.*\.{prefix})", rf"\1.{adapter_name}") for prefix in prefixes]
    return mapping + _for_adapters(weight_conversions, f".{adapter_name}", peft_config)


def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_state_dict: dict[str, torch.Tensor],
    adapter_name: str = "default",
) -> dict[str, torch.Tensor]:
    """A saved adapter under the names, and in the layout, that the installed transformers gives a model's modules.

    Args:
        model: A transformers model, or a model with adapters around one.
        peft_config: The adapter's config.
        adapter_state_dict: Tensors by saved name.
        adapter_name: Not needed, as saved names are without it.

    Returns:
        The same tensors where the model has modules of their names; the others renamed and fused where that leads to
        modules that it has, and left alone where it does not.
    """
    base = _base_model(model)
    modules = {name for name, _ in base.named_modules()}
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[peft_config.peft_type]
    strangers = {key for key in adapter_state_dict if _owner(key, prefix) not in modules}
    if not strangers:
        return dict(adapter_state_dict)
    mapping = _for_adapters(get_model_conversion_mapping(base), "", peft_config)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    fusing = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converters = {pattern: entry for entry in fusing for pattern in entry.source_patterns}
    converted = {key: value for key, value in adapter_state_dict.items() if key not in strangers}
    pending: dict[tuple[str, str], WeightConverter] = {}
    for key in sorted(strangers, key=dot_natural_key):
        plain = key.removeprefix(_FILE_PREFIX)
        start = key[: len(key) - len(plain)]
        name, pattern = rename_source_key(plain, renamings, fusing)
        if pattern is not None:
            converter = pending.setdefault((start, name), deepcopy(converters[pattern]))
            converter.add_tensor(name, key, pattern, adapter_state_dict[key])
        else:
            converted[start + name if _owner(name, prefix) in modules else key] = adapter_state_dict[key]
    for (start, name), converter in pending.items():
        for key, value in converter.convert(name, model=base).items():
            converted[start + key] = value[0] if isinstance(value, list) else value
    return converted


def _owner(key: str, prefix: str) -> str:
    """The name, in the base model, of the module that a saved tensor belongs to."""
    plain = key.removeprefix(_FILE_PREFIX).replace(".base_layer.", ".")
    module, slot, _ = plain.partition(f".{prefix}")
    return module if slot else plain.rpartition(".")[0]


def _base_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ---- configs -------------------------------------------------------------------------------------------------------
def convert_peft_config_for_transformers(
    peft_config: PeftConfig, model: nn.Module, conversions: list[WeightConverter | WeightRenaming] | None
) -> None:
    """Make a config that names layers of single experts mean the stacked parameters that the model has in their place.

    In models alone that upstream does this in; in others names mean the layers that there are, such as shared experts.

    Args:
        peft_config: Config of an adapter, changed in place.
        model: The base model.
        conversions: What transformers does to the model's own files; without stacked experts nothing changes.

    Raises:
        ValueError: The config adapts only a part of what became one parameter, or its parts differently.
        NoMatchingPeftModuleError: It names nothing.
    """
    if _fusions(conversions) and _means_stacks(_base_model(model)):
        if peft_config.peft_type == PeftType.LORA and peft_config.target_modules is None:
            if not peft_config.target_parameters:
                raise NoMatchingPeftModuleError(
                    f"target_modules is not set, and {type(_base_model(model)).__name__}, whose experts are stacked, has no "
                    "defaults: set target_modules or target_parameters."
                )
            peft_config.target_modules = set()
        _convert_peft_config_moe(peft_config, model)


def convert_peft_config_for_saved_experts(
    peft_config: PeftConfig, model: nn.Module, saved: dict[str, torch.Tensor]
) -> None:
    """The same for an adapter that was saved with layers of single experts, in any model.

    Args:
        peft_config: Its config, changed in place.
        model: The base model.
        saved: Its tensors by saved name.

    Raises:
        ValueError: As in `convert_peft_config_for_transformers`.
    """
    patterns = [pattern for fusion in _fusions(get_model_conversion_mapping(model)) for pattern in fusion.patterns]
    single = [re.escape(pattern.replace("\\", "")).replace(r"\*", r"\d+") for pattern in patterns]
    if single and any(re.search(rf"(?:{'|'.join(single)})\.", key) for key in saved):
        _convert_peft_config_moe(peft_config, model)


def _means_stacks(base: nn.Module) -> bool:
    """Whether transformers lays the model's experts out after Mixtral's or Qwen2-MoE's."""
    kind = getattr(getattr(base, "config", None), "model_type", None)
    layouts = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return kind == "mixtral" or layouts.get(kind) in ("mixtral", "qwen2_moe")


def _convert_peft_config_moe(peft_config: PeftConfig, model: nn.Module) -> None:
    """`convert_peft_config_for_transformers` for a model with stacked experts; other packages replace it."""
    if peft_config.peft_type != PeftType.LORA or peft_config.target_modules is None:
        return
    base = _base_model(model)
    conversions = get_model_conversion_mapping(base)
    found: dict[str, dict[str, tuple[int, float]]] = {}
    former: set[str] = set()
    for fusion in _fusions(conversions):
        paths = _paths(base, fusion)
        parts = {path: _former_names(path, fusion, base, conversions) for path in paths}
        former.update(name for groups in parts.values() for names in groups for name in names)
        if any(_is_parameter_named(target, fusion) for target in peft_config.target_parameters or ()):
            continue  # converted before
        settings = {path: _common_settings(peft_config, fusion, groups) for path, groups in parts.items()}
        found[fusion.parameter] = {path: setting for path, setting in settings.items() if setting is not None}
        found[fusion.parameter] = _short_if_all(fusion.parameter, found[fusion.parameter], len(paths))
    everywhere = {path for fusion in _fusions(conversions) for path in _paths(base, fusion)}
    routers = _routers(base, peft_config, everywhere, conversions)
    _write_targets(peft_config, base, found, former, routers)


def _is_parameter_named(target: str, fusion: ExpertFusion) -> bool:
    return target.rsplit(".", 1)[-1] == fusion.parameter


def _paths(base: nn.Module, fusion: ExpertFusion) -> list[str]:
    """Names of the modules that hold a fusion's parameter."""
    ending = fusion.module if fusion.module.startswith(".") else f".{fusion.module}"
    return [
        name
        for name, module in base.named_modules()
        if f".{name}".endswith(ending) and isinstance(getattr(module, fusion.parameter, None), torch.Tensor)
    ]


def _former_paths(path: str, conversions: list[Any]) -> list[str]:
    """A module's name, and what it may have been called before transformers renamed it."""
    paths = {path}
    for conversion in conversions:
        if isinstance(conversion, WeightRenaming) and not isinstance(conversion, PrefixChange):
            renamed, pattern = conversion.reverse_transform().rename_source_key(f"{path}.")
            if pattern is not None:
                paths.add(renamed.removesuffix("."))
    return sorted(paths)


def _former_names(path: str, fusion: ExpertFusion, base: nn.Module, conversions: list[Any]) -> list[list[str]]:
    """What the layers that a parameter stacks may have been called: for each source and expert the possible names."""
    experts = getattr(base.get_submodule(path), fusion.parameter).shape[0]
    owners = _former_paths(path, conversions)
    return [
        [f"{owner}.{expert}.{source}" for owner in owners] for source in fusion.sources for expert in range(experts)
    ]


def _targets(config: PeftConfig, name: str) -> bool:
    """Whether a config targets a module that no longer exists, by its name."""
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    result = check_target_module_exists(config, name)
    if config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return not isinstance(result, _ExcludedModule)
    return bool(result)


def _common_settings(config: PeftConfig, fusion: ExpertFusion, groups: list[list[str]]) -> tuple[int, float] | None:
    """Rank and alpha of the adapter on the fused parameter, with the scaling of those on its parts; None without."""
    chosen = [next((name for name in names if _targets(config, name)), None) for names in groups]
    if not any(chosen):
        return None
    if not all(chosen):
        left_out = next(names[0] for names, name in zip(groups, chosen, strict=True) if name is None)
        raise ValueError(
            f"target_modules={config.target_modules!r} names {next(filter(None, chosen))} but not {left_out}, which "
            f"are one parameter, {fusion.parameter}, in this version of transformers: name both or neither."
        )
    settings = {
        (
            config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r),
            config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha),
        )
        for name in chosen
    }
    if len(settings) > 1:
        raise ValueError(
            f"rank_pattern and alpha_pattern give {' and '.join(fusion.sources)} of {groups[0][0].rsplit('.', 2)[0]} "
            f"different ranks or alphas, {sorted(settings)}, but they are one parameter, {fusion.parameter}, in this "
            "version of transformers: give them the same."
        )
    rank, alpha = settings.pop()
    parts = len(fusion.sources)  # their A are stacked, so the rank grows, and the scaling must not
    growth = math.sqrt(parts) if config.use_rslora and parts > 1 else parts
    return parts * rank, growth * alpha


def _short_if_all(parameter: str, settings: dict[str, tuple[int, float]], layers: int) -> dict[str, tuple[int, float]]:
    """Settings by the parameter's name alone if all layers have the same, else by its full name in each layer."""
    if len(settings) == layers and len(set(settings.values())) == 1:
        return {parameter: next(iter(settings.values()))}
    return {f"{path}.{parameter}": setting for path, setting in settings.items()}


def _routers(base: nn.Module, config: PeftConfig, paths: set[str], conversions: list[Any]) -> dict[str, list[str]]:
    """Targeted modules beside stacked experts that were linear layers and now only hold a weight, with former names."""
    parents = {path.rpartition(".")[0] for path in paths}
    names = {
        name: _former_paths(name, conversions)
        for name, module in base.named_modules()
        if name.rpartition(".")[0] in parents
        and not isinstance(module, nn.Linear)
        and getattr(module._parameters.get("weight"), "ndim", 0) == 2
    }
    return {name: former for name, former in names.items() if any(_targets(config, old) for old in former)}


def _write_targets(
    config: PeftConfig,
    base: nn.Module,
    found: dict[str, dict[str, tuple[int, float]]],
    former: set[str],
    routers: dict[str, list[str]],
) -> None:
    """Put what was found into a config and take the names of what is gone out of it."""
    parameters = list(config.target_parameters or ())
    for settings in found.values():
        for name, (rank, alpha) in settings.items():
            parameters.append(name)
            pattern = rf".*\.{name}" if "." not in name else name
            if rank != config.r:
                config.rank_pattern = {**config.rank_pattern, pattern: rank}
            if alpha != config.lora_alpha:
                config.alpha_pattern = {**config.alpha_pattern, pattern: alpha}
    weights = dict.fromkeys(f"{name.rsplit('.', 1)[-1]}.weight" for name in routers)
    parameters += [name for name in weights if name not in parameters]
    before, config.target_parameters = list(config.target_parameters or ()), parameters
    if parameters == before:
        return
    present = [name for name, _ in base.named_modules() if name not in routers]
    if isinstance(config.target_modules, str):
        if routers and config.target_modules != INCLUDE_LINEAR_LAYERS_SHORTHAND:
            config.target_modules = {name for name in present if _targets(config, name)}
        return
    gone = former.union(*routers.values())
    config.target_modules = {
        target for target in config.target_modules if _ends_one_of(target, present) or not _ends_one_of(target, gone)
    }


def _ends_one_of(target: str, names: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)
