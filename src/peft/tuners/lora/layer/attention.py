# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on `nn.MultiheadAttention`: on its in-projection, packed or in three weights, and on the out-projection."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft import dora
from peft.utils.warning import PeftWarning

from .linear import Linear
from .param import Block, ParameterLayer

if TYPE_CHECKING:
    from ..config import LoraConfig
    from .variant import LoraVariant


def _blocks(attention: nn.MultiheadAttention) -> tuple[Block, ...]:
    """The weights of the in-projection; their columns are bounded on both sides."""
    dim, kdim, vdim = attention.embed_dim, attention.kdim, attention.vdim
    if attention._qkv_same_embed_dim:
        return (Block("in_proj_weight", slice(0, 3 * dim), slice(0, dim)),)
    return (
        Block("q_proj_weight", slice(0, dim), slice(0, dim)),
        Block("k_proj_weight", slice(dim, 2 * dim), slice(dim, dim + kdim)),
        Block("v_proj_weight", slice(2 * dim, 3 * dim), slice(dim + kdim, dim + kdim + vdim)),
    )


def _with_adapter(layer: Linear, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A linear layer's weight with an adapter in it, and what the adapter adds to the bias, if anything."""
    shift = layer.low_rank_bias(name)
    shift = None if shift is None else layer.scaling[name] * shift
    if name not in layer.lora_magnitude_vector:
        return weight + layer.get_delta_weight(name).to(weight), shift
    a, b = layer.factors(name)
    magnitude, norm = layer.lora_magnitude_vector[name].weight, layer.dora_norm(name)
    stack = (weight[None], a[None], b[None])
    (adapted,) = dora.stacked_weight(*stack, magnitude=magnitude, norm=norm[None], scaling=layer.scaling[name])
    return adapted, None if shift is None else dora.gain(magnitude, norm) * shift


class MultiheadAttention(ParameterLayer, nn.Module):
    """LoRA on `nn.MultiheadAttention`: A `[r, dim]` and B `[3 · dim, r]` for the packed in-projection.

    Where the in-projection is three weights, since keys or values have another size, A is `[r, dim + kdim + vdim]`: the A
    of query, key and value side by side, each with its own `dim` rows of B.

    The out-projection becomes a `lora.Linear` of its own in the base layer. The attention computes with both weights as
    they are, so the updates are added to them while it runs.

    Args:
        base_layer: The attention.
        adapter_name: Name of the first adapter.
        config: The adapter's settings; its dropout has no effect here.
        r: Its rank.
        lora_alpha: Numerator of its scaling.

    Raises:
        ValueError: The config asks for a variant other than DoRA.
        TypeError: The out-projection is not linear.
    """

    bias_name = "in_proj_bias"
    frozen_biases = ("in_proj_bias",)
    # `nn.TransformerEncoderLayer` looks at it: where it is true, a fused kernel reads the weights past this layer
    _qkv_same_embed_dim = False

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        if not isinstance(base_layer.out_proj, nn.Linear):
            raise TypeError(
                f"out_proj of nn.MultiheadAttention must be nn.Linear, got {type(base_layer.out_proj).__name__}."
            )
        nn.Module.__init__(self)
        ParameterLayer.__init__(self, base_layer, **kwargs)
        self.blocks = _blocks(base_layer)
        self.parameter_name = self.blocks[0].parameter
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)
        base_layer.out_proj = Linear(base_layer.out_proj, adapter_name, config=config, r=r, lora_alpha=lora_alpha)

    def _features(self, base_layer: nn.Module) -> tuple[int, int]:
        return sum(columns.stop - columns.start for _, _, columns in _blocks(base_layer)), 3 * base_layer.embed_dim

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Create an adapter in the attention and in its out-projection; arguments as in `LoraLayer.update_layer`."""
        super().update_layer(*args, **kwargs)
        if isinstance(self.out_proj, Linear):
            self.out_proj.update_layer(*args, **kwargs)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        if config.lora_dropout:
            warnings.warn(
                f"lora_dropout={config.lora_dropout} has no effect on nn.MultiheadAttention, whose weights are adapted as "
                "a whole.",
                PeftWarning,
                stacklevel=3,
            )
        return super().resolve_lora_variant(config=config, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        return super().named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super().state_dict(*args, **kwargs)

    def _base_bias(self) -> torch.Tensor | None:
        return self.get_base_layer().in_proj_bias

    def _create_factors(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        dropout = self.lora_dropout[adapter_name]
        if isinstance(dropout, nn.Dropout):
            warnings.warn(
                f"lora_dropout={dropout.p} has no effect on nn.MultiheadAttention, whose weights are adapted as a whole.",
                PeftWarning,
                stacklevel=2,
            )
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, self.out_features, bias=lora_bias)

    # ---- forward ---------------------------------------------------------------------------------------------------
    def forward(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        adapter_names = kwargs.pop("adapter_names", None)
        self._adapter_kwargs(kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(query, *args, **kwargs)
        if adapter_names is not None:
            rows = query if self.batch_first or query.dim() < 3 else query.transpose(0, 1)
            self._check_forward_args(rows, adapter_names=adapter_names)
            return self._mixed_batch_forward(query, *args, adapter_names=adapter_names, **kwargs)
        active = [] if self.merged else self.active_adapters
        with self._activate_lora(active), self._activate_out_proj(self.out_proj.active_adapters):
            return self.base_layer(query, *args, **kwargs)

    def _run_alone(self, name: str, *args: Any, **kwargs: Any) -> Any:
        with self._activate_lora([name]), self._activate_out_proj([name]):
            return self.base_layer(*args, **kwargs)

    def _row_dim(self, position: int) -> int:
        return 0 if self.batch_first or position else 1  # the attention's weights have the batch first

    @contextmanager
    def _activate_out_proj(self, active_adapters: list[str]) -> Iterator[None]:
        """Let the attention see the out-projection's weight and bias with its adapters in them."""
        base, out_proj = self.get_base_layer(), self.out_proj
        names = [name for name in active_adapters if out_proj.has_adapter(name)]
        if out_proj.disable_adapters or out_proj.merged or not names:
            yield
            return
        weight, bias = out_proj.weight, out_proj.bias
        for name in names:
            weight, shift = _with_adapter(out_proj, name, weight)
            if shift is not None:
                bias = shift if bias is None else bias + shift.to(bias)
        object.__setattr__(base, "out_proj", SimpleNamespace(weight=weight, bias=bias))
        try:
            yield
        finally:
            object.__delattr__(base, "out_proj")

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The attention with its plain out-projection, adapters merged into both if asked for."""
        base = self.get_base_layer()
        for layer in (self, self.out_proj):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            elif layer.merged:
                layer.unmerge()
        base.out_proj = self.out_proj.get_base_layer()
        return base

    # ---- what callers read of an attention -------------------------------------------------------------------------
    def merge_masks(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_layer().merge_masks(*args, **kwargs)

    out_proj = property(lambda self: self.get_base_layer().out_proj)
    in_proj_weight = property(lambda self: self.get_base_layer().in_proj_weight)
    in_proj_bias = property(lambda self: self.get_base_layer().in_proj_bias)
    embed_dim = property(lambda self: self.get_base_layer().embed_dim)
    kdim = property(lambda self: self.get_base_layer().kdim)
    vdim = property(lambda self: self.get_base_layer().vdim)
    num_heads = property(lambda self: self.get_base_layer().num_heads)
    head_dim = property(lambda self: self.get_base_layer().head_dim)
    dropout = property(lambda self: self.get_base_layer().dropout)
    batch_first = property(lambda self: self.get_base_layer().batch_first)
    bias_k = property(lambda self: self.get_base_layer().bias_k)
    bias_v = property(lambda self: self.get_base_layer().bias_v)
    add_zero_attn = property(lambda self: self.get_base_layer().add_zero_attn)
