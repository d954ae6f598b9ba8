# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on convolutions: A is a convolution like the base layer's with r output channels, B a 1×1 one on top."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Module

from peft.engine.machine import MergeJournal, assign
from peft.engine.method import Folded
from peft.weights import find_weight

from ..variants.dora import DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant
from .base import LoraLayer

if TYPE_CHECKING:
    from ..config import LoraConfig
    from .variant import LoraVariant


class _ConvNd(LoraLayer, nn.Module):
    """What the three convolutions share.

    With groups, A sees all input channels and B is grouped, so the update is a full convolution: it is folded by
    turning the base layer into one with a single group, and taken out by giving it its old weight back.

    Args:
        base_layer: The convolution to adapt.
        adapter_name: Name of the first adapter.
        config: Its settings.
        r: Its rank; with groups, a multiple of their number.
        lora_alpha: Numerator of its scaling.
    """

    channel_dim = 1
    dora_kind = "conv"
    plain_starts = frozenset(("lora_ga",))

    def __init__(
        self,
        base_layer: Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _create_factors(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        base = self.get_base_layer()
        if r % base.groups:
            raise ValueError(
                f"r={r} must be a multiple of the convolution's groups={base.groups}: choose another rank, for this "
                "layer alone by rank_pattern."
            )
        conv = type(self).conv_class
        self.lora_A[adapter_name] = conv(
            self.in_features,
            r,
            kernel_size=base.kernel_size,
            stride=base.stride,
            padding=base.padding,
            dilation=base.dilation,
            padding_mode=base.padding_mode,
            bias=False,
        )
        self.lora_B[adapter_name] = conv(r, self.out_features, kernel_size=1, groups=base.groups, bias=lora_bias)

    def base_product(self, x: torch.Tensor) -> torch.Tensor:
        base = self.base_layer
        if not find_weight(base).direct():
            return super().base_product(x)
        return base._conv_forward(x, base.weight, None)  # nothing to take away again, so nothing is rounded twice

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (factor.flatten(1) for factor in super().factors(name))
        groups = self.lora_B[name].groups
        if groups > 1:  # a row of B only meets the ranks of its own group
            b = torch.block_diag(*b.chunk(groups))
        return a, b

    def norm_weight(self) -> Any:
        base = self.get_base_layer()
        weight = find_weight(base)
        return weight if base.groups == 1 else _UngroupedWeight(weight, base)

    def as_stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """As the weight `[out, in, *kernel]` of a convolution with one group."""
        return matrix.reshape(self.out_features, self.in_features, *self.get_base_layer().kernel_size)

    # ---- groups ----------------------------------------------------------------------------------------------------
    def _read_base(self) -> Folded:
        folded = super()._read_base()
        return Folded(ungrouped(folded.weight, self.get_base_layer().groups), folded.bias)

    def _write_base(self, folded: Folded, journal: MergeJournal) -> None:
        base = self.get_base_layer()
        if base.groups > 1:
            journal.snapshot = (base.weight.data, base.groups)
            base.weight.data = base.weight.data.new_empty(folded.weight.shape)
            base.groups = 1
        super()._write_base(folded, journal)

    def _restore_base(self, journal: MergeJournal) -> None:
        if journal.snapshot is None:
            super()._restore_base(journal)
            return
        base = self.get_base_layer()
        base.weight.data, base.groups = journal.snapshot
        if journal.bias is not None:
            assign(base.bias, journal.bias)

    def _original_base(self, folded: Folded, journal: MergeJournal) -> Folded:
        if journal.snapshot is None:
            return super()._original_base(folded, journal)
        data, groups = journal.snapshot
        return Folded(ungrouped(data.to(folded.weight), groups), folded.bias)


class Conv1d(_ConvNd):
    """LoRA on `nn.Conv1d`."""

    conv_class = nn.Conv1d

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv_fn = F.conv1d

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        return {(): None, ("use_dora",): DoraConv1dVariant}


class Conv2d(_ConvNd):
    """LoRA on `nn.Conv2d`."""

    conv_class = nn.Conv2d

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv_fn = F.conv2d

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        return {(): None, ("use_dora",): DoraConv2dVariant}


class Conv3d(_ConvNd):
    """LoRA on `nn.Conv3d`."""

    conv_class = nn.Conv3d

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv_fn = F.conv3d

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        return {(): None, ("use_dora",): DoraConv3dVariant}


def ungrouped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """The weight `[out, in, *kernel]` of the convolution with one group that equals a grouped `[out, in / groups, …]`."""
    if groups == 1:
        return weight
    out_group, in_group = weight.shape[0] // groups, weight.shape[1]
    full = weight.new_zeros(weight.shape[0], in_group * groups, *weight.shape[2:])
    for group in range(groups):
        rows = slice(group * out_group, (group + 1) * out_group)
        full[rows, group * in_group : (group + 1) * in_group] = weight[rows]
    return full


class _UngroupedWeight:
    """A grouped convolution's weight, seen as rows over all input channels."""

    lossy = False
    format = "plain"

    def __init__(self, weight: Any, base: nn.Module) -> None:
        self._weight, self._base = weight, base
        self.device, self.dtype = weight.device, weight.dtype
        self.shape = (base.out_channels, weight.shape[1] * base.groups)

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        weight = ungrouped(self._base.weight.detach(), self._base.groups).flatten(1)
        return weight if dtype is None else weight.to(dtype)

    def rows(self, a: int, b: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        grouped = self._weight.rows(a, b, dtype)
        out_group, kernel = self.shape[0] // self._base.groups, grouped.shape[1]
        full = grouped.new_zeros(b - a, self.shape[1])
        for row in range(a, b):
            start = row // out_group * kernel
            full[row - a, start : start + kernel] = grouped[row - a]
        return full

    def packed(self) -> None:
        return None

    def key(self) -> tuple:
        return (*self._weight.key(), self._base.groups)
