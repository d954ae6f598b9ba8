# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""EVA (Paischl et al., arXiv 2410.07170): A starts as the principal directions of the layers' inputs, ranks follow them."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from peft.utils.incremental_pca import IncrementalPCA
from peft.utils.other import _get_submodules, get_pattern_key
from peft.utils.warning import PeftWarning
from peft.weights import find_weight

from .config import LoraConfig
from .inits.calibration import linear_targets
from .layer import Embedding, LoraLayer, MultiheadAttention, ParamWrapper, _ConvNd

UNSUPPORTED_LORA_MODULES = (Embedding, MultiheadAttention, _ConvNd)
_NOT_LINEAR = (*UNSUPPORTED_LORA_MODULES, ParamWrapper)
_MOST_PASSES = 100  # over the data, after which layers that have not converged are taken as they are


class _Hook:
    """A forward hook that looks at a layer's input.

    Args:
        name: Name of the layer.
        prepare_layer_inputs_fn: Turns a layer's input into `[tokens, in]`; None to flatten it.
        gather_distributed_inputs: Whether to join the inputs of all processes.
    """

    def __init__(
        self,
        name: str,
        prepare_layer_inputs_fn: Callable[..., Any] | None = None,
        gather_distributed_inputs: bool = True,
    ) -> None:
        self.name = name
        self.gather_distributed_inputs = gather_distributed_inputs
        self._prepare_fn = prepare_layer_inputs_fn
        self.model_input: Any = None

    def prepare_layer_inputs(self, layer_input: Any) -> torch.Tensor:
        """The layer's input as rows `[tokens, in]`."""
        if self._prepare_fn is not None:
            return self._prepare_fn(layer_input, self.model_input, self.name)
        tensor = layer_input[0] if isinstance(layer_input, tuple) else layer_input
        return tensor.reshape(-1, tensor.shape[-1])

    @torch.no_grad()
    def gather_layer_inputs(self, layer_input: torch.Tensor) -> torch.Tensor:
        """The rows of all processes; these processes' own where there is one or gathering is off."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or not self.gather_distributed_inputs:
            return layer_input
        count = torch.tensor([len(layer_input)], device=layer_input.device)
        counts = [torch.zeros_like(count) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(counts, count)
        most = int(max(counts))
        padded = torch.nn.functional.pad(layer_input, (0, 0, 0, most - len(layer_input))).contiguous()
        gathered = [torch.zeros_like(padded) for _ in counts]
        torch.distributed.all_gather(gathered, padded)
        return torch.cat([rows[: int(n)] for rows, n in zip(gathered, counts, strict=True)])


class SVDHook(_Hook):
    """Follows the principal directions of a layer's inputs until they stay what they are.

    Args:
        n_components: Number of directions.
        sim_thresh: They have converged when each one's cosine to its former self is at least this.
        **base_class_kwargs: As for the other hook.
    """

    def __init__(self, n_components: int, sim_thresh: float | torch.Tensor, **base_class_kwargs: Any) -> None:
        super().__init__(**base_class_kwargs)
        self.n_components, self.sim_thresh = n_components, sim_thresh
        self.svd = IncrementalPCA(n_components=n_components, copy=True, lowrank=True, lowrank_seed=42)
        self.converged = torch.zeros(n_components, dtype=torch.bool)
        self._waiting: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        rows = self.gather_layer_inputs(self.prepare_layer_inputs(args)).float()
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) < self.n_components:
            return  # a step needs at least as many rows as there are directions
        rows, self._waiting = torch.cat(self._waiting), []
        before = getattr(self.svd, "components_", None)
        self.svd.partial_fit(rows)
        if before is not None:
            cosine = torch.nn.functional.cosine_similarity(before, self.svd.components_)
            self.converged = (cosine >= self.sim_thresh).cpu()


class HashHook(_Hook):
    """Notes hashes of a layer's inputs, so that layers with the same inputs are found."""

    def __init__(self, **base_class_kwargs: Any) -> None:
        super().__init__(**base_class_kwargs)
        self.hashed_inputs: list[int] = []

    @staticmethod
    def hash_fn(tensor: torch.Tensor) -> int:
        return hash(tuple(tensor.reshape(-1).tolist()))

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.hashed_inputs.append(self.hash_fn(self.gather_layer_inputs(self.prepare_layer_inputs(args)).cpu()))


