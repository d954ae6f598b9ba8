# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""AQLM's weights (arXiv 2401.06118): each group of them is a sum of vectors, one out of each codebook, times a scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .formats import Format, register
from .stored import StoredWeight

_STORED = ("codes", "codebooks", "scales")


class AqlmWeight(StoredWeight):
    """The weight of an `aqlm.QuantizedLinear`: `codes` [out groups, in groups, codebooks] of as many bits as a codebook
    needs, `codebooks` [codebooks, size, rows of a group, columns of a group], `scales` [out groups, 1, 1, 1].

    It can be read, not written: codes are found by a search over a layer's inputs, which a merge does not have.
    """

    format = "aqlm"

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.codebooks.dtype

    @property
    def device(self) -> torch.device:
        return self.layer.codes.device

    @property
    def trainable(self) -> bool:
        return False

    @property
    def differentiable(self) -> bool:
        """The library gives the input its gradient and the bias none; by codes that it reordered for a CPU, neither."""
        return not self._may_swap and (self.bias is None or not self.bias.requires_grad)

    def _read(self, a: int, b: int) -> torch.Tensor:
        number, size, height, width = self.layer.codebooks.shape
        first, last = a // height, -(-b // height)
        # Codes are stored as signed integers; those of one codebook follow those of the one before.
        codes = self._codes()[first:last].long() % size + torch.arange(number, device=self.device) * size
        vectors = self.layer.codebooks.detach().view(number * size, height * width)
        groups = F.embedding_bag(codes.reshape(-1, number), vectors, mode="sum")
        groups = groups.view(last - first, codes.shape[1], height, width) * self.layer.scales.detach()[first:last]
        matrix = groups.transpose(1, 2).reshape((last - first) * height, self.shape[1])
        return matrix[a - first * height :][: b - a]

    def why_read_only(self) -> str | None:
        return (
            "AQLM's codes come from a search over the layer's inputs, so no new weight can be stored. Keep the adapter "
            "beside the quantised model, or merge it into the dense model and quantise that."
        )

    def write(self, matrix: torch.Tensor) -> None:
        """Refuses.

        Raises:
            TypeError: Always.
        """
        self._check_matrix(matrix)
        raise TypeError(self.why_read_only())

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self.layer, name) for name in _STORED}

    @property
    def _may_swap(self) -> bool:
        """Whether the library swaps the first two dimensions of the codes before the layer's first product."""
        return self.layer.codebook_size == 256 and not self.layer.codes.is_cuda

    def _codes(self) -> torch.Tensor:
        """[out groups, in groups, codebooks], in whichever order the library has them now."""
        codes, layer = self.layer.codes.detach(), self.layer
        out_groups = layer.out_features // layer.out_group_size
        in_groups = layer.in_features // layer.in_group_size
        has_run = layer.gemv_op is not None
        swapped = codes.shape[0] != out_groups or (out_groups == in_groups and self._may_swap and has_run)
        return codes.transpose(0, 1) if swapped else codes


register(
    Format("AQLM", AqlmWeight, ("aqlm.inference.QuantizedLinear",), verified="CPU", remark="codes come from a search")
)
