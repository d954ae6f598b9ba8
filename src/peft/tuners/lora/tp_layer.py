# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA and DoRA on Megatron-core's tensor-parallel linear layers, whose weight is cut into one shard a rank.

A column-parallel layer keeps rows of W `[out / ranks, in]`: A is whole on every rank, B is cut as W is. A row-parallel
layer keeps columns `[out, in / ranks]`: A is cut as W is, B is whole. Each rank's shard of s·BA is then the product of
what it holds. DoRA's norm of a row is that of the whole row: its shards' squares are summed over the ranks.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from peft import dora
from peft.engine.layer import BaseTunerLayer

from .inits.plain import reset_linear
from .layer.base import LoraLayer
from .layer.linear import LoraLinearBase
from .variants.dora import DoraLinearVariant, Kept

if TYPE_CHECKING:
    from .config import LoraConfig
    from .layer.variant import LoraVariant

_EXTRA = "_extra_state"  # a key that Megatron's modules write for checkpoints of its own; it holds nothing


class LoraParallelLinear(LoraLinearBase):
    """LoRA on a `ColumnParallelLinear` or `RowParallelLinear`. Called, it gives an output and a bias, as these do.

    Args:
        base_layer: The layer to adapt.
        adapter_name: Name of the first adapter.
        config: Its settings.
        backend: The module with Megatron's parallel layers, `megatron.core.tensor_parallel`.
        r: Its rank.
        lora_alpha: Numerator of its scaling.
        is_target_conv_1d_layer: Taken for compatibility.
        **kwargs: `megatron_config`, Megatron's transformer config.

    Raises:
        ValueError: The config asks for `fan_in_fan_out`, a start that reads the whole weight, or a variant but DoRA.
    """

    known_starts = frozenset()

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        backend: Any,
        r: int = 0,
        lora_alpha: int = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        if config.fan_in_fan_out:
            raise ValueError("fan_in_fan_out=True: Megatron's parallel layers store [out, in]; set it False.")
        self.backend = backend
        self.is_parallel_a = isinstance(base_layer, backend.RowParallelLinear)
        self.is_target_conv_1d_layer = is_target_conv_1d_layer
        self.megatron_config = kwargs.get("megatron_config") or base_layer.config
        self._active_adapter = adapter_name
        self.register_state_dict_post_hook(_drop_extra_state)
        self.register_load_state_dict_pre_hook(_add_extra_state)
        self.update_layer(
            adapter_name, r, lora_alpha=lora_alpha, config=config, inference_mode=config.inference_mode,
            init_method=getattr(self.megatron_config, "init_method", None) or nn.init.xavier_normal_,
            input_is_parallel=getattr(base_layer, "input_is_parallel", True),
            gather_output=getattr(base_layer, "gather_output", False),
        )  # fmt: skip

    @staticmethod
    def _features(base_layer: nn.Module) -> tuple[int, int]:
        return base_layer.input_size, base_layer.output_size

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        return {(): None, ("use_dora",): DoraParallelLinearVariant}

    # ---- ranks -----------------------------------------------------------------------------------------------------
    @property
    def _group(self) -> distributed.ProcessGroup | None:
        """The ranks that hold the weight's shards; None without tensor parallelism."""
        group = getattr(self.get_base_layer(), "tp_group", None)
        if group is None:
            package = self.backend.__name__.rpartition(".")[0]
            group = importlib.import_module(f"{package}.parallel_state").get_tensor_model_parallel_group()
        return group if distributed.is_initialized() and distributed.get_world_size(group) > 1 else None

    def whole_norm(self, norm: torch.Tensor) -> torch.Tensor:
        """Norms `[out]` of whole rows from those of this rank's shards; a column-parallel layer has whole rows."""
        group = self._group
        if not self.is_parallel_a or group is None:
            return norm
        squares = norm.square()
        distributed.all_reduce(squares, group=group)
        return squares.sqrt()

    def dora_norm(self, name: str) -> torch.Tensor:
        return self.whole_norm(super().dora_norm(name))

    def whole_rows(self, vector: torch.Tensor) -> torch.Tensor:
        """A vector by output feature for the output as it leaves the layer: gathered where that is."""
        if self.is_parallel_a or not getattr(self.get_base_layer(), "gather_output", False):
            return vector
        return self.backend.gather_from_tensor_model_parallel_region(vector)

    # ---- adapters --------------------------------------------------------------------------------------------------
    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: int,
        config: LoraConfig,
        init_method: Any = nn.init.xavier_normal_,
        input_is_parallel: bool = True,
        gather_output: bool = False,
        inference_mode: bool = False,
        **parallel_linear_kwargs: Any,
    ) -> None:
        """Create an adapter; see `LoraLayer.update_layer`.

        Args:
            adapter_name: Its name.
            r: Rank.
            lora_alpha: Numerator of the scaling.
            config: The rest of its settings.
            init_method: Start of the cut factor where `init_lora_weights` leaves it alone.
            input_is_parallel: Whether a row-parallel layer gets its shard of the input.
            gather_output: Whether a column-parallel layer gives the whole output.
            inference_mode: Taken for compatibility; the config's counts.
            **parallel_linear_kwargs: Further arguments of the cut factor's constructor.
        """
        settings = {"init_method": init_method, "config": self.megatron_config, **parallel_linear_kwargs}
        settings.pop("target_name", None)
        if self.is_parallel_a:
            settings |= {"input_is_parallel": input_is_parallel, "skip_bias_add": True}
        else:
            settings |= {"gather_output": gather_output}
        self._cut_settings = settings
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _create_factors(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        if self.is_parallel_a:
            a = self.backend.RowParallelLinear(self.in_features, r, bias=False, **self._cut_settings)
            b = whole = nn.Linear(r, self.out_features, bias=lora_bias)
        else:
            a = whole = nn.Linear(self.in_features, r, bias=False)
            b = self.backend.ColumnParallelLinear(r, self.out_features, bias=lora_bias, **self._cut_settings)
        whole.to(self.get_base_layer().weight.device)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = a, b
        for parameter in whole.parameters():  # Megatron adds up the gradients of such parameters over the ranks
            parameter.sequence_parallel = getattr(self.megatron_config, "sequence_parallel", False)
        self._share(whole)

    def _share(self, whole: nn.Module) -> None:
        """Give every rank the first one's values of a factor that is not cut."""
        if self._group is not None:
            for parameter in whole.parameters():
                source = distributed.get_global_rank(self._group, 0)
                distributed.broadcast(parameter.data, source, group=self._group)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Fill A and B as those of an uncut layer, each rank with its shard."""
        a, b, r = self.lora_A[adapter_name], self.lora_B[adapter_name], self.r[adapter_name]
        if init_lora_weights is False or a.weight.is_meta:
            return
        whole_a = nn.Linear(self.in_features, r, bias=False, device=a.weight.device)
        reset_linear(whole_a, b, r, init_lora_weights)
        self._share(whole_a)
        width = a.weight.shape[1]
        start = distributed.get_rank(self._group) * width if width < self.in_features else 0
        a.weight.data.copy_(whole_a.weight[:, start : start + width])

    # ---- forward ---------------------------------------------------------------------------------------------------
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output, and the bias where Megatron leaves its addition to the caller.

        Raises:
            ValueError: `adapter_names` is given: Megatron's batches have the sequence first.
        """
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(
                "adapter_names is not possible on tensor-parallel layers, whose inputs have the sequence first."
            )
        self._adapter_kwargs(kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        y, bias = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y, bias
        dtype = y.dtype
        for name in self.active_adapters:
            if self.has_adapter(name):
                y = self.method(name).apply(self, name, x, y)
        return y.to(dtype), bias

    def low_rank_of_dropped(self, name: str, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
        return _output(self.lora_B[name](_output(self.lora_A[name](x))))

    def added_bias(self) -> torch.Tensor | None:
        """The bias that is part of the base layer's output, for the output as it leaves the layer."""
        base = self.get_base_layer()
        return None if base.bias is None or base.skip_bias_add else self.whole_rows(base.bias)

    def base_product(self, x: torch.Tensor) -> torch.Tensor:
        y, bias = _output(self.base_layer(x)), self.added_bias()
        return y if bias is None else y - bias.to(y.dtype)


class DoraParallelLinearVariant(DoraLinearVariant):
    """DoRA on parallel layers: the magnitude is cut as the rows are, `[out / ranks]`, or whole where columns are cut."""

    @classmethod
    def init(cls, module: LoraParallelLinear, adapter_name: str, config: Any = None, **kwargs: Any) -> None:
        holder = cls.holder(fan_in_fan_out=False)
        a, b = module.factors(adapter_name)
        weight = module.get_base_layer().weight
        if a.is_meta or weight.is_meta:
            norm = torch.empty(weight.shape[0], device="meta", dtype=a.dtype)
        else:
            with torch.no_grad():
                shard = dora.row_norm(module.norm_weight(), a, b, module.scaling[adapter_name])
                norm = module.whole_norm(shard).to(device=a.device, dtype=a.dtype)
        holder.set_magnitude(norm)
        holder.weight.sequence_parallel = module.is_parallel_a and getattr(
            module.megatron_config, "sequence_parallel", False
        )
        module.lora_magnitude_vector[adapter_name] = holder

    @staticmethod
    def forward(
        module: LoraParallelLinear, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        magnitude = module.whole_rows(module.lora_magnitude_vector[active_adapter].weight)
        norm = module.whole_rows(module.dora_norm(active_adapter))
        scaling, dropout = module.scaling[active_adapter], module.lora_dropout[active_adapter]
        if isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0.0:
            low_rank = module.low_rank(active_adapter, x)
            return dora.compose(
                result, low_rank, magnitude=magnitude, norm=norm, scaling=scaling, bias=module.added_bias()
            )
        dropped = dropout(module._cast_input_dtype(x, module.lora_A[active_adapter].weight.dtype))
        base = module.base_product(dropped.to(x.dtype))
        gain = dora.gain(magnitude, norm)
        return result + (gain - 1) * base + gain * scaling * module.low_rank_of_dropped(active_adapter, dropped)

    @staticmethod
    def _keep(layer: LoraParallelLinear, name: str, weight: torch.Tensor) -> Kept:
        norm = layer.whole_norm(torch.linalg.norm(weight + layer.fold_delta(name).to(weight), dim=1))
        gain = dora.gain(layer.lora_magnitude_vector[name].weight.detach().to(norm), norm)
        dead = torch.nonzero(gain == 0).flatten()
        return Kept(gain, dead, weight[dead].clone())


def _output(result: Any) -> torch.Tensor:
    """What a layer computes, without the bias that Megatron's layers give beside it."""
    return result[0] if isinstance(result, tuple) else result


def _drop_extra_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}lora_") and key.endswith(_EXTRA)]:
        del state_dict[key]


def _add_extra_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """So that Megatron's factors do not miss a key that files of adapters do not have."""
    for slot in ("lora_A", "lora_B"):
        for name, factor in getattr(module, slot).items():
            if type(factor).get_extra_state is not nn.Module.get_extra_state:
                state_dict.setdefault(f"{prefix}{slot}.{name}.{_EXTRA}", None)


def get_default_module_allowlist() -> list[str]:
    """Packages whose path may stand in `LoraConfig.megatron_core`, which is imported."""
    return ["megatron"]


def dispatch_megatron(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """A LoRA layer around one of Megatron's parallel layers; None for any other, or without `megatron_config`.

    Args:
        target: Layer to adapt.
        adapter_name: Name of the adapter.
        config: Its settings; `megatron_config` holds the arguments of Megatron's transformer config.
        **kwargs: Rank, `lora_alpha` and what else the layer takes.

    Raises:
        ImportError: `megatron_core` cannot be imported.
        ValueError: It is not a path into a package of `get_default_module_allowlist`.
    """
    if not config.megatron_config:
        return None
    core = import_megatron_core(config.megatron_core)
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    backend = importlib.import_module(f"{core.__name__}.tensor_parallel")
    if not isinstance(base, (backend.ColumnParallelLinear, backend.RowParallelLinear)):
        return None
    settings = config.megatron_config
    if isinstance(settings, dict):
        module = importlib.import_module(f"{core.__name__}.transformer.transformer_config")
        settings = module.TransformerConfig(**settings)
    return LoraParallelLinear(
        target, adapter_name, config=config, backend=backend, **{**kwargs, "megatron_config": settings}
    )


def import_megatron_core(path: str) -> Any:
    """The module of Megatron's core; see `dispatch_megatron` for what it raises."""
    allowed = get_default_module_allowlist()
    if path.split(".")[0] not in allowed:
        raise ValueError(
            f"megatron_core={path!r}: a file's config could name any module to import here, so only those in "
            f"{', '.join(allowed)} are; add the package to what "
            "peft.tuners.lora.tp_layer.get_default_module_allowlist returns if you trust it."
        )
    try:
        return importlib.import_module(path)
    except ImportError as error:
        raise ImportError(
            f"megatron_config needs megatron_core={path!r}, which cannot be imported ({error}): pip install megatron-core."
        ) from error
