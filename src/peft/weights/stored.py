# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What the formats share whose values follow from a few tensors of the layer, and those that may hold a plain weight."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from .base import BaseWeight, bears, overwrite, stamp
from .plain import PlainWeight

# Every look at a tensor of a class of its own goes through its `__torch_function__`, in Python: keys are asked for in
# each forward pass.
no_dispatch = torch._C.DisableTorchFunctionSubclass


def scale_columns(block: torch.Tensor, scale: torch.Tensor, width: int) -> None:
    """Multiply each `width` neighbouring elements of a row of `block` [rows, in] by one of `scale` [rows or 1, groups], in
    place. The last group may be narrower; groups beyond the row are not looked at."""
    full = block.shape[1] // width
    block[:, : full * width].unflatten(1, (-1, width)).mul_(scale[:, :full, None])
    block[:, full * width :].mul_(scale[:, full : full + 1])


class StoredWeight(BaseWeight):
    """A weight that is read by rows from the tensors that `tensors` names, kept by copies of them, and told by their
    stamps; of the shape and dtype of the layer's `weight`, where a format does not say otherwise."""

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.layer.weight.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that the weight's values follow from, by name."""

    @abstractmethod
    def _read(self, a: int, b: int) -> torch.Tensor:
        """Rows a to b [b - a, in] in the format's own dtype."""

    def _store(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in the place of the stored one of that name, which has another shape, dtype or device."""
        getattr(self.layer, name).data = tensor

    @property
    def lossy(self) -> bool:
        return True

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.rows(0, self.shape[0], dtype)

    @torch.no_grad()
    def rows(self, a: int, b: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        self._check_rows(a, b)
        block = self._read(a, b)
        return block if dtype is None else block.to(dtype)

    def snapshot(self) -> Any:
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    def restore(self, snapshot: Any) -> None:
        self._put(snapshot)

    def key(self) -> tuple:
        with no_dispatch():
            return tuple(stamp(tensor) for tensor in self.tensors().values())

    def has_key(self, key: tuple) -> bool:
        with no_dispatch():
            tensors = self.tensors().values()
            return len(tensors) == len(key) and all(map(bears, tensors, key))

    def _put(self, new: dict[str, torch.Tensor]) -> None:
        """Write tensors into the stored ones of the same names, in place where they fit."""
        stored = self.tensors()
        for name, tensor in new.items():
            old = stored[name]
            held = overwrite(old.detach(), tensor.to(old.device))
            if held.data_ptr() != old.data_ptr():
                self._store(name, held)


class MaybePlainWeight(StoredWeight):
    """A format whose layers hold a plain weight too, until they are quantised or where they were loaded so. It is read and
    written as `PlainWeight` does then; `_read`, `_write`, `_snapshot` and `_restore` are for the other case."""

    @property
    @abstractmethod
    def is_plain(self) -> bool:
        """Whether the weight is a plain floating one now."""

    @abstractmethod
    def _write(self, matrix: torch.Tensor) -> None:
        """Store a matrix that was checked, in the packed format."""

    @property
    def plain(self) -> PlainWeight:
        return PlainWeight(self.layer)

    @property
    def lossy(self) -> bool:
        return not self.is_plain

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.plain.dense(dtype) if self.is_plain else super().dense(dtype)

    def rows(self, a: int, b: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.plain.rows(a, b, dtype) if self.is_plain else super().rows(a, b, dtype)

    @torch.no_grad()
    def write(self, matrix: torch.Tensor) -> None:
        self._check_matrix(matrix)
        if self.is_plain:
            self.plain.write(matrix)
        else:
            self._write(matrix)

    def snapshot(self) -> Any:
        return self.plain.snapshot() if self.is_plain else self._snapshot()

    def restore(self, snapshot: Any) -> None:
        if isinstance(snapshot, torch.Tensor):
            self.plain.restore(snapshot)
        else:
            self._restore(snapshot)

    def _snapshot(self) -> Any:
        """A copy of the packed bytes; no tensor, which would be a plain weight's."""
        return super().snapshot()

    def _restore(self, snapshot: Any) -> None:
        super().restore(snapshot)