def find_equal_values(dictionary: Mapping[str, Hashable]) -> dict[Hashable, list[str]]:
    """The keys of each value that several keys have."""
    keys = defaultdict(list)
    for key, value in dictionary.items():
        keys[value].append(key)
    return {value: names for value, names in keys.items() if len(names) > 1}


def get_device_with_meta_params(model: nn.Module) -> torch.device:
    """The device of the model's parameters, those on the meta device left out.

    Raises:
        ValueError: The parameters are on several devices.
    """
    devices = list({parameter.device for parameter in model.parameters() if parameter.device.type != "meta"})
    if len(devices) > 1:
        raise ValueError(f"The model is on several devices ({', '.join(map(str, devices))}): EVA needs it on one.")
    return devices[0] if devices else torch.device("meta")


def move_inputs_to_device(inputs: Any, device: str | torch.device) -> Any:
    """Nested dicts, lists and tuples of tensors, with the tensors on a device."""
    if isinstance(inputs, Mapping):
        return {key: move_inputs_to_device(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(move_inputs_to_device(value, device) for value in inputs)
    return inputs.to(device) if hasattr(inputs, "to") else inputs


def prepare_model_inputs_fn_language_modeling(
    model_input: dict[str, torch.Tensor], peft_config: LoraConfig
) -> torch.Tensor:
    """Indices `[tokens, 2]` (row, position) of the tokens to look at.

    Args:
        model_input: A batch: `input_ids` or another tensor of that shape, `attention_mask` and `labels` if it has them.
        peft_config: Its `eva_config` says whether tokens without a label are left out.
    """
    settings = peft_config.eva_config
    like = model_input["input_ids"] if "input_ids" in model_input else next(iter(model_input.values()))
    mask = model_input.get("attention_mask", torch.ones_like(like)).bool()
    if settings.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != settings.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(
    layer_input: torch.Tensor | tuple[torch.Tensor, ...], model_input: torch.Tensor, layer_name: str
) -> torch.Tensor:
    """The rows `[tokens, in]` of a layer's input `[batch, length, in]` at the indices of the function above."""
    if isinstance(layer_input, (tuple, list)):
        layer_input = layer_input[0]
    return layer_input[model_input[:, 0], model_input[:, 1]]


def forward_fn_dict(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Call a model with a batch's entries as keyword arguments."""
    return model(**inputs)


# ---- the directions ------------------------------------------------------------------------------------------------
@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Mapping[str, Callable[..., Any]]
    | Callable[..., Any]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, torch.Tensor]:
    """The start of A `[rank, in]` of each targeted layer, by the layer's name; some ranks may be 0.

    Ranks are handed to the directions that explain most of their layer's input, at most `rho · r` a layer, together as
    many as the config gives out.

    Args:
        model: Base model, or one with a LoRA adapter, whose update is left out while inputs are looked at.
        dataloader: Batches for `forward_fn`; it is run through until the directions have converged.
        peft_config: The config, where `model` has none.
        forward_fn: Calls the model with a batch.
        prepare_model_inputs_fn: Called with a batch and the config before each forward pass; what it returns is given
            to `prepare_layer_inputs_fn`.
        prepare_layer_inputs_fn: Turns a layer's input into rows, given `(input, that, layer name)`: one function, or
            one for each layer's name. None to flatten the input.
        adapter_name: The adapter, where `model` has one.
        gather_distributed_inputs: Join the inputs of all processes.
        show_progress_bar: Show how many layers have converged.

    Raises:
        ValueError: There is no config with `eva_config`, it targets no linear layer, or the data are empty.
    """
    config = peft_config if peft_config is not None else getattr(model, "peft_config", {}).get(adapter_name)
    if config is None or config.eva_config is None:
        raise ValueError("There is no config with eva_config: set init_lora_weights='eva' and pass peft_config.")
    if config.eva_config.rho < 1.0:
        raise ValueError(f"eva_config.rho={config.eva_config.rho} must be at least 1.")
    layers = _layers(model, config, adapter_name)
    if not layers:
        raise ValueError("The config targets no linear layer of this model: EVA works on linear layers alone.")
    ranks = {name: _rank(name, config) for name in layers}
    functions = prepare_layer_inputs_fn if isinstance(prepare_layer_inputs_fn, Mapping) else None

    def options(name: str) -> dict[str, Any]:
        function = prepare_layer_inputs_fn if functions is None else functions.get(name)
        return {
            "name": name,
            "prepare_layer_inputs_fn": function,
            "gather_distributed_inputs": gather_distributed_inputs,
        }

    def run(batch: Any, hooks: Mapping[str, _Hook]) -> None:
        batch = move_inputs_to_device(batch, get_device_with_meta_params(model))
        prepared = None if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, config)
        handles = []
        for name, hook in hooks.items():
            hook.model_input = prepared
            handles.append(layers[name].register_forward_hook(hook))
        try:
            forward_fn(model, batch)
        finally:
            for handle in handles:
                handle.remove()

    training = model.training
    model.eval()
    try:
        with _adapter_off(model):
            hashes = {name: HashHook(**options(name)) for name in layers}
            run(_first(dataloader), hashes)
            equal = find_equal_values({name: tuple(hook.hashed_inputs) for name, hook in hashes.items()})
            stands_for = {other: names[0] for names in equal.values() for other in names}
            needed: dict[str, int] = {}
            for name, r in ranks.items():
                key = stands_for.get(name, name)
                needed[key] = max(
                    needed.get(key, 0), min(round(r * config.eva_config.rho), find_weight(layers[name]).shape[1])
                )
            hooks = {name: SVDHook(n, config.eva_config.tau, **options(name)) for name, n in needed.items()}
            _run_until_converged(hooks, dataloader, run, show_progress_bar)
    finally:
        model.train(training)
    found = {name: hooks[stands_for.get(name, name)].svd for name in layers}
    return _distribute(found, ranks, config)


def _first(dataloader: Iterable[Any]) -> Any:
    for batch in dataloader:
        return batch
    raise ValueError("dataloader is empty: EVA needs batches to look at.")


def _run_until_converged(
    hooks: dict[str, SVDHook], dataloader: Iterable[Any], run: Callable[..., None], show_progress_bar: bool
) -> None:
    left = dict(hooks)
    with tqdm(total=len(hooks), desc="EVA", disable=not show_progress_bar) as progress:
        for _, batch in itertools.product(range(_MOST_PASSES), dataloader):
            run(batch, left)
            left = {name: hook for name, hook in left.items() if not bool(hook.converged.all())}
            progress.update(len(hooks) - len(left) - progress.n)
            if not left:
                return
    missing = [name for name, hook in left.items() if not hasattr(hook.svd, "components_")]
    if missing:
        raise ValueError(
            f"The data have fewer tokens than directions are asked for in {missing[0]}: pass more batches, or lower r or "
            "eva_config.rho."
        )
    warnings.warn(
        f"The directions of {len(left)} layers still moved after {_MOST_PASSES} passes over the data; they are taken as "
        "they are. Lower eva_config.tau to stop sooner.",
        PeftWarning,
        stacklevel=3,
    )


def _distribute(
    found: dict[str, IncrementalPCA], ranks: dict[str, int], config: LoraConfig
) -> dict[str, torch.Tensor]:
    """Keep as many directions as there are ranks, those of the largest share of explained variance first."""
    most = {name: min(round(r * config.eva_config.rho), len(found[name].components_)) for name, r in ranks.items()}
    shares = [
        (float(share), name) for name, pca in found.items() for share in pca.explained_variance_ratio_[: most[name]]
    ]
    shares.sort(key=lambda entry: entry[0], reverse=True)
    kept = Counter(name for _, name in shares[: sum(ranks.values())])
    state = {}
    for name, pca in found.items():
        directions = pca.components_[: kept[name]]
        if config.eva_config.whiten:
            directions = directions / pca.singular_values_[: kept[name], None].sqrt()
        state[name] = directions.clone()
    return state


def _rank(name: str, config: LoraConfig) -> int:
    plain = name.removeprefix("base_model.model.")
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), plain), config.r)


