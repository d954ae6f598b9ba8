# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What every LoRA layer has: the slots A, B, magnitude, scaling and dropout, and how an adapter comes into them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft import dora
from peft.engine.devices import apart_from_base
from peft.engine.machine import AdapterLayer
from peft.engine.method import Method
from peft.utils.warning import PeftWarning
from peft.weights import find_weight, present, shards_of, whole

from .. import inits
from ..method import LORA

if TYPE_CHECKING:
    from ..config import LoraConfig
    from .parallel import Split
    from .variant import LoraVariant

# What in a config asks for a variant; `init_lora_weights="mica"` does too.
VARIANT_OPTIONS = (
    "use_dora",
    "arrow_config",
    "use_bdlora",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
VARIANT_KWARG_KEYS = ["alora_offsets"]  # arguments of a forward pass that belong to variants


class LoraLayer(AdapterLayer):
    """Mixin of the layers that hold LoRA adapters.

    Args:
        base_layer: The layer to adapt.
        ephemeral_gpu_offload: Do heavy one-off computations on an accelerator when the weight is on the CPU.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")

    weight_axis = 0  # which axis of the base weight, as the base layer stores it, counts output features
    channel_dim = -1  # which axis of an output does
    fan_in_fan_out = False
    knows_qalora = False

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        for slot in ("lora_dropout", "lora_A", "lora_B"):
            setattr(self, slot, nn.ModuleDict())
        for slot in ("lora_embedding_A", "lora_embedding_B"):
            setattr(self, slot, nn.ParameterDict())
        self.lora_magnitude_vector = nn.ModuleDict()
        self.use_rslora: dict[str, bool] = {}
        self.use_dora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        self.lora_variant: dict[str, LoraVariant] = {}
        self._use_dora_triton: dict[str, bool] = {}
        self._norm_caches: dict[str, dora.NormCache] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.ephemeral_gpu_offload = ephemeral_gpu_offload
        self.cast_input_dtype_enabled = True
        self.kwargs = kwargs
        self.in_features, self.out_features = self._features(self.get_base_layer())

    @staticmethod
    def _features(base_layer: nn.Module) -> tuple[int, int]:
        """Input and output features of the base layer."""
        for source, target in (("in_features", "out_features"), ("in_channels", "out_channels"), ("nx", "nf")):
            if hasattr(base_layer, source) and hasattr(base_layer, target):
                return getattr(base_layer, source), getattr(base_layer, target)
        if isinstance(base_layer, nn.Embedding):
            return base_layer.num_embeddings, base_layer.embedding_dim
        out_features, in_features = find_weight(base_layer).shape
        return in_features, out_features

    # ---- what each kind of layer answers ---------------------------------------------------------------------------
    def _create_factors(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        """Put new A and B into their slots; `reset_lora_parameters` fills them."""
        raise NotImplementedError

    def low_rank(self, name: str, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """B A d(x) with the adapter's dropout d, and B's bias where it has one; not scaled.

        Args:
            name: The adapter.
            x: The layer's input.
            y: The base layer's output; where that is a part of the features (tensor parallelism), the result is too.
        """
        x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
        return self.low_rank_of_dropped(name, self.lora_dropout[name](x), y)

    def low_rank_of_dropped(self, name: str, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """As `low_rank`, of an input that dropout has been applied to."""
        x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
        split = None if y is None else self.split(x, y)
        if split is not None:
            return split.low_rank(x, *self.factors(name), self.low_rank_bias(name))
        return self.lora_B[name](self.lora_A[name](x))

    def split(self, x: torch.Tensor, y: torch.Tensor) -> Split | None:
        """This process's part of the layer under tensor parallelism, None where input and output are whole."""
        return None

    def base_product(self, x: torch.Tensor) -> torch.Tensor:
        """The base layer's output without its bias."""
        y = self.call_base(x)
        bias = self.bias_to_compose(y)
        return y if bias is None else y - self._along_channels(bias.to(y.dtype), y)

    def bias_to_compose(self, y: torch.Tensor) -> torch.Tensor | None:
        """The base layer's bias `[out]` as it is in an output `y`, read from where it is kept while the layer does not
        run, gathered where it is sharded apart from this layer.

        Raises:
            ValueError: It is trained, and its gradient would not find its way back to the shards.
        """
        base = self.get_base_layer()
        bias = self._base_bias()
        shards = None if bias is None else shards_of(base, "bias")
        if shards is None:
            return bias if bias is None or not bias.is_meta else present(base, "bias")  # offloaded
        if shards.local.numel() == y.shape[self.channel_dim]:
            return bias.to_local()  # split as the output is
        if bias.requires_grad:
            raise ValueError(
                "DoRA with bias='lora_only' or 'all': the base layer is a shard unit of its own, so that its trained "
                "bias is gone once it has run. Shard the block around it, not the layer, or set bias='none'."
            )
        return whole(base, "bias")

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A `[r, in]` and B `[out, r]` as matrices that match the rows of the base weight."""
        return whole(self.lora_A[name]), whole(self.lora_B[name])

    def factor_modules(self, name: str) -> tuple[nn.Module, ...]:
        """The modules that hold A and B, where they are modules."""
        return (self.lora_A[name], self.lora_B[name]) if name in self.lora_A else ()

    def norm_weight(self) -> Any:
        """The base weight as `peft.dora` reads it: one row an output feature."""
        return find_weight(self.get_base_layer(), fan_in_fan_out=self.fan_in_fan_out)

    def as_stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix `[out, in]` that matches the rows of the base weight, in the shape that the base layer stores."""
        return matrix

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What the adapter adds to the base weight, in the shape that the base layer stores and in B's dtype."""
        slot = self.lora_B if adapter in self.lora_B else self.lora_embedding_B
        return self.fold_delta(adapter).to(_first_parameter(slot[adapter]).dtype)

    def fold_delta(self, name: str) -> torch.Tensor:
        """What folding adds to the weight that `_read_base` gives."""
        variant = self.lora_variant.get(name)
        return variant.delta(self, name) if hasattr(variant, "delta") else self.low_rank_delta(name)

    def low_rank_delta(self, name: str) -> torch.Tensor:
        """`scaling · B A` in the shape of the base weight, in the precision that additions are done in."""
        a, b = (factor.double() if factor.dtype == torch.float64 else factor.float() for factor in self.factors(name))
        return self.as_stored(b @ a) * self.scaling[name]

    # ---- slots -----------------------------------------------------------------------------------------------------
    def has_adapter(self, name: str) -> bool:
        return name in self._modules["lora_A"]._modules or name in self.lora_embedding_A

    def method(self, name: str) -> Method:
        return self.lora_variant.get(name, LORA)

    def low_rank_bias(self, name: str) -> torch.Tensor | None:
        """The bias of B `[out]`, None without `lora_bias`."""
        return self.lora_B[name].bias if name in self.lora_B else None

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        """The variants that this kind of layer knows, by the options of a config that ask for them."""
        return {(): None}

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """The variant that a config asks for, None for plain LoRA.

        Raises:
            ValueError: The config asks for a variant, or several at once, that this kind of layer does not have.
        """
        asked = frozenset(option for option in VARIANT_OPTIONS if getattr(config, option, None))
        if str(config.init_lora_weights).lower() == "mica":
            asked |= {"mica"}
        known = {frozenset(options): variant for options, variant in self.lora_variants.items()}
        if asked and asked not in known:
            raise ValueError(
                f"{', '.join(sorted(asked))}: {type(self).__name__} (base layer {type(self.get_base_layer()).__name__}) "
                f"has {'no such variant' if len(asked) == 1 else 'no variant that is all of these at once'} of LoRA. "
                "Switch some off, or leave the layer out of target_modules."
            )
        variant = known.get(asked)
        return None if variant is None else variant()

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Create an adapter in this layer.

        Args:
            adapter_name: Its name; an adapter of that name is replaced.
            r: Rank, at least 1.
            lora_alpha: Numerator of the scaling: `scaling = lora_alpha / r`, with `use_rslora` over the root of r
                (Kalajdzievski, arXiv 2312.03732).
            config: The rest of the adapter's settings.

        Raises:
            ValueError: `r` is not positive, or the config asks for something that this layer cannot do.
        """
        if r <= 0:
            raise ValueError(f"r must be a positive integer, got {r}: choose a rank of at least 1.")
        if config.lora_bias and self._base_bias() is None:
            warnings.warn(
                f"lora_bias=True on a {type(self.get_base_layer()).__name__} without a bias: the adapter can be "
                "trained and used, but not merged.",
                PeftWarning,
                stacklevel=2,
            )
        if config.use_qalora and not self.knows_qalora:
            warnings.warn(
                f"use_qalora=True has no effect on {type(self).__name__}: QA-LoRA is for layers quantised by GPTQ.",
                PeftWarning,
                stacklevel=2,
            )
        variant = self.resolve_lora_variant(config=config, **kwargs)
        self.lora_variant.pop(adapter_name, None)
        self._norm_caches.pop(adapter_name, None)
        self._thaw_slots(adapter_name)
        if variant is not None:
            self.lora_variant[adapter_name] = variant
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        dropout = nn.Dropout(p=config.lora_dropout) if config.lora_dropout > 0.0 else nn.Identity()
        self.lora_dropout[adapter_name] = dropout
        self._create_factors(adapter_name, r, config.lora_bias)
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = config.use_dora
        self.lora_bias[adapter_name] = config.lora_bias
        self._use_dora_triton[adapter_name] = getattr(config, "use_dora_triton", False)
        inits.start(self, adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if variant is not None:
            variant.init(self, adapter_name=adapter_name, config=config, **kwargs)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _base_bias(self) -> torch.Tensor | None:
        """The bias of the base layer that B's bias can be merged into."""
        return getattr(self.get_base_layer(), "bias", None)

    # ---- starting values -------------------------------------------------------------------------------------------
    known_starts: frozenset[str] = frozenset()  # values of init_lora_weights, beyond the plain ones, that it can do
    plain_starts: frozenset[str] = frozenset()  # those that are meant for other layers: it starts as with True

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Fill A and B with starting values that depend on nothing else: True, "gaussian", False to leave them."""
        inits.reset_parameters(self, adapter_name, init_lora_weights)

    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        inits.begin_pissa(self, adapter_name, init_lora_weights)

    def olora_init(self, adapter_name: str) -> None:
        inits.begin_olora(self, adapter_name)

    def orthogonal_init(self, adapter_name: str) -> None:
        inits.begin_orthogonal(self, adapter_name)

    def mica_init(self, adapter_name: str) -> None:
        inits.begin_mica(self, adapter_name)

    def loftq_init(self, adapter_name: str, config: LoraConfig) -> None:
        inits.begin_loftq(self, adapter_name, config)

    def corda_init(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        inits.begin_corda(self, adapter_name, init_lora_weights)

    def lora_ga_init(self, adapter_name: str, lora_ga_config: Any) -> None:
        inits.begin_lora_ga(self, adapter_name, lora_ga_config)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for extra in (self.lora_variant, self._use_dora_triton, self._norm_caches):
            extra.pop(adapter_name, None)
        self._thaw_slots(adapter_name)

    # ---- slots that variants add or freeze -------------------------------------------------------------------------
    def add_slot(self, slot: str, container: nn.Module) -> None:
        """Add a container of parameters by adapter, next to A and B, unless this layer has it."""
        if slot not in self.adapter_layer_names:
            setattr(self, slot, container)
            self.adapter_layer_names = (*self.adapter_layer_names, slot)

    def add_setting(self, setting: str, adapter_name: str, value: Any, container: nn.Module | None = None) -> None:
        """Note something of one adapter that is not trained in the dict, or `container`, called `setting`."""
        if setting not in self.other_param_names:
            setattr(self, setting, {} if container is None else container)
            self.other_param_names = (*self.other_param_names, setting)
        getattr(self, setting)[adapter_name] = value

    def freeze_slots(self, adapter_name: str, slots: tuple[str, ...]) -> None:
        """Keep some of an adapter's parameters frozen also while it trains."""
        self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: slots}

    def _thaw_slots(self, adapter_name: str) -> None:
        if adapter_name in self.frozen_peft_weight_names:
            kept = self.frozen_peft_weight_names.items()
            self.frozen_peft_weight_names = {name: slots for name, slots in kept if name != adapter_name}

    def _is_frozen(self, attribute: str, name: str) -> bool:
        return attribute in self.frozen_peft_weight_names.get(name, ())

    # ---- scaling ---------------------------------------------------------------------------------------------------
    def _own_scaling(self, name: str) -> float:
        return self.lora_alpha[name] / (math.sqrt(self.r[name]) if self.use_rslora[name] else self.r[name])

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to `scale` times its own; adapters that are not here are ignored."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._own_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters by `scale`."""
        if scale == 1:
            return
        for name in self.active_adapters:
            if self.has_adapter(name):
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by `scale`; without one, set it to their own."""
        for name in self.active_adapters:
            if self.has_adapter(name):
                self.scaling[name] = self._own_scaling(name) if scale is None else self.scaling[name] / scale

    # ---- DoRA ------------------------------------------------------------------------------------------------------
    def dora_norm(self, name: str) -> torch.Tensor:
        """‖W + s·BA‖ by output feature `[out]`, read anew only when W, A, B or the scaling changed."""
        a, b = self.factors(name)
        return self.norm_cache(name).get(self.norm_weight(), a, b, self.scaling[name], self.dora_route(name))

    def weight_norm(self, name: str | None) -> torch.Tensor:
        """‖W + s·BA‖ with an adapter, or ‖W‖, by output feature; computed at each call and without gradient."""
        weight = self.norm_weight()
        if name is not None:
            return dora.row_norm(weight, *self.factors(name), self.scaling[name])
        a = torch.zeros(1, weight.shape[1], device=weight.device, dtype=torch.float32)
        return dora.row_norm(weight, a, a.new_zeros(weight.shape[0], 1), 0.0)

    def norm_cache(self, name: str) -> dora.NormCache:
        cache = self._norm_caches.get(name)
        if cache is None:
            cache = self._norm_caches[name] = dora.NormCache()
        return cache

    def dora_route(self, name: str, away: str | None = None) -> dora.Route:
        """Which body of the DoRA engine runs for an adapter, and why; PyTorch's where it is `away` from the base weight."""
        slot = self.lora_A if name in self.lora_A else self.lora_embedding_A
        weight = self.norm_weight()
        return dora.plan(
            device=_first_parameter(slot[name]).device,
            dtype=weight.dtype,
            want_triton=self._use_dora_triton.get(name, False) if name in self.lora_magnitude_vector else None,
            kind=self.dora_kind,
            away=away or self.__dict__.get("_apart") or getattr(weight, "away", None),
        )

    dora_kind = "linear"

    def dora_routes(self) -> dict[str, dora.Route]:
        """The route of every DoRA adapter of this layer."""
        apart = {name: [slot.why for slot in apart_from_base(self, [name])] for name in self.lora_magnitude_vector}
        return {name: self.dora_route(name, *why[:1]) for name, why in apart.items()}

    def _replan(self) -> None:
        super()._replan()
        for cache in self.__dict__.get("_norm_caches", {}).values():
            cache.rest()

    def dora_caches(self) -> Iterable[dora.NormCache]:
        return self._norm_caches.values()

    def _along_channels(self, vector: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """A vector `[out]` in a shape that broadcasts over an output."""
        shape = [1] * y.dim()
        shape[self.channel_dim] = -1
        return vector.reshape(shape)

    # ---- the machine's questions -----------------------------------------------------------------------------------
    def _adapter_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {key: kwargs.pop(key) for key in VARIANT_KWARG_KEYS if key in kwargs}

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


def _first_parameter(entry: nn.Module | torch.Tensor) -> torch.Tensor:
    return entry if isinstance(entry, torch.Tensor) else next(entry.parameters())
