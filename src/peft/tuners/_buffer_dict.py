# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What `nn.ParameterDict` is for parameters, for buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


class BufferDict(nn.Module):
    """A dict of tensors that move with the module they are in, and are no parameters.

    Args:
        buffers: Tensors by name.
        persistent: Whether they are part of the state dict.

    Raises:
        TypeError: A value is not a tensor, or `buffers` is neither a mapping nor pairs.
    """

    def __init__(self, buffers: Mapping[str, torch.Tensor] | None = None, persistent: bool = False) -> None:
        super().__init__()
        self.persistent = persistent
        if buffers is not None:
            self.update(buffers)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._buffers[key]

    def __setitem__(self, key: str, buffer: torch.Tensor) -> None:
        if not isinstance(buffer, torch.Tensor):
            raise TypeError(f"The buffer {key!r} must be a tensor, got {type(buffer).__name__}.")
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]
        self._non_persistent_buffers_set.discard(key)

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __contains__(self, key: object) -> bool:
        return key in self._buffers

    def clear(self) -> None:
        """Remove all buffers."""
        for key in list(self._buffers):
            del self[key]

    def pop(self, key: str) -> torch.Tensor:
        """Remove a buffer and return it."""
        buffer = self[key]
        del self[key]
        return buffer

    def keys(self) -> Iterable[str]:
        return self._buffers.keys()

    def values(self) -> Iterable[torch.Tensor]:
        return self._buffers.values()

    def items(self) -> Iterable[tuple[str, torch.Tensor]]:
        return self._buffers.items()

    def update(self, buffers: Any) -> None:
        """Set buffers from a mapping, another `BufferDict` or pairs, in their order.

        Raises:
            TypeError: `buffers` is none of these, or a value is not a tensor.
        """
        if not isinstance(buffers, Iterable):
            raise TypeError(f"buffers must be a mapping or pairs of name and tensor, got {type(buffers).__name__}.")
        for key, buffer in buffers.items() if hasattr(buffers, "items") else buffers:
            self[key] = buffer

    def extra_repr(self) -> str:
        return "\n".join(
            f"({key}): {buffer.dtype} {list(buffer.shape)} on {buffer.device}" for key, buffer in self.items()
        )
