# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Linear layers that compressed-tensors quantised, in each state that the library puts them in. It is imported when one
of its layers is read; packing and rounding are its own."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from .base import overwrite
from .formats import Format, register
from .stored import MaybePlainWeight

_STORED = ("weight_packed", "weight")
_PARTS = (*_STORED, "weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx", "weight_shape")
_PACKED_TOGETHER = 32  # rows whose zero points share whole words, whatever their width
_PIECES = 4  # in which rows are read: the library makes up to five copies of what it rounds


def is_compressed_tensors(layer: nn.Module) -> bool:
    """True for a layer that compressed-tensors has given a scheme."""
    return "quantization_scheme" in layer.__dict__ and "quantization_status" in layer.__dict__


class _Snapshot(NamedTuple):
    mode: str
    tensors: dict[str, torch.Tensor]


class CompressedTensorsWeight(MaybePlainWeight):
    """The weight of an `nn.Linear` with a compressed-tensors scheme, which says in which of three modes it is:

    - "compressed": packed, until the model's first forward pass unpacks it for good;
    - "plain": unpacked, a floating weight that is used as it is;
    - "rounded": a floating weight that each forward pass rounds to the grid of its scales.
    """

    format = "compressed-tensors"

    @property
    def mode(self) -> str:
        from compressed_tensors.quantization import QuantizationStatus

        layer = self.layer
        status, scheme = layer.quantization_status, layer.quantization_scheme
        if status == QuantizationStatus.COMPRESSED and scheme.weights is not None:
            return "compressed"
        used = getattr(layer, "quantization_enabled", True) and scheme is not None and scheme.weights is not None
        return "rounded" if used and status < QuantizationStatus.COMPRESSED else "plain"

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    @property
    def device(self) -> torch.device:
        return next(getattr(self.layer, name) for name in _STORED if hasattr(self.layer, name)).device

    @property
    def dtype(self) -> torch.dtype:
        if self.mode != "compressed":
            return self.layer.weight.dtype
        return self._blocks(0, min(self._step(), self.shape[0])).dtype

    @property
    def trainable(self) -> bool:
        return self.mode != "compressed" and self.layer.weight.requires_grad

    @property
    def is_plain(self) -> bool:
        return self.mode == "plain"

    @property
    def differentiable(self) -> bool:
        """Where the library rounds activations it does so without recording a gradient."""
        scheme = self.layer.quantization_scheme
        return scheme is None or (scheme.input_activations is None and scheme.output_activations is None)

    def _read(self, a: int, b: int) -> torch.Tensor:
        step, out = self._step(), self.shape[0]
        first, last = a // step * step, min(max(-(-b // step), a // step + 1) * step, out)
        size = -(-(last - first) // (_PIECES * step)) * step
        matrix = None
        for start in range(first, last, size):
            rows = self._blocks(start, min(start + size, last))
            if matrix is None:
                matrix = rows.new_empty(last - first, rows.shape[1])
            matrix[start - first : start - first + size] = rows
            del rows
        return matrix[a - first : b - first]

    def _write(self, matrix: torch.Tensor) -> None:
        """With new scales of the scheme's kind."""
        dense = matrix.detach().to(self.device, self.dtype)
        state = {"weight": dense, **_new_scales(dense, self._scheme.weights)}
        self._put(self._compressor.compress(state, self._scheme) if self.mode == "compressed" else state)

    def snapshot(self) -> _Snapshot:
        return _Snapshot(self.mode, {name: tensor.detach().clone() for name, tensor in self.tensors().items()})

    @torch.no_grad()
    def restore(self, snapshot: _Snapshot) -> None:
        """As `BaseWeight.restore`. A layer that was unpacked in the meantime stays so, and gets the same matrix back.

        Raises:
            RuntimeError: The layer was packed again since the snapshot was taken.
        """
        mode, tensors = snapshot
        if mode == self.mode:
            self._put({name: tensor.to(self.device) for name, tensor in tensors.items()})
        elif mode == "compressed":
            state = {name: tensor.to(self.device) for name, tensor in tensors.items()}
            self.plain.write(self._compressor.decompress(state, self._scheme)["weight"])
        else:
            raise RuntimeError(
                "this compressed-tensors layer was compressed after an adapter was merged into it: decompress the model "
                "(ModelCompressor.decompress_model) before unmerging"
            )

    def key(self) -> tuple:
        return self.mode, *super().key()

    def has_key(self, key: tuple) -> bool:
        return key[0] == self.mode and super().has_key(key[1:])

    @property
    def _scheme(self) -> Any:
        return self.layer.quantization_scheme

    @property
    def _compressor(self) -> Any:
        """What packs and unpacks the layer's format."""
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.format import infer_module_format

        scheme = self._scheme
        name = scheme.format or infer_module_format(type(self.layer), scheme)
        return BaseCompressor.get_value_from_registry(getattr(name, "value", name))

    def tensors(self) -> dict[str, torch.Tensor]:
        held = {name: getattr(self.layer, name, None) for name in _PARTS}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def _step(self) -> int:
        """Rows that can be read on their own: whole words of zero points, whole blocks."""
        block = getattr(self._scheme.weights, "block_structure", None)
        return math.lcm(_PACKED_TOGETHER, int(block[0])) if block else _PACKED_TOGETHER

    def _blocks(self, a: int, b: int) -> torch.Tensor:
        """Rows a to b, both on the border of a step (or b the end), as the library reads them."""
        state = {name: self._cut(name, tensor.detach(), a, b) for name, tensor in self.tensors().items()}
        if self.mode == "compressed":
            return self._compressor.decompress(state, self._scheme)["weight"]
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize

        return fake_quantize(
            state["weight"],
            state["weight_scale"],
            state.get("weight_zero_point"),
            self._scheme.weights,
            global_scale=state.get("weight_global_scale"),
        )

    def _cut(self, name: str, tensor: torch.Tensor, a: int, b: int) -> torch.Tensor:
        out, features = self.shape
        if name == "weight_shape":
            return torch.tensor([b - a, features], device=tensor.device)
        if name in ("weight_global_scale", "weight_g_idx") or tensor.dim() < 2 or tensor.shape[0] == 1 != out:
            return tensor
        rows = tensor.shape[0]
        if rows == out:
            return tensor[a:b]
        if name == "weight_zero_point" and tensor.dtype == torch.int32:
            bits = self._scheme.weights.num_bits
            return tensor[a * bits // 32 : -(-b * bits // 32)]
        size = self._scheme.weights.block_structure[0]
        return tensor[a // size : -(-b // size)]

    def _put(self, tensors: dict[str, torch.Tensor]) -> None:
        held = self.tensors()
        for name, tensor in tensors.items():
            old = held.get(name)
            if old is None:
                continue  # a zero point of a symmetric scheme, which the layer does not keep
            if overwrite(old.detach(), tensor.to(old.dtype)).data_ptr() != old.data_ptr():
                setattr(self.layer, name, nn.Parameter(tensor, requires_grad=False))


def _new_scales(dense: torch.Tensor, args: Any) -> dict[str, torch.Tensor]:
    """Scales and zero points for a matrix, and the global scale where the scheme has one."""
    from compressed_tensors.quantization import QuantizationStrategy
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from compressed_tensors.quantization.utils.helpers import maybe_pad_tensor_for_block_quant

    strategy, found = args.strategy, {}
    if strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP):
        blocks, over = dense.unflatten(1, (-1, args.group_size)), (2,)
    elif strategy == QuantizationStrategy.BLOCK:
        height, width = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(dense, (height, width))
        blocks, over = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)), (1, 3)
    elif strategy == QuantizationStrategy.TENSOR:
        blocks, over = dense, (0, 1)
    else:
        blocks, over = dense[:, None], (2,)
    low, high = blocks.amin(over), blocks.amax(over)
    if strategy == QuantizationStrategy.TENSOR_GROUP:
        found["weight_global_scale"] = generate_gparam(low.amin(), high.amax())
    scale, zero = calculate_qparams(low, high, args, global_scale=found.get("weight_global_scale"))
    return {**found, "weight_scale": scale, "weight_zero_point": zero}


register(
    Format(
        "compressed-tensors",
        CompressedTensorsWeight,
        tells=is_compressed_tensors,
        verified="CPU",
        remark="integers, float8, NVFP4, MXFP4/6/8; packed, or rounded in each forward pass; once unpacked it is a plain "
        "weight",
    )
)
