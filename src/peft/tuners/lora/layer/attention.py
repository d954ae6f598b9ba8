# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on `nn.MultiheadAttention` with one packed in-projection: on that weight and on the out-projection's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft.utils.warning import PeftWarning

from .linear import Linear
from .param import ParameterLayer

if TYPE_CHECKING:
    from ..config import LoraConfig


class MultiheadAttention(ParameterLayer, nn.Module):
    """LoRA on `nn.MultiheadAttention`: A `[r, dim]` and B `[3 · dim, r]` for the packed in-projection.

    The out-projection becomes a `lora.Linear` of its own in the base layer. The attention computes with both weights as
    they are, so the updates are added to them while it runs.

    Args:
        base_layer: The attention.
        adapter_name: Name of the first adapter.
        config: The adapter's settings; its dropout has no effect here.
        r: Its rank.
        lora_alpha: Numerator of its scaling.

    Raises:
        ValueError: Query, key and value have different dimensions, or the config asks for a variant.
        TypeError: The out-projection is not linear.
    """

    parameter_name = "in_proj_weight"
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
        if not base_layer._qkv_same_embed_dim:
            raise ValueError(
                "LoRA adapts nn.MultiheadAttention with one packed in-projection, but kdim or vdim of this one differ "
                "from embed_dim: leave it out of target_modules."
            )
        if not isinstance(base_layer.out_proj, nn.Linear):
            raise TypeError(
                f"out_proj of nn.MultiheadAttention must be nn.Linear, got {type(base_layer.out_proj).__name__}."
            )
        nn.Module.__init__(self)
        ParameterLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)
        base_layer.out_proj = Linear(base_layer.out_proj, adapter_name, config=config, r=r, lora_alpha=lora_alpha)

    def _features(self, base_layer: nn.Module) -> tuple[int, int]:
        return base_layer.embed_dim, 3 * base_layer.embed_dim

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        if config.lora_dropout:
            warnings.warn(
                f"lora_dropout={config.lora_dropout} has no effect on nn.MultiheadAttention, whose weights are adapted as "
                "a whole.",
                PeftWarning,
                stacklevel=2,
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        if isinstance(self.out_proj, Linear):
            self.out_proj.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _base_bias(self) -> torch.Tensor | None:
        return self.get_base_layer().in_proj_bias

    def _create_factors(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, self.out_features, bias=lora_bias)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """`scaling · B A` of the packed in-projection, `[3 · dim, dim]`."""
        a, b = self.factors(adapter)
        return (b.float() @ a.float() * self.scaling[adapter]).to(b.dtype)

    # ---- forward ---------------------------------------------------------------------------------------------------
    def forward(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("adapter_names", None) is not None:
            raise TypeError(
                "adapter_names is not possible with nn.MultiheadAttention: the rows of a batch share its weights. Run one "
                "batch an adapter."
            )
        self._adapter_kwargs(kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(query, *args, **kwargs)
        with self._activate_lora([] if self.merged else self.active_adapters), self._activate_out_proj():
            return self.base_layer(query, *args, **kwargs)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        base, bias = self.get_base_layer(), self.get_base_layer().in_proj_bias
        shifts = [self.low_rank_bias(n) * self.scaling[n] for n in active_adapters if self._has_bias(n)]
        with super()._activate_lora(active_adapters):
            if shifts:
                shift = sum(shifts)
                object.__setattr__(base, "in_proj_bias", shift if bias is None else bias + shift.to(bias))
            try:
                yield
            finally:
                if shifts:
                    object.__delattr__(base, "in_proj_bias")

    def _has_bias(self, name: str) -> bool:
        return self.has_adapter(name) and self.low_rank_bias(name) is not None

    @contextmanager
    def _activate_out_proj(self) -> Iterator[None]:
        """Let the attention see the out-projection's weight and bias with its adapters' updates."""
        base, out_proj = self.get_base_layer(), self.out_proj
        names = [name for name in out_proj.active_adapters if out_proj.has_adapter(name)]
        if out_proj.disable_adapters or out_proj.merged or not names:
            yield
            return
        weight, bias = out_proj.weight, out_proj.bias
        weight = weight + sum(out_proj.get_delta_weight(name) for name in names).to(weight)
        shifts = [
            out_proj.low_rank_bias(n) * out_proj.scaling[n] for n in names if out_proj.low_rank_bias(n) is not None
        ]
        if shifts:
            bias = sum(shifts) if bias is None else bias + sum(shifts).to(bias)
        object.__setattr__(base, "out_proj", SimpleNamespace(weight=weight, bias=bias))
        try:
            yield
        finally:
            object.__delattr__(base, "out_proj")

    # ---- merging ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the packed in-projection; the out-projection is a layer of its own, with its own merge."""
        before = len(self.merged_adapters)
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        for name in self.merged_adapters[before:]:
            self._shift_bias(name, 1)

    @torch.no_grad()
    def unmerge(self) -> None:
        for name in self.merged_adapters:
            self._shift_bias(name, -1)
        super().unmerge()

    def _shift_bias(self, name: str, sign: int) -> None:
        if self._has_bias(name):
            bias = self.get_base_layer().in_proj_bias
            bias.data.add_(self.low_rank_bias(name).to(bias), alpha=sign * self.scaling[name])

    def check_mergeable(self, names: list[str]) -> None:
        if self.get_base_layer().in_proj_bias is None and any(self._has_bias(name) for name in names):
            raise RuntimeError("lora_bias=True cannot be merged into nn.MultiheadAttention without a bias.")

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
