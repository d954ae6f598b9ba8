# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA on each kind of layer: y = g∘(W x + s·B A x) + b with g = magnitude / ‖W + s·B A‖ (arXiv 2402.09353)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from peft import dora
from peft.engine.method import Folded
from peft.weights import remembering

from ..dora import DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer, DoraEmbeddingLayer, DoraLinearLayer, inside
from ..layer.variant import LoraVariant

if TYPE_CHECKING:
    from ..layer.base import LoraLayer


class Kept(NamedTuple):
    """What undoing a merge needs.

    Args:
        gain: The gain `[out]` that went in.
        dead: Output features whose gain is zero, so that division cannot bring their weights back.
        rows: Their weights, output features first, from before.
    """

    gain: torch.Tensor
    dead: torch.Tensor
    rows: torch.Tensor


class DoraLinearVariant(LoraVariant):
    """DoRA on linear layers; the other kinds differ in the holder of the magnitude alone."""

    holder = DoraLinearLayer

    @classmethod
    def init(cls, module: LoraLayer, adapter_name: str, config: Any = None, **kwargs: Any) -> None:
        """Make the magnitude, equal to the norm of the weight with the adapter in it."""
        holder = cls.holder(fan_in_fan_out=module.fan_in_fan_out)
        a, b = module.factors(adapter_name)
        if a.is_meta or module.norm_weight().device.type == "meta":
            norm = torch.empty(module.out_features, device="meta", dtype=a.dtype)
        else:
            with torch.no_grad():
                norm = dora.row_norm(module.norm_weight(), a, b, module.scaling[adapter_name])
            norm = norm.to(device=a.device, dtype=a.dtype)
        holder.set_magnitude(norm)
        module.lora_magnitude_vector[adapter_name] = holder
        module.norm_cache(adapter_name)  # here, since its lock cannot be made while a compiler traces

    # ---- output ----------------------------------------------------------------------------------------------------
    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        scaling = module.scaling[active_adapter]
        dropout = module.lora_dropout[active_adapter]
        drops = dropout.training and getattr(dropout, "p", 0.0) > 0.0
        with remembering(*module.factor_modules(active_adapter)):
            if drops and x.is_floating_point():
                dropped = dropout(module._cast_input_dtype(x, module.lora_A[active_adapter].weight.dtype))
                base = module.base_product(dropped.to(x.dtype))
                low_rank = module.low_rank_of_dropped(active_adapter, dropped, result)
            else:
                base, low_rank = None, module.low_rank(active_adapter, x, result)
            norm = module.dora_norm(active_adapter)
        split = module.split(x, result)
        if split is not None:
            norm = split.constant(norm)

        def composed(magnitude: torch.Tensor) -> torch.Tensor:
            magnitude = magnitude.flatten() if split is None else split.vector(magnitude.flatten())
            if base is None:
                bias, channel_dim = module.bias_to_compose(result), module.channel_dim
                return dora.compose(
                    result,
                    low_rank,
                    magnitude=magnitude,
                    norm=norm,
                    scaling=scaling,
                    bias=bias,
                    channel_dim=channel_dim,
                )
            gain = module._along_channels(dora.gain(magnitude, norm), base)
            return result + (gain - 1) * base + gain * scaling * low_rank

        return inside(module.lora_magnitude_vector[active_adapter], composed)

    # ---- weight ----------------------------------------------------------------------------------------------------
    def prepare_fold(self, layer: LoraLayer, name: str, weight: torch.Tensor) -> Kept:
        return self._keep(layer, name, weight)

    @staticmethod
    def _keep(layer: LoraLayer, name: str, weight: torch.Tensor) -> Kept:
        rows = weight.transpose(0, layer.weight_axis)
        norm = torch.linalg.norm(
            (weight + layer.fold_delta(name).to(weight)).transpose(0, layer.weight_axis).flatten(1), dim=1
        )
        gain = dora.gain(layer.lora_magnitude_vector[name].weight.detach().flatten().to(norm), norm)
        dead = torch.nonzero(gain == 0).flatten()
        return Kept(gain, dead, rows[dead].clone())

    def fold(self, layer: LoraLayer, name: str, folded: Folded, kept: Kept) -> Folded:
        weight = (folded.weight + layer.fold_delta(name).to(folded.weight)) * _by_row(kept.gain, layer, folded.weight)
        return Folded(weight, self._scaled_bias(layer, name, folded.bias, kept, 1))

    def unfold(self, layer: LoraLayer, name: str, folded: Folded, kept: Kept) -> Folded:
        gain = torch.where(kept.gain == 0, 1.0, kept.gain)
        weight = folded.weight / _by_row(gain, layer, folded.weight) - layer.fold_delta(name).to(folded.weight)
        if len(kept.dead):
            weight.transpose(0, layer.weight_axis)[kept.dead] = kept.rows.to(weight)
        return Folded(weight, self._scaled_bias(layer, name, folded.bias, kept, -1))

    @staticmethod
    def _scaled_bias(
        layer: LoraLayer, name: str, bias: torch.Tensor | None, kept: Kept, sign: int
    ) -> torch.Tensor | None:
        """The base bias with the gain times B's scaled bias: B's bias is part of the branch, so the gain is on it."""
        shift = layer.low_rank_bias(name)
        if shift is None or bias is None:
            return bias
        return bias + sign * layer.scaling[name] * kept.gain.to(bias) * shift.to(bias)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        kept = DoraLinearVariant._keep(module, active_adapter, orig_weight)
        return DoraLinearVariant().fold(module, active_adapter, Folded(orig_weight, None), kept).weight

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data.copy_(DoraLinearVariant.merge_safe(module, active_adapter, orig_weight))

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        journal = module.__dict__.get("_journal")
        steps = dict(journal.steps) if journal is not None else {}
        if active_adapter not in steps:
            raise ValueError(f"Adapter {active_adapter!r} is not merged into this layer: nothing to take out.")
        folded = Folded(orig_weight, None)
        return DoraLinearVariant().unfold(module, active_adapter, folded, steps[active_adapter]).weight

    def supports_lora_conversion(self) -> bool:
        return False


