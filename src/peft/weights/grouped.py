# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What the formats share that keep few-bit integers in groups with one scale and one zero point: w = (q − z)·s."""

from __future__ import annotations

from abc import abstractmethod

import torch

from .base import BaseWeight, overwrite, stamp


class GroupedWeight(BaseWeight):
    """A weight of packed integers, read by rows from a few stored tensors that are named in `_stored`."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    @property
    def lossy(self) -> bool:
        return True

    @property
    def trainable(self) -> bool:
        return False

    @abstractmethod
    def _stored(self) -> dict[str, torch.Tensor]:
        """The tensors that the weight's values follow from, by name."""

    @abstractmethod
    def _store(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in the place of the stored one of that name."""

    @abstractmethod
    def _decode(self, a: int, b: int) -> torch.Tensor:
        """Rows a to b [b - a, in] in the format's own dtype."""

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.rows(0, self.shape[0], dtype)

    def rows(self, a: int, b: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        self._check_rows(a, b)
        block = self._decode(a, b)
        return block if dtype is None else block.to(dtype)

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._stored().items()}

    def restore(self, snapshot: dict[str, torch.Tensor]) -> None:
        self._put(snapshot)

    def key(self) -> tuple:
        return tuple(part for tensor in self._stored().values() for part in stamp(tensor))

    def _put(self, new: dict[str, torch.Tensor]) -> None:
        """Write tensors into the stored ones of the same names, in place where they fit."""
        stored = self._stored()
        for name, tensor in new.items():
            old = stored[name]
            held = overwrite(old.detach(), tensor.to(old.device))
            if held.data_ptr() != old.data_ptr():
                self._store(name, held)