def _layers(model: nn.Module, config: LoraConfig, adapter_name: str) -> dict[str, nn.Module]:
    """The base layers to look at, by the name of the adapted layer or of the layer itself."""
    adapted = {
        name: module.get_base_layer()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and module.has_adapter(adapter_name) and not isinstance(module, _NOT_LINEAR)
    }
    return adapted or dict(linear_targets(model, config))


def _adapter_off(model: nn.Module) -> Any:
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


# ---- putting them in -----------------------------------------------------------------------------------------------
@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, torch.Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Mapping[str, Callable[..., Any]]
    | Callable[..., Any]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start the A of a LoRA adapter with `init_lora_weights="eva"` from directions of its inputs, in place.

    Layers get the rank of their directions, and those of rank 0 lose the adapter; the config follows, so that the
    adapter can be saved and loaded.

    Args:
        model: Model with the adapter.
        dataloader: Batches, see `get_eva_state_dict`; not needed with `eva_state_dict`.
        eva_state_dict: What `get_eva_state_dict` returned.
        forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, gather_distributed_inputs, show_progress_bar: As
            there.
        adapter_name: Name of the adapter.

    Raises:
        ValueError: There is no such adapter, it is not an EVA adapter, neither data nor directions are given, or the
            directions are not those of its layers.
    """
    config = model.peft_config.get(adapter_name)
    if config is None:
        raise ValueError(f"There is no adapter {adapter_name!r}; present: {', '.join(model.peft_config)}.")
    if config.init_lora_weights != "eva":
        raise ValueError(f"Adapter {adapter_name!r} has init_lora_weights={config.init_lora_weights!r}, not 'eva'.")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("Pass a dataloader, or the eva_state_dict that get_eva_state_dict made from one.")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            forward_fn=forward_fn,
            prepare_model_inputs_fn=prepare_model_inputs_fn,
            prepare_layer_inputs_fn=prepare_layer_inputs_fn,
            adapter_name=adapter_name,
            gather_distributed_inputs=gather_distributed_inputs,
            show_progress_bar=show_progress_bar,
        )
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer) and m.has_adapter(adapter_name)}
    linear = {name: m for name, m in layers.items() if not isinstance(m, _NOT_LINEAR)}
    missing = [name for name in linear if name not in eva_state_dict]
    if missing:
        raise ValueError(f"eva_state_dict has no entry for {missing[0]}: it is another model's or adapter's.")
    for name, layer in linear.items():
        _load(model, name, layer, adapter_name, eva_state_dict[name], config)
    _update_config(
        config, {name: layer for name, layer in layers.items() if layer.has_adapter(adapter_name)}, adapter_name
    )


def _load(
    model: nn.Module, name: str, layer: LoraLayer, adapter_name: str, directions: torch.Tensor, config: LoraConfig
) -> None:
    rank = len(directions)
    if rank == 0:
        layer.delete_adapter(adapter_name)
        if not layer._all_available_adapter_names():
            parent, _, child = _get_submodules(model, name)
            setattr(parent, child, layer.base_layer)
        return
    old = layer.r[adapter_name]
    if rank != old:
        alpha = layer.lora_alpha[adapter_name]
        if config.eva_config.adjust_scaling_factors:
            alpha *= rank / old
        # a new adapter of that rank at its plain start: what its start would read does not matter, A is set below
        layer.update_layer(adapter_name, rank, lora_alpha=alpha, config=config)
    layer.lora_A[adapter_name].weight.copy_(directions)


def _update_config(config: LoraConfig, layers: dict[str, LoraLayer], adapter_name: str) -> None:
    """Write the layers' names, ranks and alphas into the config."""
    plain = {}
    for name, layer in layers.items():
        name = name.removeprefix("base_model.model.")
        if isinstance(layer, ParamWrapper):  # stays in target_parameters
            name = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
        plain[name] = layer
    config.target_modules = [name for name, layer in plain.items() if not isinstance(layer, ParamWrapper)]
    config.rank_pattern = {n: layer.r[adapter_name] for n, layer in plain.items() if layer.r[adapter_name] != config.r}
    config.alpha_pattern = {
        n: layer.lora_alpha[adapter_name]
        for n, layer in plain.items()
        if not math.isclose(layer.lora_alpha[adapter_name], config.lora_alpha)
    }