def _by_row(gain: torch.Tensor, layer: LoraLayer, weight: torch.Tensor) -> torch.Tensor:
    """The gain `[out]` in a shape that multiplies the output features of a stored weight."""
    shape = [1] * weight.dim()
    shape[layer.weight_axis] = -1
    return gain.to(weight).reshape(shape)


class DoraEmbeddingVariant(DoraLinearVariant):
    """DoRA on embeddings: one gain for each dimension of the table's rows."""

    holder = DoraEmbeddingLayer


class _DoraConvNdVariant(DoraLinearVariant):
    """DoRA on convolutions: one gain an output channel."""

    @staticmethod
    def init_convd_variant(module: LoraLayer, adapter_name: str, dora_layer: DoraLinearLayer) -> None:
        """Give an adapter the magnitude held by `dora_layer`, set to the weight's norm."""
        a, b = module.factors(adapter_name)
        dora_layer.set_magnitude(dora.row_norm(module.norm_weight(), a, b, module.scaling[adapter_name]).to(a.dtype))
        module.lora_magnitude_vector[adapter_name] = dora_layer


class DoraConv1dVariant(_DoraConvNdVariant):
    """DoRA on `nn.Conv1d`."""

    holder = DoraConv1dLayer


class DoraConv2dVariant(_DoraConvNdVariant):
    """DoRA on `nn.Conv2d`."""

    holder = DoraConv2dLayer


class DoraConv3dVariant(_DoraConvNdVariant):
    """DoRA on `nn.Conv3d`."""

    holder = DoraConv3dLayer


class DoraParameterVariant(DoraLinearVariant):
    """DoRA on bare parameters: one gain for each row of each matrix."""

    @classmethod
    def init(cls, module: LoraLayer, adapter_name: str, config: Any = None, **kwargs: Any) -> None:
        """Make the magnitude `[n, out]`, `[out]` for one matrix, equal to the norm of the weight with the adapter."""
        holder = cls.holder(fan_in_fan_out=False)
        like = module.factors(adapter_name)[0]
        if like.is_meta or module.weight.is_meta:
            norm = torch.empty(module.num_experts, module.out_features, device="meta", dtype=like.dtype)
        else:
            norm = module.weight_norm(adapter_name).to(device=like.device, dtype=like.dtype)
        holder.set_magnitude(norm if len(norm) > 1 else norm[0])
        module.lora_magnitude_vector[adapter_name] = holder
