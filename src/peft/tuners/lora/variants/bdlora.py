# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Block-diagonal LoRA: A or B is block-diagonal, so that sharded models need no communication for the adapter."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft.weights import whole

from .additive import AdditiveVariant

if TYPE_CHECKING:
    from ..layer.base import LoraLayer


class BlockDiagonalLinear(nn.Module):
    """A linear map without bias by a block-diagonal matrix.

    Args:
        in_features, out_features: Features, both multiples of `nblocks`.
        nblocks: Number of blocks.
        init_zero: Start at zero, else uniform by He's rule for each block.
        dtype, device: Of the weight `[out_features, in_features / nblocks]`, the blocks one below the other.

    Raises:
        ValueError: The features are no multiples of `nblocks`.
    """

    bias = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        init_zero: bool = False,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if in_features % nblocks or out_features % nblocks:
            raise ValueError(
                f"nblocks={nblocks} must divide in_features={in_features} and out_features={out_features}: choose another "
                "number of blocks, or a rank that is a multiple of it."
            )
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        weight = torch.zeros(out_features, in_features // nblocks, dtype=dtype, device=device)
        if not init_zero:
            bound = math.sqrt(6 * nblocks / in_features)
            nn.init.uniform_(weight, -bound, bound)
        self.weight = nn.Parameter(weight)

    def _blocks(self) -> torch.Tensor:
        return self.weight.unflatten(0, (self.nblocks, -1))  # [nblocks, out / nblocks, in / nblocks]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = x.unflatten(-1, (self.nblocks, -1)).unsqueeze(-2)
        return (blocks @ self._blocks().transpose(-1, -2)).flatten(-3)

    def weight_as_blockdiagonal_matrix(self) -> torch.Tensor:
        """The weight as a matrix `[out_features, in_features]`."""
        return torch.block_diag(*self._blocks())


class BdLoraLinearVariant(AdditiveVariant):
    """LoRA on linear layers with a block-diagonal A or B, by the layer's name; plain where no name fits."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Replace A or B by a `BlockDiagonalLinear`.

        Raises:
            ValueError: The name fits none or both of the lists, the start reads the base weight, a block-diagonal B is
                to have a bias, or the features do not divide.
        """
        settings, target = config.use_bdlora, kwargs.get("target_name") or module.kwargs.get("target_name", "")
        if not isinstance(config.init_lora_weights, (bool, type(None))) and config.init_lora_weights != "gaussian":
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} has no block-diagonal form: use True or False with "
                "use_bdlora."
            )
        in_a = _names_it(settings.target_modules_bd_a, target)
        in_b = _names_it(settings.target_modules_bd_b, target)
        if in_a == in_b and (in_a or settings.match_strict):
            raise ValueError(
                f"use_bdlora: {target!r} is named in {'both' if in_a else 'neither'} of target_modules_bd_a="
                f"{settings.target_modules_bd_a!r} and target_modules_bd_b={settings.target_modules_bd_b!r}: name it in "
                "one, or set match_strict=False to leave it plain."
            )
        r = module.r[adapter_name]
        like = {"dtype": module.lora_A[adapter_name].weight.dtype, "device": module.lora_A[adapter_name].weight.device}
        if in_a:
            module.lora_A[adapter_name] = BlockDiagonalLinear(module.in_features, r, settings.nblocks, **like)
        elif in_b:
            if config.lora_bias:
                raise ValueError("lora_bias=True: a block-diagonal B (target_modules_bd_b) has no bias; set it False.")
            zero = config.init_lora_weights not in (False, None)
            module.lora_B[adapter_name] = BlockDiagonalLinear(r, module.out_features, settings.nblocks, zero, **like)


def _names_it(patterns: list[str] | None, target: str) -> bool:
    return any(pattern in target for pattern in patterns or ())


def as_matrix(factor: nn.Module) -> torch.Tensor:
    """The weight of A or B as a matrix, whether it is block-diagonal or not."""
    return factor.weight_as_blockdiagonal_matrix() if isinstance(factor, BlockDiagonalLinear) else whole(factor)
