# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""BitNet's ternary weights (arXiv 2402.17764) in transformers' two layers: packed in 2 bits, and as floats."""

from __future__ import annotations

import torch
from torch import nn

from .formats import Format, register
from .stored import StoredWeight

_THRESHOLD = 0.75  # of the mean magnitude: what lies below it becomes 0 (Li et al., arXiv 1605.04711)


class BitNetWeight(StoredWeight):
    """The weight of transformers' `BitLinear`: codes [out / 4, in] of 2 bits in each byte, w = (code − 1) / scale, where
    row r stands in row r % (out / 4), the first quarter of the rows in the lowest bits.

    Raises:
        TypeError: The layer normalises its input, so that its product is not that of the input with a matrix.
    """

    format = "bitnet"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        if layer.rms_norm is not None:
            raise TypeError(
                f"{type(layer).__name__} with use_rms_norm=True normalises its input and records no gradient: load the "
                'model with BitNetQuantConfig(linear_class="autobitlinear")'
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight_scale.dtype

    @property
    def differentiable(self) -> bool:
        """The activations become int8."""
        return False

    def _read(self, a: int, b: int) -> torch.Tensor:
        words, row = self.layer.weight, torch.arange(a, b, device=self.device)
        codes = words[row % len(words)] >> (row // len(words) * 2)[:, None].to(torch.uint8) & 3
        return (codes.to(self.dtype) - 1) / self.layer.weight_scale

    def write(self, matrix: torch.Tensor) -> None:
        """As `BaseWeight.write`: ternary by a threshold, and the scale that fits best. A ternary matrix is kept."""
        self._check_matrix(matrix)
        from transformers.integrations.bitnet import pack_weights

        wide = matrix.detach().to(self.device, torch.float32)
        signs = wide.sign() * (wide.abs() > _THRESHOLD * wide.abs().mean())
        scale = signs.abs().sum() / (wide * signs).sum() if signs.any() else torch.ones((), device=self.device)
        self._put({"weight": pack_weights(signs), "weight_scale": scale.to(self.dtype).reshape(1)})

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.layer.weight, "weight_scale": self.layer.weight_scale}


class AutoBitNetWeight(StoredWeight):
    """The weight of transformers' `AutoBitLinear`, floats [out, in]: times a scale, or rounded to −1, 0 and 1 times the mean
    magnitude in each forward pass (`online_quant`). Autograd gets through both."""

    format = "bitnet"

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias as it is added: the layer multiplies it by the scale too."""
        bias = self.layer.bias
        return bias if bias is None or self.layer.online_quant else bias * self.layer.weight_scale

    def _read(self, a: int, b: int) -> torch.Tensor:
        weight = self.layer.weight.detach()
        if not self.layer.online_quant:
            return weight[a:b] * self.layer.weight_scale
        mean = torch.linalg.vector_norm(weight, 1, dtype=torch.float32) / weight.numel()
        scale = 1.0 / mean.clamp_(min=1e-5)
        return ((weight[a:b].float() * scale).round_().clamp_(-1, 1) / scale).to(self.dtype)

    def why_read_only(self) -> str | None:
        layer = self.layer
        name = type(layer).__name__
        if getattr(layer, "rms_norm", None) is not None:
            return (
                f"a {name} with use_rms_norm=True multiplies a normalised input, which adapters do not see: keep the adapter "
                "beside the model."
            )
        if not getattr(layer, "online_quant", True) and layer.bias is not None:
            return f"a {name} scales its bias with the product: keep the adapter beside the model."
        return None

    @torch.no_grad()
    def write(self, matrix: torch.Tensor) -> None:
        """As `BaseWeight.write`: what is divided by a scale stays as it is, what each forward pass rounds does not."""
        self._check_matrix(matrix)
        why_not = self.why_read_only()
        if why_not is not None:
            raise TypeError(why_not)
        wide = matrix.to(self.device, torch.float32)
        scale = 1.0 if self.layer.online_quant else self.layer.weight_scale.float()
        self._put({"weight": (wide / scale).to(self.dtype)})

    def tensors(self) -> dict[str, torch.Tensor]:
        held = {"weight": self.layer.weight}
        return held if self.layer.online_quant else {**held, "weight_scale": self.layer.weight_scale}


register(
    Format(
        "BitNet in transformers, packed (`BitLinear`)",
        BitNetWeight,
        ("transformers.integrations.bitnet.BitLinear",),
        verified="CPU",
        remark="ternary: little of a merged adapter is left",
    ),
    Format(
        "BitNet in transformers, as floats (`AutoBitLinear`)",
        AutoBitNetWeight,
        ("transformers.integrations.bitnet.AutoBitLinear",),
        verified="CPU",
        remark="merges into the floats; refused with `use_rms_norm=True`",
    ),
)
