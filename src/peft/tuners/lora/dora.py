# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The modules that hold DoRA's magnitude (Liu et al., arXiv 2402.09353); what they compute stands in `peft.dora`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft import dora
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from peft.utils.other import transpose
from peft.weights import innermost, is_hooked

# Kept because other packages switch it (`peft.helpers.DoraCaching`). The norm is always reused, and exactly so, while
# nothing that it depends on has changed; there is nothing left to switch.
ENABLE_DORA_CACHING = bool(os.environ.get("ENABLE_DORA_CACHING"))


def cache_decorator(cache_key: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that other packages put on methods to be cached; it calls the method, which caches by itself.

    Args:
        cache_key: Name of the cached value, recorded as `cache_key` on the wrapped method.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs)

        call.cache_key = cache_key
        return call

    return decorate


def inside(holder: nn.Module, work: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`work(magnitude)`, in a call of the magnitude's module where such calls are hooked: FSDP and ZeRO gather there.

    Args:
        holder: A `DoraLinearLayer`, or a wrapper around one.
        work: What is done with the magnitude.
    """
    if isinstance(holder, DoraLinearLayer) and not is_hooked(holder):
        return work(holder.weight)
    needed = {"embed_fn": None} if isinstance(innermost(holder), DoraEmbeddingLayer) else {}
    return holder(work, lora_A=None, lora_B=None, scaling=1.0, base_layer=None, **needed)


def _matrix(factor: nn.Module | torch.Tensor) -> torch.Tensor:
    """The weight of A or B as a matrix, given the module or the tensor."""
    weight = factor.weight if isinstance(factor, nn.Module) else factor
    return weight.flatten(1)


class DoraLinearLayer(nn.Module):
    """The magnitude `weight` `[out]` of one DoRA adapter on a linear layer.

    Args:
        fan_in_fan_out: Whether the base layer stores its weight `[in, out]`.
    """

    def __init__(self, fan_in_fan_out: bool) -> None:
        super().__init__()
        self.fan_in_fan_out = fan_in_fan_out

    def get_lora_weight(
        self, lora_A: nn.Module | torch.Tensor, lora_B: nn.Module | torch.Tensor, adapter_name: str | None = None
    ) -> torch.Tensor:
        """B A `[out, in]`, not scaled. The engine never builds it; this is for readers."""
        return _matrix(lora_B) @ _matrix(lora_A)

    def get_weight_norm(
        self, weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, adapter_name: str | None = None
    ) -> torch.Tensor:
        """‖weight + scaling · lora_weight‖ by output feature, of dense tensors, in `weight`'s dtype."""
        rows = transpose(weight, self.fan_in_fan_out)
        return torch.linalg.norm(rows + scaling * lora_weight.to(rows), dim=1).to(weight.dtype)

    def update_layer(
        self, *, base_layer: nn.Module, lora_A: Any, lora_B: Any, scaling: float, place_on_cpu: bool = False
    ) -> None:
        """Set the magnitude to what the weight's norm is now, so that the output does not change.

        Args:
            base_layer: The frozen layer.
            lora_A, lora_B: The factors, as modules or tensors.
            scaling: The adapter's scaling.
            place_on_cpu: Keep the magnitude on the CPU.
        """
        with gather_params_ctx(base_layer.parameters()):
            weight = dequantize_module_weight(base_layer)
            norm = self.get_weight_norm(weight, self.get_lora_weight(lora_A, lora_B).detach(), scaling)
        self.set_magnitude(norm.cpu() if place_on_cpu else norm)

    def set_magnitude(self, norm: torch.Tensor) -> None:
        """Make `norm` `[out]` the trainable magnitude, in the shape that this kind of layer stores."""
        self.weight = nn.Parameter(norm.detach().clone(), requires_grad=True)

    def forward(
        self,
        x: torch.Tensor | Callable[[torch.Tensor], torch.Tensor],
        *,
        lora_A: Any,
        lora_B: Any,
        scaling: float,
        base_layer: nn.Module,
        base_result: torch.Tensor | None = None,
        adapter_name: str = "default",
    ) -> torch.Tensor:
        """What DoRA adds to the base layer's output: (g − 1)∘(W x) + g∘(s · B A x), with g = magnitude / norm.

        Args:
            x: Input, after dropout; or a function of the magnitude, which alone is called then (`inside`).
            lora_A, lora_B: The factors' modules.
            scaling: s.
            base_layer: The frozen layer.
            base_result: Its output for `x`, if known, bias included.
            adapter_name: Not used: the norm depends on the factors alone.
        """
        if not isinstance(x, torch.Tensor):
            return x(self.weight)
        bias = getattr(base_layer, "bias", None)
        base = base_layer(x) if base_result is None else base_result
        if bias is not None:
            base = base - bias.to(base.dtype)
        norm = self._norm(base_layer, lora_A, lora_B, scaling)
        gain = dora.gain(self.weight, norm)
        return ((gain - 1) * base + gain * scaling * lora_B(lora_A(x))).to(base.dtype)

    def _norm(self, base_layer: nn.Module, lora_A: Any, lora_B: Any, scaling: float) -> torch.Tensor:
        weight = dequantize_module_weight(base_layer)
        return self.get_weight_norm(weight, self.get_lora_weight(lora_A, lora_B).detach(), scaling).detach()

    def train(self, mode: bool = True) -> DoraLinearLayer:
        return super().train(mode)

    def __repr__(self) -> str:
        return "lora.dora." + super().__repr__()


class DoraEmbeddingLayer(DoraLinearLayer):
    """The magnitude `[embedding_dim]` of a DoRA adapter on an embedding: one entry a dimension, not one a token."""

    def get_lora_weight(self, lora_A: Any, lora_B: Any, adapter_name: str | None = None) -> torch.Tensor:
        """(B A)ᵀ `[num_embeddings, embedding_dim]`, from A `[r, num]` and B `[dim, r]`."""
        return (_matrix(lora_B) @ _matrix(lora_A)).t()

    def get_weight_norm(
        self, weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, adapter_name: str | None = None
    ) -> torch.Tensor:
        return torch.linalg.norm(weight + scaling * lora_weight.to(weight), dim=0).to(weight.dtype)

    def forward(
        self,
        x: torch.Tensor | Callable[[torch.Tensor], torch.Tensor],
        *,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scaling: float,
        base_layer: nn.Module,
        embed_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        adapter_name: str = "default",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gain `[dim]` and the scaled branch g∘(s · B A[:, x]) that DoRA adds to g∘W[x].

        Args:
            x: Token ids; or a function of the magnitude, which alone is called then (`inside`).
            lora_A, lora_B: A `[num, r]` transposed for look-up, and B `[r, dim]`.
            scaling: s.
            base_layer: The embedding.
            embed_fn: Looks ids up in a table.
            adapter_name: Not used.
        """
        if not isinstance(x, torch.Tensor):
            return x(self.weight)
        lora_weight = (lora_A @ lora_B).detach()
        gain = dora.gain(self.weight, self.get_weight_norm(base_layer.weight, lora_weight, scaling).detach())
        return gain, gain * (embed_fn(x, lora_A) @ lora_B) * scaling


class _DoraConvNdLayer(DoraLinearLayer):
    """The magnitude `[1, out, 1, …]` of a DoRA adapter on a convolution."""

    spatial_dims = 0
    conv_fn: Callable[..., torch.Tensor]

    def set_magnitude(self, norm: torch.Tensor) -> None:
        super().set_magnitude(norm.reshape(1, -1, *[1] * self.spatial_dims))

    def get_weight_norm(
        self, weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, adapter_name: str | None = None
    ) -> torch.Tensor:
        rows = weight.flatten(1) + scaling * lora_weight.reshape(weight.shape[0], -1).to(weight)
        return torch.linalg.norm(rows, dim=1).reshape(1, -1, *[1] * self.spatial_dims).to(weight.dtype)


class DoraConv1dLayer(_DoraConvNdLayer):
    """The magnitude of a DoRA adapter on `nn.Conv1d`."""

    spatial_dims = 1
    conv_fn = staticmethod(F.conv1d)


class DoraConv2dLayer(_DoraConvNdLayer):
    """The magnitude of a DoRA adapter on `nn.Conv2d`."""

    spatial_dims = 2
    conv_fn = staticmethod(F.conv2d)


class DoraConv3dLayer(_DoraConvNdLayer):
    """The magnitude of a DoRA adapter on `nn.Conv3d`."""

    spatial_dims = 3
    conv_fn = staticmethod(F.conv3d)
